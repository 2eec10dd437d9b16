"""The MANO layer against the paper's formulas in plain numpy."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from src.hand.mano import ManoLayer
from src.hand.skeleton import (
    FINGER_NAMES,
    JOINT_NAMES,
    MANO_JOINT_NAMES,
    MANO_PARENTS,
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
    for k, parent in enumerate(MANO_PARENTS):
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


@pytest.mark.parametrize("flat_hand_mean", [True, False])
@pytest.mark.parametrize(("num_vertex", "batch"), [(60, 12), (778, 2)])
def test_layer_follows_the_papers_formulas(num_vertex, batch, flat_hand_mean):
    hand = random_hand(num_vertex)
    rng = np.random.default_rng(1)
    pose, shape = rng.normal(0, 0.8, (batch, 48)), rng.normal(0, 1.5, (batch, 10))
    pose[0], shape[0] = 0, 0  # the hand at rest; the next one has almost half a turn in every joint
    pose[1] *= np.repeat(3.1 / np.linalg.norm(pose[1].reshape(16, 3), axis=1), 3)
    layer = ManoLayer(hand)
    out = layer(layer.pose_to_rotmat(torch.tensor(pose), flat_hand_mean), torch.tensor(shape))
    assert out.vert.dtype == out.joint.dtype == torch.float32
    added = np.zeros(48) if flat_hand_mean else np.concatenate((np.zeros(3), hand.mean_pose))
    for b in range(batch):
        vert, joint = reference_hand(hand, pose[b] + added, shape[b])
        np.testing.assert_allclose(out.vert[b].numpy() / 1000, vert, atol=1e-6)
        np.testing.assert_allclose(out.joint[b].numpy() / 1000, joint, atol=1e-6)
    assert (out.joint[:, 0] == 0).all()


def test_mean_pose_is_added_unless_flat_hand_mean():
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
        ({"mean_pose": np.full(45, np.nan)}, "mean_pose contains NaN"),
        ({"skin_weights": np.ones((60, 16))}, "skin_weights must sum to 1"),
        ({"faces": np.full((2, 3), 60)}, "faces refer to vertices outside 0..59"),
        ({"faces": np.zeros((2, 3))}, "faces must be"),
        ({"tip_vertex_ids": (1, 2, 3, 4)}, "tip_vertex_ids must be"),
    ],
)
def test_wrong_arrays_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        HandArrays(**{**vars(random_hand()), **change})
