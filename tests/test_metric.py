"""Metrics against values computed by hand or by other means, and means that do not depend on how samples are split."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from src.batch import Batch, Prediction
from src.hand.skeleton import MIDDLE_KNUCKLE
from src.metric import (
    METRICS,
    PCK_THRESHOLDS_MM,
    SampleMetric,
    Samples,
    Target,
    align_procrustes,
    alignment_target,
    compare,
    f_scores,
    measure,
)
from src.train.validation import VALIDATED


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def metric_of(name, points, pred, target):
    """(total, count) of one metric of points [B, N, 3]."""
    return compare({points: pred}, {points: target}, [name])[name]


def procrustes_error(pred, target, valid):
    aligned = alignment_target(target, valid > 0)
    return metric_of("mpjpe_pa", "joint_pa", align_procrustes(pred, aligned.point, aligned.valid), aligned)


def test_mean_distance_counts_valid_points_only():
    target = np.zeros((2, 3, 3))
    pred = np.array([[[3, 4, 0], [0, 0, 7], [np.nan] * 3], [[1, 0, 0]] * 3], dtype=float)
    valid = np.array([[1, 1, 0], [0, 0, 0]]) > 0
    total, count = metric_of("mpjpe_cam", "joint_cam", pred, Target(target, valid))
    assert total.tolist() == [12.0, 0.0]
    assert count.tolist() == [2.0, 0.0]


def _best_similarity_by_search(pred, target):
    """The least-squares similarity transform, found by a general optimiser from several starts."""

    def cost(x):
        moved = math.exp(x[3]) * Rotation.from_rotvec(x[:3]).apply(pred) + x[4:]
        return np.square(moved - target).sum()

    starts = [np.concatenate((r, [0.0, 0, 0, 0])) for r in np.vstack((np.zeros(3), np.eye(3) * 2.0, -np.eye(3) * 2.0))]
    best = min((minimize(cost, s, method="BFGS", options={"gtol": 1e-9}) for s in starts), key=lambda r: r.fun).x
    return math.exp(best[3]) * Rotation.from_rotvec(best[:3]).apply(pred) + best[4:]


@pytest.mark.parametrize("mirror", [False, True])
def test_procrustes_finds_the_best_similarity(mirror, rng):
    """With the mirrored hand, an alignment that allows reflections would reach zero."""
    target = rng.normal(0, 1, (1, 8, 3))
    turned = Rotation.from_rotvec([0.3, -1.0, 0.4]).apply(target[0])
    pred = (0.4 * turned + rng.normal(0, 0.1, (8, 3)) + [5.0, -3.0, 2.0])[None] * ([-1, 1, 1] if mirror else 1)
    aligned = align_procrustes(pred, target, np.ones((1, 8)))
    np.testing.assert_allclose(aligned[0], _best_similarity_by_search(pred[0], target[0]), atol=1e-4)
    if mirror:
        assert np.linalg.norm(aligned - target, axis=-1).mean() > 0.3


def test_procrustes_ignores_invalid_points_and_undoes_a_similarity(rng):
    target = rng.normal(0, 50, (3, 21, 3))
    pred = 2.5 * np.einsum("ij,bnj->bni", Rotation.from_rotvec([1.0, 2.0, 0.5]).as_matrix(), target) + 100.0
    valid = np.ones((3, 21))
    pred[0, 5], valid[0, 5] = np.nan, 0  # invalid points may have any value
    target[1, 7], valid[1, 7] = 1e9, 0
    valid[2, 2:] = 0  # two points do not determine a similarity
    total, count = procrustes_error(pred, target, valid)
    np.testing.assert_allclose(total[:2], 0.0, atol=1e-9)
    assert count.tolist() == [20.0, 20.0, 0.0]
    assert total[2] == 0.0


def test_procrustes_of_collapsed_and_infinite_predictions(rng):
    target = rng.normal(0, 50, (2, 21, 3))
    pred = np.stack((np.full((21, 3), 3.0), np.where(np.arange(21)[:, None] == 4, np.inf, target[1])))
    total, count = procrustes_error(pred, target, np.ones((2, 21)))
    centred = target[0] - target[0].mean(axis=0)  # a collapsed hand can only be translated to the centre
    assert total[0] == pytest.approx(np.linalg.norm(centred, axis=1).sum())
    assert np.isnan(total[1])  # an infinite prediction must not be hidden
    assert count.tolist() == [21.0, 21.0]


def test_pck_and_auc_as_in_freihand(rng):
    distance = rng.uniform(0, 70, (6, 21))
    valid = rng.random((6, 21)) < 0.8
    pred = distance[..., None] * [1.0, 0.0, 0.0]
    target = Target(np.zeros((6, 21, 3)), valid)
    curve, auc = (metric_of(f"{name}_cam", "joint_cam", pred, target) for name in ("curve", "auc"))
    flat = distance[valid]
    expected = np.array([(flat <= t).mean() for t in PCK_THRESHOLDS_MM])
    np.testing.assert_allclose(curve.total.sum(axis=0) / curve.count.sum(), expected)
    area = sum((a + b) / 2 for a, b in pairwise(expected)) / 99
    assert auc.total.sum() / auc.count.sum() == pytest.approx(area)
    assert (len(PCK_THRESHOLDS_MM), PCK_THRESHOLDS_MM[0], PCK_THRESHOLDS_MM[-1]) == (100, 0.0, 50.0)
    perfect = metric_of("auc_cam", "joint_cam", target.point, target)
    assert perfect.total.sum() / perfect.count.sum() == pytest.approx(1.0)


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


def _samples(batch, prediction, vert, names=tuple(METRICS)):
    return Samples.of_batch(batch, measure(prediction, batch, vert, names))


def _means(batch, prediction, vert, names=tuple(METRICS)):
    return _samples(batch, prediction, vert, names).means()


def test_a_translated_hand_has_only_a_root_error():
    batch, prediction, vert = _batch_and_prediction(4)
    shift = torch.tensor([0.0, 3.0, 4.0])
    prediction.joint_cam = batch.joint_cam + shift
    prediction.vert_cam = vert + prediction.joint_cam[:, :1]
    got = _means(batch, prediction, vert)
    assert got["mpjpe_cam"] == pytest.approx(5.0, abs=1e-3)
    assert got["root_error"] == pytest.approx(5.0, abs=1e-3)
    for name in ("mpjpe_rel", "mpjpe_pa", "mpvpe_rel"):
        assert got[name] == pytest.approx(0.0, abs=1e-3), name


def test_each_metric_needs_its_own_labels():
    batch, prediction, vert = _batch_and_prediction(1)
    everything = {"mpjpe_cam", "mpjpe_rel", "mpjpe_pa", "mpvpe_rel", "root_error"}
    assert set(_means(batch, prediction, vert, VALIDATED)) == everything
    batch.has_intr = torch.zeros(1)
    assert set(_means(batch, prediction, vert, VALIDATED)) == everything - {"mpjpe_cam", "root_error"}
    batch.has_mano = torch.zeros(1)
    assert set(_means(batch, prediction, torch.full_like(vert, torch.nan), VALIDATED)) == {"mpjpe_rel", "mpjpe_pa"}
    batch.has_intr = torch.ones(1)
    batch.joint_3d_valid[:, 0] = 0  # no wrist: no root-relative metric
    assert set(_means(batch, prediction, vert, VALIDATED)) == {"mpjpe_cam", "mpjpe_pa"}
    batch.joint_3d_valid[:] = 0
    assert _means(batch, prediction, vert, VALIDATED) == {}


def _known_frames(batch, prediction, vert):
    """The alignments in which some hand counts; all metrics of an alignment agree."""
    values = measure(prediction, batch, vert)
    known = {}
    for name, metric in METRICS.items():
        known.setdefault(metric.points, set()).add(bool(values[name].count.any()))
    assert all(len(answers) == 1 for answers in known.values()), known
    return {points.removeprefix("joint_") for points, answers in known.items() if True in answers}


@pytest.mark.parametrize(
    ("joints", "frames"),
    [
        ([], set()),
        ([0], {"cam", "root"}),  # HO-3D's evaluation set
        ([4], {"cam"}),
        ([0, 4], {"cam", "rel", "root"}),
        ([0, MIDDLE_KNUCKLE], {"cam", "rel", "root"}),  # scaling and translation leave the direction of this bone alone
        ([0, 4, MIDDLE_KNUCKLE], {"cam", "rel", "pa", "st", "root"}),
        ([0, 4, 8], {"cam", "rel", "pa", "root"}),
        ([4, 8], {"cam"}),
        ([4, 8, MIDDLE_KNUCKLE], {"cam", "pa"}),
    ],
)
def test_an_alignment_needs_joints_beside_those_that_it_fixes(joints, frames):
    batch, prediction, vert = _batch_and_prediction(2)
    batch.has_mano[:] = 0
    batch.joint_2d_valid[:] = 0
    batch.joint_3d_valid[:] = 0
    batch.joint_3d_valid[0, joints] = 1
    assert _known_frames(batch, prediction, vert) == frames


def test_a_hand_of_the_wrist_alone_changes_no_other_hands_numbers():
    batch, prediction, vert = _batch_and_prediction(6)
    batch.joint_3d_valid[3:, 1:] = 0
    whole = Samples.of_batch(batch, measure(prediction, batch, vert))
    values, full = whole.means(), whole.select(np.arange(6) < 3).means()
    names = [name for name, metric in METRICS.items() if metric.points in ("joint_rel", "joint_pa", "joint_st")]
    assert len(names) > 15
    assert {name: values[name] for name in names} == {name: full[name] for name in names}
    assert whole.metric["mpjpe_rel"].count.sum() == 3 * 21, "the wrist counts beside other joints, as everywhere"


@pytest.mark.parametrize("size", [0.0, 0.9])
def test_joints_in_one_place_have_no_shape_to_align(size, rng):
    """The best scale is 0 or nearly so, and any prediction would be right."""
    batch, prediction, vert = _batch_and_prediction(1)
    batch.joint_cam = (500 + size * torch.tensor(rng.uniform(0, 0.5, (1, 21, 3)))).float()
    assert {"pa", "st"}.isdisjoint(_known_frames(batch, prediction, vert))
    batch.joint_cam[0, :, 0] += 10 * torch.arange(21)  # on a line: its error does not depend on the turn around it
    assert {"pa", "st"} <= _known_frames(batch, prediction, vert)


def test_collinear_joints_have_one_best_alignment(rng):
    target = (np.arange(5.0) ** 2)[None, :, None] * np.array([3.0, 4.0, 12.0])
    pred = rng.normal(0, 20, (1, 5, 3))
    total, count = procrustes_error(pred, target, np.ones((1, 5)))
    found = _best_similarity_by_search(pred[0], target[0])
    assert total[0] == pytest.approx(np.linalg.norm(found - target[0], axis=1).sum(), rel=1e-3)
    assert count.tolist() == [5.0]


def test_a_2d_box_needs_two_joints_apart():
    batch, prediction, vert = _batch_and_prediction(2)
    for name in ("has_mano", "joint_2d_valid", "joint_3d_valid"):
        getattr(batch, name)[:] = 0
    batch.joint_2d_valid[0, 4] = 1
    assert _known_frames(batch, prediction, vert) == {"patch"}
    batch.joint_2d_valid[0, 5] = 1
    assert _known_frames(batch, prediction, vert) == {"patch"}, "both at one pixel"
    batch.joint_patch[0, 5] = 7.0
    assert _known_frames(batch, prediction, vert) == {"patch", "2d"}


def test_means_over_points_and_over_joints_by_hand():
    """Joint 0 is off by 3 and 5 mm, joint 1 by 16 mm in the one hand that has it, joint 2 is never known."""
    distance = np.array([[3.0, 16.0, np.nan], [5.0, np.nan, np.nan]])
    target = Target(np.zeros((2, 3, 3)), np.array([[1, 1, 0], [1, 0, 0]]) > 0)
    values = compare({"joint_cam": distance[..., None] * [1.0, 0, 0]}, {"joint_cam": target})
    batch, *_ = _batch_and_prediction(2)
    means = Samples.of_batch(batch, values).means()
    assert means["mpjpe_cam"] == 24 / 3
    assert means["mpjpe_cam_joints"] == (4 + 16) / 2
    assert means["pck20_cam"] == means["pck20_cam_joints"] == 1.0
    area = {d: sum((a + b) / 2 for a, b in pairwise(1.0 * (d <= PCK_THRESHOLDS_MM))) / 99 for d in (3.0, 5.0, 16.0)}
    assert means["auc_cam"] == pytest.approx(sum(area.values()) / 3)
    assert means["auc_cam_joints"] == pytest.approx(((area[3.0] + area[5.0]) / 2 + area[16.0]) / 2)


def test_means_do_not_depend_on_split_order_padding_or_duplicates(rng):
    batch, prediction, vert = _batch_and_prediction(23)
    batch.joint_3d_valid = torch.tensor(rng.random((23, 21)) < 0.8).float()
    expected = _means(batch, prediction, vert)
    assert expected["mpjpe_rel_joints"] != expected["mpjpe_rel"]

    def part(obj, rows):
        return type(obj)(**{k: _rows(v, rows) for k, v in vars(obj).items()})

    def _rows(value, rows):
        if isinstance(value, torch.Tensor):
            return value[rows]
        return [value[i] for i in rows] if isinstance(value, list) else value

    for size in (1, 2, 5, 23):
        order = rng.permutation(23)
        parts = []
        for start in range(0, 23, size):
            rows = np.concatenate((order[start : start + size], order[:2]))  # two samples that are in every batch
            piece = part(batch, rows)
            parts.append(_samples(piece, part(prediction, rows), vert[rows]))
            padding = part(batch, [0])
            padding.position = torch.tensor([-1])
            garbage = {
                name: SampleMetric(np.full_like(total[:1], np.nan), np.full_like(count[:1], 21.0))
                for name, (total, count) in parts[-1].metric.items()
            }
            parts.append(Samples.of_batch(padding, garbage))
        joined = Samples.join([Samples.join(parts[1::2]), Samples.join(parts[::2])])
        assert joined.position.tolist() == list(range(23))
        assert joined.means() == expected  # to the last bit
    assert set(joined.source) == {"a", "b"}
    by_source = [joined.select(joined.source == source) for source in "ab"]
    count = [samples.metric["mpjpe_cam"].count.sum() for samples in by_source]
    mixed = sum(samples.means()["mpjpe_cam"] * c for samples, c in zip(by_source, count)) / sum(count)
    assert mixed == pytest.approx(expected["mpjpe_cam"])


def test_of_unequal_duplicates_the_smallest_is_kept():
    batch, *_ = _batch_and_prediction(1)
    parts = [Samples.of_batch(batch, {"a": SampleMetric(np.array([v]), np.ones(1))}) for v in (2.0, 1.0, 3.0)]
    assert Samples.join(parts).means() == Samples.join(parts[::-1]).means() == {"a": 1.0}
    assert Samples.join(parts[:1]).select(np.array([False])).means() == {}
