"""Metrics against values worked out by hand or by other means, and the accumulator's promise of one number."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from src.batch import Batch, Prediction
from src.metric import (
    PCK_THRESHOLDS_MM,
    MetricAccumulator,
    SampleMetric,
    align_procrustes,
    evaluate_batch,
    f_scores,
    pck_auc,
    pck_curve,
    point_distance,
    point_error,
    procrustes_error,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_point_error_counts_valid_points_only():
    target = np.zeros((2, 3, 3))
    pred = np.array([[[3, 4, 0], [0, 0, 7], [np.nan] * 3], [[1, 0, 0]] * 3], dtype=float)
    total, count = point_error(pred, target, np.array([[1, 1, 0], [0, 0, 0]]))
    assert total.tolist() == [12.0, 0.0]
    assert count.tolist() == [2.0, 0.0]


def _best_similarity_by_search(pred, target):
    """The least squared error over similarity transforms, found by a general optimiser from several starts."""

    def cost(x):
        moved = math.exp(x[3]) * Rotation.from_rotvec(x[:3]).apply(pred) + x[4:]
        return np.square(moved - target).sum()

    starts = [np.concatenate((r, [0.0, 0, 0, 0])) for r in np.vstack((np.zeros(3), np.eye(3) * 2.0, -np.eye(3) * 2.0))]
    best = min((minimize(cost, s, method="BFGS", options={"gtol": 1e-9}) for s in starts), key=lambda r: r.fun).x
    return math.exp(best[3]) * Rotation.from_rotvec(best[:3]).apply(pred) + best[4:]


@pytest.mark.parametrize("mirror", [False, True])
def test_procrustes_finds_the_best_similarity(mirror, rng):
    """The mirrored hand is where an alignment that allows reflections would cheat to zero."""
    target = rng.normal(0, 1, (1, 8, 3))
    turned = Rotation.from_rotvec([0.3, -1.0, 0.4]).apply(target[0])
    pred = (0.4 * turned + rng.normal(0, 0.1, (8, 3)) + [5.0, -3.0, 2.0])[None] * ([-1, 1, 1] if mirror else 1)
    aligned = align_procrustes(pred, target, np.ones((1, 8)))
    np.testing.assert_allclose(aligned[0], _best_similarity_by_search(pred[0], target[0]), atol=1e-4)
    if mirror:
        assert point_distance(aligned, target).mean() > 0.3


def test_procrustes_ignores_invalid_points_and_undoes_a_similarity(rng):
    target = rng.normal(0, 50, (3, 21, 3))
    pred = 2.5 * np.einsum("ij,bnj->bni", Rotation.from_rotvec([1.0, 2.0, 0.5]).as_matrix(), target) + 100.0
    valid = np.ones((3, 21))
    pred[0, 5], valid[0, 5] = np.nan, 0  # an invalid point may hold anything
    target[1, 7], valid[1, 7] = 1e9, 0
    valid[2, 2:] = 0  # two points fix no similarity
    total, count = procrustes_error(pred, target, valid)
    np.testing.assert_allclose(total[:2], 0.0, atol=1e-9)
    assert count.tolist() == [20.0, 20.0, 0.0]
    assert total[2] == 0.0


def test_procrustes_of_broken_predictions(rng):
    target = rng.normal(0, 50, (2, 21, 3))
    pred = np.stack((np.full((21, 3), 3.0), np.where(np.arange(21)[:, None] == 4, np.inf, target[1])))
    total, count = procrustes_error(pred, target, np.ones((2, 21)))
    centred = target[0] - target[0].mean(axis=0)  # a hand in one point can only be moved to the centre
    assert total[0] == pytest.approx(np.linalg.norm(centred, axis=1).sum())
    assert np.isnan(total[1])  # a prediction that is not finite shows in the mean
    assert count.tolist() == [21.0, 21.0]


def test_pck_and_auc_as_freihand_counts_them(rng):
    distance = rng.uniform(0, 70, (6, 21))
    valid = rng.random((6, 21)) < 0.8
    curve, auc = pck_curve(distance, valid), pck_auc(distance, valid)
    flat = distance[valid]
    expected = np.array([(flat <= t).mean() for t in PCK_THRESHOLDS_MM])
    np.testing.assert_allclose(curve.total.sum(axis=0) / curve.count.sum(), expected)
    area = sum((a + b) / 2 for a, b in pairwise(expected)) / 99
    assert auc.total.sum() / auc.count.sum() == pytest.approx(area)
    assert (len(PCK_THRESHOLDS_MM), PCK_THRESHOLDS_MM[0], PCK_THRESHOLDS_MM[-1]) == (100, 0.0, 50.0)
    perfect = pck_auc(np.zeros((1, 21)), np.ones((1, 21)))
    assert perfect.total[0] / perfect.count[0] == pytest.approx(1.0)


def test_f_score_by_nearest_neighbours(rng):
    target = rng.uniform(0, 60, (3, 80, 3))
    pred = target[:, :70] + rng.normal(0, 4, (3, 70, 3))
    pred[2] += 1e4
    thresholds = (5.0, 15.0)
    for threshold, (score, count) in zip(thresholds, f_scores(pred, target, np.array([1, 0, 1]), thresholds)):
        precision = (cKDTree(target[0]).query(pred[0])[0] < threshold).mean()
        recall = (cKDTree(pred[0]).query(target[0])[0] < threshold).mean()
        assert score[0] == pytest.approx(2 * precision * recall / (precision + recall))
        assert 0 < score[0] <= 1
        assert score[1:].tolist() == [0.0, 0.0]
        assert count.tolist() == [1.0, 0.0, 1.0]


def _batch_and_prediction(size: int, num_vertex: int = 30) -> tuple[Batch, Prediction, torch.Tensor]:
    """A random target and prediction, with float32 values as in training."""
    rng = np.random.default_rng(11)

    def normal(*shape):
        return torch.tensor(rng.normal(0, 40, (size, *shape)), dtype=torch.float32)

    joint, zero = normal(21, 3) + 500, torch.zeros(size)
    batch = Batch(
        key=[str(i) for i in range(size)],
        source=["a" if i % 2 else "b" for i in range(size)],
        position=torch.arange(size),
        is_right=torch.ones(size, dtype=torch.bool),
        patch=torch.zeros(size, 3, 4, 4, dtype=torch.uint8),
        patch_focal=torch.ones(size, 2),
        patch_princpt=torch.ones(size, 2),
        cam_rot=torch.eye(3).expand(size, 3, 3),
        image_to_patch=torch.eye(3).expand(size, 3, 3),
        joint_patch=torch.zeros(size, 21, 2),
        joint_2d_valid=torch.ones(size, 21),
        joint_cam=joint,
        joint_3d_valid=torch.ones(size, 21),
        mano_pose=torch.zeros(size, 48),
        mano_shape=torch.zeros(size, 10),
        has_mano=torch.ones(size),
        flat_hand_mean=zero.bool(),
        has_intr=torch.ones(size),
    )
    pred_joint = joint + normal(21, 3) / 4
    prediction = Prediction(
        mano_rotmat=torch.eye(3).expand(size, 16, 3, 3),
        mano_pose=torch.zeros(size, 48),
        mano_shape=torch.zeros(size, 10),
        root_cam=pred_joint[:, 0],
        joint_cam=pred_joint,
        vert_cam=pred_joint[:, :1] + normal(num_vertex, 3),
        joint_patch=torch.zeros(size, 21, 2),
        joint_seen=torch.zeros(size, 21, 2),
    )
    return batch, prediction, normal(num_vertex, 3)


def _means(batch, prediction, vert):
    accumulator = MetricAccumulator()
    accumulator.update(batch.position.numpy(), batch.source, evaluate_batch(prediction, batch, vert))
    return accumulator.compute()


def test_a_shift_of_the_whole_hand_is_a_root_error_alone():
    batch, prediction, vert = _batch_and_prediction(4)
    shift = torch.tensor([0.0, 3.0, 4.0])
    prediction.joint_cam = batch.joint_cam + shift
    prediction.vert_cam = vert + prediction.joint_cam[:, :1]
    got = _means(batch, prediction, vert)
    assert got["mpjpe_cam"] == pytest.approx(5.0, abs=1e-3)
    assert got["root_error"] == pytest.approx(5.0, abs=1e-3)
    for name in ("mpjpe_rel", "mpjpe_pa", "mpvpe_rel"):
        assert got[name] == pytest.approx(0.0, abs=1e-3), name


def test_each_metric_asks_for_its_own_flag():
    batch, prediction, vert = _batch_and_prediction(1)
    everything = {"mpjpe_cam", "mpjpe_rel", "mpjpe_pa", "mpvpe_rel", "root_error"}
    assert set(_means(batch, prediction, vert)) == everything
    batch.has_intr = torch.zeros(1)
    assert set(_means(batch, prediction, vert)) == everything - {"mpjpe_cam", "root_error"}
    batch.has_mano = torch.zeros(1)
    assert set(_means(batch, prediction, torch.full_like(vert, torch.nan))) == {"mpjpe_rel", "mpjpe_pa"}
    batch.has_intr = torch.ones(1)
    batch.joint_3d_valid[:, 0] = 0  # no wrist: nothing to be relative to
    assert set(_means(batch, prediction, vert)) == {"mpjpe_cam", "mpjpe_pa"}
    batch.joint_3d_valid[:] = 0
    assert _means(batch, prediction, vert) == {}


def test_one_number_for_any_split_order_padding_and_duplicates(rng):
    batch, prediction, vert = _batch_and_prediction(23)
    batch.joint_3d_valid = torch.tensor(rng.random((23, 21)) < 0.8).float()
    expected = _means(batch, prediction, vert)

    def part(obj, rows):
        return type(obj)(**{k: _rows(v, rows) for k, v in vars(obj).items()})

    def _rows(value, rows):
        if isinstance(value, torch.Tensor):
            return value[rows]
        return [value[i] for i in rows] if isinstance(value, list) else value

    for size in (1, 2, 5, 23):
        order = rng.permutation(23)
        rank = [MetricAccumulator(), MetricAccumulator()]
        for i, start in enumerate(range(0, 23, size)):
            rows = np.concatenate((order[start : start + size], order[:2]))  # two that come with every batch
            piece = part(batch, rows)
            values = evaluate_batch(part(prediction, rows), piece, vert[rows])
            rank[i % 2].update(piece.position.numpy(), piece.source, values)
            garbage = {name: SampleMetric(np.array([np.nan]), np.array([21.0])) for name in values}
            rank[i % 2].update(np.array([-1]), ["a"], garbage)
        rank[1].merge(rank[0].state())
        assert rank[1].compute() == expected  # to the last bit
    both = rank[1].state()
    assert rank[1].sources() == ["a", "b"]
    count = {s: both[s]["mpjpe_cam"][:, 2].sum() for s in "ab"}
    mixed = sum(rank[1].compute(s)["mpjpe_cam"] * count[s] for s in "ab") / sum(count.values())
    assert mixed == pytest.approx(expected["mpjpe_cam"])
    assert MetricAccumulator().compute() == {}
