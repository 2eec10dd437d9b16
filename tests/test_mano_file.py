"""The MANO file reader on files in the official layout and on malicious ones."""

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

from src.hand.load import hand_model_problem, load_hand
from src.hand.mano import ManoLayer
from src.hand.mano_file import load_hand_arrays, load_pose_components
from src.hand.skeleton import MANO_JOINT_NAMES, MANO_PARENTS, MANO_TIP_VERTEX_IDS, HandArrays
from tests.test_mano import random_hand, reference_hand


class Ch:
    """chumpy's array: pickled as its attributes."""

    def __init__(self, **state):
        # chumpy's other attributes
        self.__dict__.update(
            {"_dirty_vars": {"x"}, "_itr": None, "_depends_on_deps": {}, "_make_dense": False}, **state
        )


class Select(Ch):
    """chumpy's lazy indexing."""


@pytest.fixture
def chumpy(monkeypatch):
    """Modules with the names that the pickle must contain, present only while the test writes it."""
    for name, cls in (("chumpy.ch", Ch), ("chumpy.reordering", Select)):
        monkeypatch.setattr(cls, "__module__", name)
        module = types.ModuleType(name)
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "chumpy", types.ModuleType("chumpy"))


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 wrote its str, like the official file."""

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
    assert hand.tip_vertex_ids == MANO_TIP_VERTEX_IDS
    np.testing.assert_array_equal(hand.v_template, content["v_template"])
    np.testing.assert_array_equal(hand.shapedirs, content["shapedirs"][..., :10])
    np.testing.assert_array_equal(hand.posedirs, content["posedirs"])
    np.testing.assert_array_equal(hand.joint_regressor, content["J_regressor"])
    np.testing.assert_array_equal(hand.skin_weights, content["weights"])
    np.testing.assert_array_equal(hand.faces, content["f"])
    np.testing.assert_array_equal(hand.mean_pose, content["hands_mean"])


def assert_layer_poses(layer: ManoLayer, content: dict[str, np.ndarray]) -> None:
    """The layer built from the file, against the paper's formulas on the written arrays, for both flat_hand_mean."""
    rng = np.random.default_rng(8)
    pose, shape = rng.normal(0, 0.6, 48), rng.normal(0, 1.5, 10)
    content = {**content, "shapedirs": content["shapedirs"][..., :10]}
    names = {"v_template": "v_template", "shapedirs": "shapedirs", "posedirs": "posedirs", "weights": "skin_weights"}
    plain = types.SimpleNamespace(
        **{field: content[key] for key, field in names.items()},
        joint_regressor=content["J_regressor"],
        tip_vertex_ids=MANO_TIP_VERTEX_IDS,
    )
    for flat_hand_mean in (True, False):
        full = pose + (0 if flat_hand_mean else np.concatenate((np.zeros(3), content["hands_mean"])))
        rotmat = layer.pose_to_rotmat(torch.tensor(pose)[None], flat_hand_mean)
        vert, joint = layer(rotmat, torch.tensor(shape)[None])
        expected_vert, expected_joint = reference_hand(plain, full, shape)
        np.testing.assert_allclose(vert[0].numpy() / 1000, expected_vert, atol=1e-5)
        np.testing.assert_allclose(joint[0].numpy() / 1000, expected_joint, atol=1e-5)


@pytest.mark.parametrize(
    ("pickler", "protocol"), [(Python2Pickler, 0), (Python2Pickler, 2), *((pickle._Pickler, p) for p in (2, 4, 5))]
)
def test_official_pickle_is_read_without_chumpy(tmp_path, chumpy, monkeypatch, pickler, protocol):
    content = official_content()
    content["J_regressor"][3, 100:105] = 0.005  # a column with several entries, and rows with more than one
    content["J_regressor"][4, 100] = -0.01
    raw = write_pickle(official_object(content, csr_matrix if protocol == 4 else csc_matrix), pickler, protocol)
    if protocol < 3:  # module names at the time when the official file was written
        raw = raw.replace(b"cscipy.sparse._csc\n", b"cscipy.sparse.csc\n")
        raw = raw.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    for name in ("chumpy", "chumpy.ch", "chumpy.reordering"):
        monkeypatch.delitem(sys.modules, name)
    path = tmp_path / "MANO_RIGHT.pkl"
    path.write_bytes(raw)
    hand = load_hand_arrays(path)
    assert_is_content(hand, content)
    assert_layer_poses(ManoLayer(hand), content)


def test_npz_round_trip(tmp_path):
    content = official_content()
    np.savez(tmp_path / "mano.npz", **content)
    assert_is_content(load_hand_arrays(tmp_path / "mano.npz"), content)
    np.savez(tmp_path / "object.npz", **{**content, "f": np.array([Ch()], dtype=object)})
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_hand_arrays(tmp_path / "object.npz")


@pytest.mark.parametrize("subfolder", [".", "mano", "models/mano", "mano_v1_2/models"])
def test_a_folder_means_the_file_in_it(tmp_path, subfolder):
    folder = tmp_path / subfolder
    folder.mkdir(parents=True, exist_ok=True)
    content = official_content()
    np.savez(folder / "MANO_LEFT.npz", **content)
    assert "this folder does not contain MANO_RIGHT.pkl" in hand_model_problem(str(tmp_path))
    with pytest.raises(ValueError, match=r"is a folder without MANO_RIGHT\.pkl"):
        load_hand(str(tmp_path))
    np.savez(folder / "MANO_RIGHT.npz", **content)
    assert hand_model_problem(str(tmp_path)) is None
    assert_is_content(load_hand(str(tmp_path)), content)
    assert (load_pose_components(tmp_path) == content["hands_components"]).all()


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "MANO.txt").touch()
    assert "must be a .pkl or .npz file" in hand_model_problem(str(tmp_path / "MANO.txt"))
    assert "there is no such file" in hand_model_problem(str(tmp_path / "MANO_RIGHT.pkl"))


class Call:
    """Pickles as a call of an arbitrary function."""

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
def test_a_malicious_pickle_runs_nothing_and_is_named(tmp_path, call, message, protocol):
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
    with pytest.raises(ValueError, match="cannot be read as a MANO file"):
        load_hand_arrays(tmp_path / "text.pkl")
