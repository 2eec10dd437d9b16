"""The stand-in hand: a sound mesh, a skeleton that stays inside it, plausible shapes and poses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from src.hand.skeleton import FINGER_NAMES, MANO_PARENTS, HandArrays
from src.hand.standin.build import build_standin_hand
from src.hand.standin.design import angles_to_rotmat, chain, design, joint_limits
from src.hand.standin.mesh import signed_volume

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def hand() -> HandArrays:
    return build_standin_hand()


def pose_hand(hand: HandArrays, rotmat: np.ndarray) -> np.ndarray:
    """Linear blend skinning in plain numpy, rotmat [16, 3, 3] -> vertices [V, 3] mm."""
    vert = hand.v_template + hand.posedirs @ (rotmat[1:] - np.eye(3)).reshape(-1)
    joint = hand.joint_regressor @ hand.v_template
    rot, place = [rotmat[0]], [joint[0]]
    for k in range(1, 16):
        p = MANO_PARENTS[k]
        rot.append(rot[p] @ rotmat[k])
        place.append(place[p] + rot[p] @ (joint[k] - joint[p]))
    moved = np.stack([(vert - joint[k]) @ rot[k].T + place[k] for k in range(16)], axis=1)
    return 1e3 * (hand.skin_weights[..., None] * moved).sum(1)


def flexed(degrees: float) -> np.ndarray:
    """All long fingers bent by `degrees` at every joint."""
    angles = np.zeros((15, 3))
    angles[[k - 1 for d in range(1, 5) for k in chain(d)], 0] = np.radians(degrees)
    return np.concatenate([np.eye(3)[None], angles_to_rotmat(angles)])


def test_mesh_is_a_closed_manifold_with_outward_faces(hand: HandArrays) -> None:
    assert 400 <= hand.num_vertex <= 1000
    edges = np.concatenate([hand.faces[:, [0, 1]], hand.faces[:, [1, 2]], hand.faces[:, [2, 0]]])
    directed = {(int(a), int(b)) for a, b in edges}
    assert len(directed) == len(edges), "an edge is used twice in one direction"
    assert all((b, a) in directed for a, b in directed), "the mesh has an open edge"
    assert hand.num_vertex - len(edges) // 2 + len(hand.faces) == 2, "one piece without handles"
    volume_ml = signed_volume(hand.v_template.astype(np.float64), hand.faces) * 1e6
    assert 250 < volume_ml < 450
    corner = hand.v_template[hand.faces]
    area_mm2 = 0.5e6 * np.linalg.norm(np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), axis=1)
    assert area_mm2.min() > 0.2


def test_size_and_axes(hand: HandArrays) -> None:
    joint, tip = design().joint, design().tip
    assert 175 < -hand.v_template[:, 0].min() * 1e3 < 195  # hand length from the wrist
    assert tip[0, 2] > 40  # thumb to +z
    assert np.all(tip[1:, 0] < -110)  # fingers to -x
    no_thumb = hand.skin_weights[:, list(chain(0))].sum(1) < 0.1
    at_knuckles = hand.v_template[no_thumb & (np.abs(hand.v_template[:, 0] * 1e3 + 80) < 8)]
    assert 70 < np.ptp(at_knuckles[:, 2]) * 1e3 < 95
    bent = pose_hand(hand, flexed(40.0))[list(hand.tip_vertex_ids)[1:]]
    assert np.all(bent[:, 1] < joint[[chain(d)[2] for d in range(1, 5)], 1] - 40)  # positive angles bend to the palm
    np.testing.assert_allclose(hand.v_template[list(hand.tip_vertex_ids)] * 1e3, tip, atol=0.5)


def test_joints_are_regressed_and_stay_inside_when_the_shape_changes(hand: HandArrays) -> None:
    regressor = hand.joint_regressor
    assert regressor.min() >= 0
    assert (regressor > 0).sum(1).max() <= 60
    np.testing.assert_allclose(1e3 * regressor @ hand.v_template, design().joint, atol=0.5)
    for i in range(10):
        moved = 1e3 * regressor @ hand.shapedirs[:, :, i]
        for d in range(5):
            ids = list(chain(d))
            around = hand.skin_weights[:, ids[1]] > 0.7
            mean_shift = 1e3 * hand.shapedirs[around, :, i].mean(0)
            assert np.linalg.norm(moved[ids[1:]].mean(0) - mean_shift) < 1.5, (i, FINGER_NAMES[d])


def test_skinning_weights_are_smooth_and_do_not_bleed_between_fingers(hand: HandArrays) -> None:
    weight = hand.skin_weights
    assert weight.min() >= 0
    np.testing.assert_allclose(weight.sum(1), 1.0, atol=1e-5)
    for a, b in ((0, 1), (1, 2), (2, 0)):
        assert np.abs(weight[hand.faces[:, a]] - weight[hand.faces[:, b]]).max() < 0.75
    per_digit = np.stack([weight[:, list(chain(d))].sum(1) for d in range(5)], axis=1)
    second = np.sort(per_digit, axis=1)[:, -2]
    assert second.max() <= 0.5
    assert (second > 0.05).mean() < 0.08  # the webs only


def test_fingers_do_not_fuse(hand: HandArrays) -> None:
    digit = np.stack([hand.skin_weights[:, list(chain(d)[1:])].sum(1) for d in range(5)], axis=1)
    owner = np.where(digit.max(1) > 0.5, digit.argmax(1), -1)
    for d in range(5):
        for e in range(d + 1, 5):
            a, b = hand.v_template[owner == d], hand.v_template[owner == e]
            assert 1e3 * np.linalg.norm(a[:, None] - b[None], axis=2).min() > 3.0, (d, e)


@pytest.mark.parametrize(
    ("direction", "measure", "low", "high"),
    [(0, "length", 5, 12), (1, "length", 2, 7), (2, "breadth", 2, 6), (3, "depth", 0.6, 3)],
)
def test_one_standard_deviation_of_shape_is_millimetres(
    hand: HandArrays, direction: int, measure: str, low: float, high: float
) -> None:
    def extent(beta: float) -> float:
        vert = 1e3 * (hand.v_template + beta * hand.shapedirs[:, :, direction])
        if measure == "length":
            return -vert[:, 0].min()
        no_thumb = hand.skin_weights[:, list(chain(0))].sum(1) < 0.1
        palm = vert[no_thumb & (np.abs(1e3 * hand.v_template[:, 0] + 75) < 8)]
        return np.ptp(palm[:, 2 if measure == "breadth" else 1])

    assert low < extent(1.0) - extent(0.0) < high


def test_shape_directions_are_independent(hand: HandArrays) -> None:
    flat = hand.shapedirs.reshape(-1, 10).astype(np.float64)
    singular = np.linalg.svd(flat / np.linalg.norm(flat, axis=0), compute_uv=False)
    assert singular[-1] > 0.1


def test_bending_keeps_the_volume_and_the_corrections_help_the_knuckles(hand: HandArrays) -> None:
    rest = signed_volume(hand.v_template * 1e3, hand.faces)
    bent = pose_hand(hand, flexed(60.0))
    assert 0.9 < signed_volume(bent, hand.faces) / rest < 1.1
    plain = HandArrays(**{**vars(hand), "posedirs": np.zeros_like(hand.posedirs)})
    shift = np.linalg.norm(bent - pose_hand(plain, flexed(60.0)), axis=1)
    assert 0.3 < shift.max() < 5.0


def test_limits_contain_rest_and_the_rotations_are_proper() -> None:
    low, high = joint_limits()
    assert np.all(low <= 0)
    assert np.all(high >= 0)
    rotmat = angles_to_rotmat(np.stack([low, high]))
    np.testing.assert_allclose(rotmat @ rotmat.swapaxes(-1, -2), np.broadcast_to(np.eye(3), rotmat.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotmat), 1.0, atol=1e-12)


def test_another_process_builds_the_same_hand_without_torch(hand: HandArrays) -> None:
    code = (
        "import sys, hashlib; from src.hand.standin.build import build_standin_hand as build; h = build(); "
        "assert 'torch' not in sys.modules; "
        "print(hashlib.sha1(h.v_template.tobytes() + h.posedirs.tobytes() + h.shapedirs.tobytes()).hexdigest())"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    printed = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, check=True, capture_output=True, text=True
        ).stdout
        for _ in range(2)
    ]
    assert printed[0] == printed[1]
