"""The metrics against published evaluation procedures, worked out here point by point.

* FreiHAND, HO-3D: eval.py and utils/eval_util.py (EvalUtil) of github.com/lmb-freiburg/freihand and
  github.com/shreyashampali/ho3d, in metres. Errors and PCK of each keypoint over the images that show it, then their
  means over keypoints; 100 thresholds from 0 to 50 mm, the area by the trapezoidal rule over that of a perfect
  curve; `align_w_scale` from scipy's orthogonal Procrustes problem; F-scores from the nearest neighbours both ways.
* DexYCB: dex_ycb_toolkit/hpe_eval.py of github.com/NVlabs/dex-ycb-toolkit, EvalUtil again.
* InterHand2.6M: `evaluate` in data/InterHand2.6M/dataset.py of github.com/facebookresearch/InterHand2.6M.
* mmpose: `keypoint_epe` in mmpose/evaluation/functional/keypoint_eval.py of github.com/open-mmlab/mmpose.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from src.batch import Batch, Prediction
from src.metric import PCK_2D, SampleMetric, Samples, align_procrustes, align_scale_translation, measure
from tests.helpers import random_batch

NUM, NUM_VERTEX = 7, 90
HO3D_ORDER = [0, 5, 6, 7, 9, 10, 11, 17, 18, 19, 13, 14, 15, 1, 2, 3, 4, 8, 12, 16, 20]  # OpenPose's, in MANO's order


def align_w_scale(target: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Centred, scaled to unit Frobenius norm, turned by scipy's solution, scaled by the sum of singular values."""
    target_centre, pred_centre = target.mean(0), pred.mean(0)
    target_size, pred_size = (np.linalg.norm(x - c) for x, c in ((target, target_centre), (pred, pred_centre)))
    turn, gain = orthogonal_procrustes((target - target_centre) / target_size, (pred - pred_centre) / pred_size)
    return ((pred - pred_centre) / pred_size) @ turn.T * gain * target_size + target_centre


def align_sc_tr(target: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """HO-3D's: joints in its own order, whose number 4 is the middle finger's knuckle."""
    length = np.linalg.norm(target[4] - target[0]) / np.linalg.norm(pred[4] - pred[0])
    return (pred - pred[0]) * length + target[0]


def measures(pairs: list[tuple[np.ndarray, np.ndarray]], visible: np.ndarray | None = None) -> tuple[float, float]:
    """EvalUtil: (mean error in mm, AUC) of (target, prediction) in metres, keypoint by keypoint, without keypoints that
    are never visible. `visible` [S, N]; None: all."""
    error = np.array([np.linalg.norm(target - pred, axis=1) for target, pred in pairs])
    visible = np.ones(error.shape, bool) if visible is None else visible
    thresholds = np.linspace(0.0, 0.05, 100)
    area = np.trapezoid if hasattr(np, "trapezoid") else np.trapz
    aucs, means = [], []
    for keypoint in [column[seen] for column, seen in zip(error.T, visible.T) if seen.any()]:
        curve = np.array([np.mean(keypoint <= t) for t in thresholds])
        aucs.append(area(curve, thresholds) / area(np.ones_like(thresholds), thresholds))
        means.append(keypoint.mean())
    return 1000 * float(np.mean(means)), float(np.mean(aucs))


def f_score(target: np.ndarray, pred: np.ndarray, threshold: float) -> float:
    recall = (cKDTree(target).query(pred)[0] < threshold).mean()
    precision = (cKDTree(pred).query(target)[0] < threshold).mean()
    return 2 * recall * precision / (recall + precision) if recall + precision > 0 else 0.0


@pytest.fixture(scope="module")
def hands() -> tuple[Batch, Prediction, torch.Tensor]:
    """Hands with errors of about 15 mm, of various positions and sizes; vertices relative to the wrist."""
    rng = np.random.default_rng(3)
    batch = random_batch(NUM, 56)

    def noise(sigma: float, *shape: int) -> torch.Tensor:
        return torch.tensor(rng.normal(0, sigma, (NUM, *shape)), dtype=torch.float32)

    turn = torch.tensor(Rotation.from_rotvec(rng.normal(0, 0.1, (NUM, 3))).as_matrix(), dtype=torch.float32)
    vert, wrist = noise(40, NUM_VERTEX, 3), batch.joint_cam[:, :1]
    joint = (batch.joint_cam - wrist) @ turn * 1.1 + wrist + noise(9, 21, 3) + noise(12, 1, 3)
    prediction = Prediction(
        mano_rotmat=torch.eye(3).expand(NUM, 16, 3, 3),
        mano_pose=batch.mano_pose,
        mano_shape=batch.mano_shape,
        root_cam=joint[:, 0],
        joint_cam=joint,
        vert_cam=joint[:, :1] + vert @ turn * 0.98 + noise(7, NUM_VERTEX, 3),
        joint_patch=batch.joint_patch + torch.tensor([3.0, 4.0]),
        joint_seen=batch.joint_patch,
    )
    return batch, prediction, vert


def mean(metric: SampleMetric) -> float:
    return metric.total.sum() / metric.count.sum()


def pairs(pred: torch.Tensor, target: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """(target, prediction) of each sample in metres."""
    return [(t.double().numpy() / 1000, p.double().numpy() / 1000) for t, p in zip(target, pred, strict=True)]


def test_joints_and_vertices_as_in_freihand(hands):
    batch, prediction, vert = hands
    got = measure(prediction, batch, vert)
    target_vert = vert.double() + batch.joint_cam[:, :1].double()
    for pred, target, error, auc in (
        (prediction.joint_cam, batch.joint_cam, "mpjpe", "auc"),
        (prediction.vert_cam, target_vert, "mpvpe", "auc_vert"),
    ):
        official = pairs(pred, target)
        expected = {"cam": measures(official), "pa": measures([(t, align_w_scale(t, p)) for t, p in official])}
        for frame, values in expected.items():
            assert mean(got[f"{error}_{frame}"]) == pytest.approx(values[0], rel=1e-6), (error, frame)
            assert mean(got[f"{auc}_{frame}"]) == pytest.approx(values[1], rel=1e-6), (auc, frame)
            assert 0.05 < values[1] < 0.95, "an informative area"
    own = [(t - t[0], p - p[0]) for t, p in pairs(prediction.joint_cam, batch.joint_cam)]
    assert (mean(got["mpjpe_rel"]), mean(got["auc_rel"])) == pytest.approx(measures(own), rel=1e-6)


def test_f_scores_as_in_freihand(hands):
    batch, prediction, vert = hands
    got = measure(prediction, batch, vert)
    official = pairs(prediction.vert_cam, vert.double() + batch.joint_cam[:, :1].double())
    for name, threshold in (("f5", 0.005), ("f15", 0.015)):
        plain = np.mean([f_score(t, p, threshold) for t, p in official])
        aligned = np.mean([f_score(t, align_w_scale(t, p), threshold) for t, p in official])
        assert mean(got[f"{name}_cam"]) == pytest.approx(plain, rel=1e-6)
        assert mean(got[f"{name}_pa"]) == pytest.approx(aligned, rel=1e-6)
        assert 0 < aligned < 1


def test_scale_and_translation_as_in_ho3d(hands):
    batch, prediction, vert = hands
    got = measure(prediction, batch, vert)
    flip = np.array([1.0, -1.0, -1.0])  # OpenGL's camera
    official = [(t[HO3D_ORDER] * flip, p[HO3D_ORDER] * flip) for t, p in pairs(prediction.joint_cam, batch.joint_cam)]
    expected, _ = measures([(t, align_sc_tr(t, p)) for t, p in official])
    assert mean(got["mpjpe_st"]) == pytest.approx(expected, rel=1e-6)
    collapsed = np.zeros((1, 21, 3)) + 5.0  # a collapsed hand has no scale
    assert np.isfinite(align_scale_translation(collapsed, np.random.default_rng(0).normal(size=(1, 21, 3)))).all()


def test_a_mirrored_hand_is_not_turned_inside_out(hands):
    """The one difference: the official alignment may mirror the prediction; ours only rotates it."""
    target = hands[0].joint_cam[:1].double().numpy()
    mirrored = target * [-1.0, 1.0, 1.0]
    assert np.abs(align_w_scale(target[0], mirrored[0]) - target[0]).max() < 1e-9
    assert np.linalg.norm(align_procrustes(mirrored, target, np.ones((1, 21))) - target, axis=2).mean() > 10


def test_values_by_hand(hands):
    """Values that are simple to compute: the pixel offset, PCK at 20 mm, the error of each joint, the wrist."""
    batch, prediction, vert = hands
    got = measure(prediction, batch, vert)
    distance = (prediction.joint_cam - batch.joint_cam).double().norm(dim=2).numpy()
    assert mean(got["error_2d"]) == pytest.approx(5.0, abs=1e-4)
    assert mean(got["pck20_cam"]) == pytest.approx((distance <= 20).mean())
    np.testing.assert_allclose(got["joint_cam"].total, distance, rtol=1e-5)
    np.testing.assert_allclose(got["curve_cam"].total[:, -1], (distance <= 50).sum(axis=1))
    assert mean(got["root_error"]) == pytest.approx(distance[:, 0].mean(), rel=1e-6)
    assert mean(got["mpjpe_cam"]) == pytest.approx(distance.mean(), rel=1e-6)


def test_each_metric_needs_its_labels(hands):
    """Without its labels a metric has no valid point, whatever the values of the label arrays."""
    batch, prediction, vert = hands

    def known(**change: torch.Tensor) -> set[str]:
        values = measure(prediction, Batch(**{**vars(batch), **change}), torch.full_like(vert, torch.nan))
        assert all(np.isfinite(v.total[v.count > 0]).all() for v in values.values() if v.total.ndim == 1)
        return {name for name, value in values.items() if value.count.sum() > 0}

    none = torch.zeros(NUM)
    no_vertices = known(has_mano=none)
    assert not {name for name in no_vertices if "vert" in name or name.startswith(("mpvpe", "f5", "f15"))}
    assert {"mpjpe_cam", "mpjpe_rel", "mpjpe_pa", "mpjpe_st", "root_error", "error_2d"} <= no_vertices
    no_camera = known(has_mano=none, has_intr=none)
    assert not {name for name in no_camera if "_cam" in name} | ({"root_error"} & no_camera)
    only_2d = known(has_mano=none, joint_3d_valid=torch.zeros(NUM, 21))
    in_2d = {"error_2d", "auc_2d", "pck05_2d", "pck10_2d", "pck15_2d", "pck20_2d"}
    assert only_2d == {"curve_2d", *in_2d, *(f"{name}_joints" for name in in_2d)}
    no_wrist = torch.ones(NUM, 21)
    no_wrist[:, 0] = 0
    left = known(has_mano=none, joint_3d_valid=no_wrist)
    assert {"mpjpe_cam", "mpjpe_pa"} <= left
    assert not {"mpjpe_rel", "mpjpe_st", "root_error", "auc_rel"} & left


# ---- missing joints --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def incomplete(hands: tuple[Batch, Prediction, torch.Tensor]) -> tuple[Batch, Prediction, torch.Tensor]:
    """15 % of the joints are missing, unevenly; one hand has only its wrist, one lacks it; joint 20 is never known."""
    batch, prediction, vert = hands
    rng = np.random.default_rng(5)
    valid = torch.tensor(rng.random((NUM, 21)) > 0.15).float()
    valid[:, 0], valid[:, 20] = 1, 0
    valid[2, 1:], valid[4, 0] = 0, 0
    shift = torch.tensor(rng.normal(0, 2, (NUM, 21, 2)), dtype=torch.float32)
    prediction = Prediction(**{**vars(prediction), "joint_patch": batch.joint_patch + shift})
    flags = {"joint_3d_valid": valid, "joint_2d_valid": valid}
    return Batch(**{**vars(batch), **flags, "position": torch.arange(NUM)}), prediction, vert


@pytest.fixture(scope="module")
def incomplete_means(incomplete: tuple[Batch, Prediction, torch.Tensor]) -> dict[str, float]:
    batch, prediction, vert = incomplete
    return Samples.of_batch(batch, measure(prediction, batch, vert)).means()


def aligned_pairs(batch: Batch, prediction: Prediction, frame: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The pairs in metres after the official alignment, from the valid joints where it depends on them."""
    found = []
    for (target, pred), valid in zip(pairs(prediction.joint_cam, batch.joint_cam), batch.joint_3d_valid.numpy() > 0):
        if frame == "rel":
            target, pred = target - target[0], pred - pred[0]
        elif frame == "pa" and valid.sum() >= 3:
            pred = pred.copy()
            pred[valid] = align_w_scale(target[valid], pred[valid])
        elif frame == "st":
            pred = align_sc_tr(target[HO3D_ORDER], pred[HO3D_ORDER])[np.argsort(HO3D_ORDER)]
        found.append((target, pred))
    return found


@pytest.mark.parametrize("frame", ["cam", "rel", "pa", "st"])
def test_missing_joints_as_in_evalutil(incomplete, incomplete_means, frame):
    """EvalUtil skips invisible keypoints; a hand that the alignment cannot measure is not fed to it."""
    batch, prediction, _ = incomplete
    valid = batch.joint_3d_valid.numpy() > 0
    needed = {"cam": [], "rel": [0], "pa": [], "st": [0, 9]}[frame]
    usable = valid[:, needed].all(axis=1) & (valid.sum(axis=1) >= {"cam": 1, "rel": 2, "pa": 3, "st": 3}[frame])
    assert 0 < usable.sum() <= NUM
    error, auc = measures(aligned_pairs(batch, prediction, frame), valid & usable[:, None])
    assert incomplete_means[f"mpjpe_{frame}_joints"] == pytest.approx(error, rel=1e-6)
    assert abs(incomplete_means[f"mpjpe_{frame}"] - error) > 0.01, "the mean over points is another number"
    if frame != "st":
        assert incomplete_means[f"auc_{frame}_joints"] == pytest.approx(auc, rel=1e-6)


def test_missing_joints_as_in_interhand(incomplete, incomplete_means):
    """`evaluate` of InterHand2.6M: a hand without root has no valid joint; a lone root is measured, which leaves the
    root's mean 0. Joint by joint, then the mean over joints."""
    batch, prediction, _ = incomplete
    valid = batch.joint_3d_valid.numpy().copy()
    valid *= valid[:, :1]
    mpjpe = [[] for _ in range(21)]
    for (target, pred), joint_valid in zip(pairs(prediction.joint_cam, batch.joint_cam), valid):
        target, pred = target - target[0], pred - pred[0]
        for j in range(21):
            if joint_valid[j]:
                mpjpe[j].append(np.sqrt(np.sum((pred[j] - target[j]) ** 2)))
    assert (len(mpjpe[0]), len(mpjpe[20])) == (NUM - 1, 0)
    official = 1000 * np.mean([np.mean(np.stack(errors)) for errors in mpjpe if errors])
    assert incomplete_means["mpjpe_rel_joints"] == pytest.approx(official, rel=1e-6)


def test_missing_joints_as_in_mmpose(incomplete, incomplete_means):
    """`keypoint_epe` pools all valid points of all hands: our mean over points."""
    batch, prediction, _ = incomplete
    valid = batch.joint_3d_valid.numpy() > 0
    distance = (prediction.joint_cam - batch.joint_cam).double().norm(dim=2).numpy()
    assert incomplete_means["mpjpe_cam"] == pytest.approx(distance[valid].mean(), rel=1e-6)


def test_missing_joints_as_in_hamers_pck(incomplete, incomplete_means):
    """`keypoint_pck_accuracy` of HaMeR's EvaluatorPCK: the mean of each keypoint's fraction; here only of keypoints
    with a label, as its division by zero gives NaN."""
    batch, prediction, _ = incomplete
    target, pred = batch.joint_patch.double().numpy(), prediction.joint_patch.double().numpy()
    valid = batch.joint_2d_valid.numpy() > 0
    valid[2] = False  # a single joint has no box
    side = np.array([np.ptp(t[v], axis=0).max() if v.any() else 1.0 for t, v in zip(target, valid)])
    for name, threshold in PCK_2D.items():
        correct = (np.linalg.norm(pred - target, axis=2) <= side[:, None] * threshold) & valid
        pck = correct.sum(axis=0)[:20] / valid.sum(axis=0)[:20]
        assert incomplete_means[f"{name}_joints"] == pytest.approx(pck.mean(), rel=1e-6)
        assert incomplete_means[name] == pytest.approx(correct.sum() / valid.sum(), rel=1e-6)


def test_complete_hands_have_one_mean(hands):
    batch, prediction, vert = hands
    means = Samples.of_batch(batch, measure(prediction, batch, vert)).means()
    names = [name for name in means if name.endswith("_joints")]
    assert len(names) == 16
    for name in names:
        assert means[name] == pytest.approx(means[name.removesuffix("_joints")], rel=1e-12), name
