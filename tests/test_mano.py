"""The MANO layer against the paper's formulas in plain numpy, and the file reader against real and hostile files."""

import copyreg
import io
import os
import pickle
import struct
import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix, csr_matrix
from scipy.spatial.transform import Rotation

from src.hand.mano import ManoLayer, load_hand_arrays
from src.hand.skeleton import (
    FINGER_NAMES,
    JOINT_NAMES,
    MANO_JOINT_NAMES,
    MANO_PARENTS,
    MANO_TIP_VERTEX_IDS,
    MANO_TO_OPENPOSE,
    HandArrays,
)


def random_hand(num_vertex: int = 60, seed: int = 0) -> HandArrays:
    """Random arrays of the size and magnitude of MANO's."""
    rng = np.random.default_rng(seed)
    weights, regressor = rng.random((num_vertex, 16)) ** 8, rng.random((16, num_vertex)) ** 8
    return HandArrays(
        name="random",
        v_template=rng.normal(0, 0.05, (num_vertex, 3)) + np.array([0.09, 0.0, 0.0]),
        shapedirs=rng.normal(0, 0.005, (num_vertex, 3, 10)),
        posedirs=rng.normal(0, 0.002, (num_vertex, 3, 135)),
        joint_regressor=regressor / regressor.sum(axis=1, keepdims=True),
        skin_weights=weights / weights.sum(axis=1, keepdims=True),
        faces=rng.integers(0, num_vertex, (20, 3)),
        parents=MANO_PARENTS,
        mean_pose=rng.normal(0, 0.3, 45),
        tip_vertex_ids=tuple(rng.integers(0, num_vertex, 5).tolist()),
    )


def reference_hand(hand: HandArrays, pose: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One hand by the formulas of the paper, loop by loop, in metres about the wrist: vertices, 21 joints by name."""
    rest = hand.v_template + np.tensordot(hand.shapedirs, shape, axes=(2, 0))
    joint = np.stack([sum(hand.joint_regressor[k, v] * rest[v] for v in range(len(rest))) for k in range(16)])
    rotation = [Rotation.from_rotvec(pose[3 * k : 3 * k + 3]).as_matrix() for k in range(16)]
    feature = np.concatenate([(rotation[k] - np.eye(3)).ravel() for k in range(1, 16)])
    posed = rest + hand.posedirs @ feature

    world, skinning = [], []
    for k, parent in enumerate(hand.parents):
        local = np.eye(4)
        local[:3, :3], local[:3, 3] = rotation[k], joint[k] - (joint[parent] if k else 0)
        world.append(world[parent] @ local if k else local)
        back = np.eye(4)
        back[:3, 3] = -joint[k]
        skinning.append(world[k] @ back)
    vert = np.stack(
        [
            (sum(hand.skin_weights[v, k] * skinning[k] for k in range(16)) @ np.append(posed[v], 1.0))[:3]
            for v in range(len(rest))
        ]
    )
    by_name = {name: world[k][:3, 3] for k, name in enumerate(MANO_JOINT_NAMES)}
    by_name.update({f"{finger}4": vert[hand.tip_vertex_ids[i]] for i, finger in enumerate(FINGER_NAMES)})
    joints = np.stack([by_name[name] for name in JOINT_NAMES])
    return vert - joints[0], joints - joints[0]


@pytest.mark.parametrize(("num_vertex", "batch"), [(60, 12), (778, 2)])
def test_layer_follows_the_papers_formulas(num_vertex, batch):
    hand = random_hand(num_vertex)
    rng = np.random.default_rng(1)
    pose, shape = rng.normal(0, 0.8, (batch, 48)), rng.normal(0, 1.5, (batch, 10))
    layer = ManoLayer(hand)
    out = layer(layer.pose_to_rotmat(torch.tensor(pose), True), torch.tensor(shape))
    assert out.vert.dtype == out.joint.dtype == torch.float32
    for b in range(batch):
        vert, joint = reference_hand(hand, pose[b], shape[b])
        np.testing.assert_allclose(out.vert[b].numpy() / 1000, vert, atol=1e-6)
        np.testing.assert_allclose(out.joint[b].numpy() / 1000, joint, atol=1e-6)
    assert (out.joint[:, 0] == 0).all()


def test_other_trees_work_too():
    """Levels and order come from `parents`, not from what MANO's happen to be."""
    hand = random_hand()
    hand = HandArrays(**{**vars(hand), "parents": (-1, 0, 0, 1, 3, 2, 1, 6, 0, 8, 4, 10, 5, 0, 13, 2)})
    pose, shape = np.random.default_rng(2).normal(0, 0.8, 48), np.zeros(10)
    layer = ManoLayer(hand)
    out = layer(layer.pose_to_rotmat(torch.tensor(pose)[None], True), torch.tensor(shape)[None])
    np.testing.assert_allclose(out.joint[0].numpy() / 1000, reference_hand(hand, pose, shape)[1], atol=1e-6)


def test_mean_pose_is_added_where_asked():
    hand = random_hand()
    layer = ManoLayer(hand)
    pose = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    shifted = pose + torch.tensor(np.concatenate((np.zeros(3), hand.mean_pose)), dtype=torch.float32)
    flat, with_mean = layer.pose_to_rotmat(pose, True), layer.pose_to_rotmat(pose, False)
    torch.testing.assert_close(with_mean, layer.pose_to_rotmat(shifted, True))
    assert not torch.allclose(flat, with_mean)
    mixed = layer.pose_to_rotmat(pose, torch.tensor([True, False, True]))
    assert torch.equal(mixed, torch.stack((flat[0], with_mean[1], flat[2])))


def test_gradients_agree_with_finite_differences():
    layer = ManoLayer(random_hand(20)).double()
    generator = torch.Generator().manual_seed(0)
    pose = (0.5 * torch.randn(2, 48, generator=generator, dtype=torch.float64)).requires_grad_()
    shape = torch.randn(2, 10, generator=generator, dtype=torch.float64, requires_grad=True)

    def run(pose, shape):
        out = layer(layer.pose_to_rotmat(pose, False), shape)
        return out.vert / 1000, out.joint / 1000

    assert torch.autograd.gradcheck(run, (pose, shape), eps=1e-6, atol=1e-7)
    rest = torch.zeros(1, 48, dtype=torch.float64, requires_grad=True)  # the flat hand, where axis-angle is singular
    assert torch.autograd.gradcheck(lambda p: layer(layer.pose_to_rotmat(p, True), shape[:1]).joint / 1000, (rest,))


def test_autocast_does_not_lower_the_precision():
    layer = ManoLayer(random_hand())
    generator = torch.Generator().manual_seed(0)
    pose, shape = torch.randn(4, 48, generator=generator), torch.randn(4, 10, generator=generator)
    grads, outs = [], []
    for enabled in (False, True):
        leaf = pose.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = layer(layer.pose_to_rotmat(leaf, False), shape)
        out.joint.square().sum().backward()
        outs.append(out)
        grads.append(leaf.grad)
    assert outs[1].vert.dtype == torch.float32
    assert torch.equal(outs[0].vert, outs[1].vert)
    assert torch.equal(grads[0], grads[1])
    assert layer(layer.pose_to_rotmat(pose.bfloat16(), False), shape.bfloat16()).vert.dtype == torch.float32


def test_layer_is_one_graph_and_keeps_the_hand_out_of_checkpoints():
    layer = ManoLayer(random_hand())
    rotmat = layer.pose_to_rotmat(torch.randn(2, 48, generator=torch.Generator().manual_seed(0)), True)
    shape = torch.zeros(2, 10)
    assert layer.state_dict() == {}
    assert layer.faces.shape == (20, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rotmat, shape), layer(rotmat, shape))
    exported = torch.export.export(layer, (rotmat, shape)).module()
    torch.testing.assert_close(exported(rotmat, shape).vert, layer(rotmat, shape).vert)


def test_joint_orders_agree_by_name():
    names = (*MANO_JOINT_NAMES, *(f"{finger}4" for finger in FINGER_NAMES))
    assert tuple(names[i] for i in MANO_TO_OPENPOSE) == JOINT_NAMES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapedirs": np.zeros((60, 3, 9))}, "shapedirs must have shape"),
        ({"mean_pose": np.full(45, np.nan)}, "mean_pose holds NaN"),
        ({"skin_weights": np.ones((60, 16))}, "skin_weights must sum to 1"),
        ({"faces": np.full((2, 3), 60)}, "faces name vertices outside 0..59"),
        ({"faces": np.zeros((2, 3))}, "faces must be"),
        ({"parents": (0, *MANO_PARENTS[1:])}, "parents must be"),
        ({"tip_vertex_ids": (1, 2, 3, 4)}, "tip_vertex_ids must be"),
    ],
)
def test_wrong_arrays_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        HandArrays(**{**vars(random_hand()), **change})


# ---------------------------------------------------------------- files


class Ch:
    """chumpy's array: pickled as its attributes."""

    def __init__(self, **state):
        # what chumpy keeps beside the array
        self.__dict__.update(
            {"_dirty_vars": {"x"}, "_itr": None, "_depends_on_deps": {}, "_make_dense": False}, **state
        )


class Select(Ch):
    """chumpy's lazy indexing."""


@pytest.fixture
def chumpy(monkeypatch):
    """Modules by the names that the pickle must hold, there only while the test writes."""
    for name, cls in (("chumpy.ch", Ch), ("chumpy.reordering", Select)):
        monkeypatch.setattr(cls, "__module__", name)
        module = types.ModuleType(name)
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "chumpy", types.ModuleType("chumpy"))


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its str, the way the official file is."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_python2_str(self, obj):
        data = obj.encode("latin1") if isinstance(obj, str) else obj
        binary = b"T" + struct.pack("<i", len(data)) + data
        self.write(binary if self.bin else b"S" + repr(data)[1:].encode() + b"\n")
        self.memoize(obj)

    dispatch[str] = dispatch[bytes] = save_python2_str


def official_content() -> dict[str, np.ndarray]:
    """Random arrays under the official keys, with joints placed as on a right hand that flexes towards -y."""
    rng = np.random.default_rng(5)
    hand = random_hand(778, seed=6)
    template = hand.v_template.copy()
    place = {"wrist": (0.09, 0, 0), "index": (0, 0, 0.03), "middle": (0, 0, 0), "ring": (0.01, 0, -0.02)}
    place |= {"pinky": (0.02, 0, -0.03), "thumb": (0.07, -0.01, 0.03)}
    for k, name in enumerate(MANO_JOINT_NAMES):
        template[k] = np.array(place[name.rstrip("123")]) - [0.02 * int(name[-1]) if k else 0, 0, 0]
    mean = rng.normal(0, 0.05, (15, 3)) + np.array([0.0, 0.0, 0.5])
    parents = np.array(MANO_PARENTS, dtype=np.int64).astype(np.uint32)  # the root's is 4294967295
    return {
        "v_template": template,
        "shapedirs": np.concatenate((hand.shapedirs, rng.normal(size=(778, 3, 10))), axis=2),
        "posedirs": hand.posedirs,
        "J_regressor": np.eye(16, 778),
        "weights": hand.skin_weights,
        "f": hand.faces.astype(np.uint32),
        "hands_mean": mean.ravel(),
        "hands_components": np.eye(45),
        "hands_coeffs": np.zeros((4, 45)),
        "J": template[:16],
        "kintree_table": np.stack((parents, np.arange(16, dtype=np.uint32))),
    }


def official_object(content: dict[str, np.ndarray], sparse: type = csc_matrix) -> dict:
    """The dict of the official pickle: a chumpy selection of 10 of 20 shape directions, a sparse regressor, strings."""
    index = np.arange(778 * 3 * 20).reshape(778, 3, 20)[..., :10]
    shape = Select(a=Ch(x=content["shapedirs"]), idxs=index.ravel(), preferred_shape=index.shape)
    lazy = {"shapedirs": shape, "v_template": Ch(x=content["v_template"]), "posedirs": Ch(x=content["posedirs"])}
    return {**content, **lazy, "J_regressor": sparse(content["J_regressor"]), "bs_style": "lbs", "bs_type": "lrotmin"}


def write_pickle(obj: object, pickler: type, protocol: int) -> bytes:
    buffer = io.BytesIO()
    pickler(buffer, protocol).dump(obj)
    return buffer.getvalue()


def assert_is_content(hand: HandArrays, content: dict[str, np.ndarray]) -> None:
    assert hand.name == "mano"
    assert hand.parents == MANO_PARENTS
    assert hand.tip_vertex_ids == MANO_TIP_VERTEX_IDS
    np.testing.assert_array_equal(hand.v_template, content["v_template"])
    np.testing.assert_array_equal(hand.shapedirs, content["shapedirs"][..., :10])
    np.testing.assert_array_equal(hand.posedirs, content["posedirs"])
    np.testing.assert_array_equal(hand.joint_regressor, content["J_regressor"])
    np.testing.assert_array_equal(hand.skin_weights, content["weights"])
    np.testing.assert_array_equal(hand.faces, content["f"])
    np.testing.assert_array_equal(hand.mean_pose, content["hands_mean"])


@pytest.mark.parametrize(
    ("pickler", "protocol"), [(Python2Pickler, 0), (Python2Pickler, 2), *((pickle._Pickler, p) for p in (2, 4, 5))]
)
def test_official_pickle_is_read_without_chumpy(tmp_path, chumpy, monkeypatch, pickler, protocol):
    content = official_content()
    content["J_regressor"][3, 100:105] = 0.005  # a column with several entries, and rows with more than one
    content["J_regressor"][4, 100] = -0.01
    raw = write_pickle(official_object(content, csr_matrix if protocol == 4 else csc_matrix), pickler, protocol)
    if protocol < 3:  # the module names of the years in which the file was written
        raw = raw.replace(b"cscipy.sparse._csc\n", b"cscipy.sparse.csc\n")
        raw = raw.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    for name in ("chumpy", "chumpy.ch", "chumpy.reordering"):
        monkeypatch.delitem(sys.modules, name)
    path = tmp_path / "MANO_RIGHT.pkl"
    path.write_bytes(raw)
    hand = load_hand_arrays(path)
    assert_is_content(hand, content)
    assert ManoLayer(hand).num_vertex == 778


def test_npz_round_trip(tmp_path):
    content = official_content()
    np.savez(tmp_path / "mano.npz", **content)
    assert_is_content(load_hand_arrays(tmp_path / "mano.npz"), content)
    np.savez(tmp_path / "object.npz", **{**content, "f": np.array([Ch()], dtype=object)})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_hand_arrays(tmp_path / "object.npz")


class Call:
    """Pickles into a call of anything."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((os.system, ("touch {}",)), r"\w+\.system is not allowed"),
        ((eval, ("open('{}', 'w')",)), r"builtin\w*\.eval is not allowed"),
        ((np.load, ("{}",)), r"numpy\S*\.load is not allowed"),
        ((copyreg._reconstructor, (list, list, [1])), r"list is not allowed"),
        ((copyreg._reconstructor, (set, set, {1})), "chumpy and scipy objects only"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_pickle_runs_nothing_and_is_named(tmp_path, call, message, protocol):
    victim = tmp_path / "victim"
    func, args = call
    args = tuple(a.format(victim) if isinstance(a, str) else a for a in args)
    path = tmp_path / "MANO_RIGHT.pkl"
    path.write_bytes(write_pickle({"f": Call(func, args)}, pickle._Pickler, protocol))
    with pytest.raises(ValueError, match=message):
        load_hand_arrays(path)
    assert not victim.exists()


def test_files_that_are_not_a_right_mano_hand(tmp_path):
    with pytest.raises(ValueError, match=r"mano\.is\.tue\.mpg\.de.*MODEL\.hand_model=standin"):
        load_hand_arrays(tmp_path / "MANO_RIGHT.pkl")
    content = official_content()
    np.savez(tmp_path / "MANO_LEFT.npz", **content)
    with pytest.raises(ValueError, match="is the left hand"):
        load_hand_arrays(tmp_path / "MANO_LEFT.npz")
    mirrored = {"v_template": content["v_template"] * [-1, 1, 1]}
    mirrored["hands_mean"] = (content["hands_mean"].reshape(15, 3) * [1, -1, -1]).ravel()
    np.savez(tmp_path / "renamed.npz", **{**content, **mirrored})
    with pytest.raises(ValueError, match="is the left hand"):
        load_hand_arrays(tmp_path / "renamed.npz")
    np.savez(tmp_path / "part.npz", f=content["f"], weights=content["weights"])
    with pytest.raises(ValueError, match="keys missing: J_regressor, hands_mean, posedirs"):
        load_hand_arrays(tmp_path / "part.npz")
    np.savez(tmp_path / "small.npz", **{**content, "v_template": content["v_template"][:700]})
    with pytest.raises(ValueError, match=r"v_template must be \[778, 3\]"):
        load_hand_arrays(tmp_path / "small.npz")
    (tmp_path / "text.pkl").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="is not a MANO file that can be read"):
        load_hand_arrays(tmp_path / "text.pkl")
