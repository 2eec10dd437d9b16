"""Hand pose metrics in mm, sample by sample, and the accumulator that turns them into numbers nobody can shake.

Shape legend: B batch, N points (21 joints or V vertices), T thresholds.

Everything here is numpy float64 on the CPU, one sample independent of the others in its batch. A metric of a sample is
a pair (sum, count); the accumulator keeps the pairs by position in the data order, drops padding and duplicates, adds
with math.fsum (exactly rounded, so in any order) and divides once. Given equal network outputs the result is equal to
the last bit for any batch size, number of workers or of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from src.batch import Batch, Prediction
from src.hand.skeleton import MIDDLE_KNUCKLE, WRIST

PCK_THRESHOLDS_MM = np.linspace(0.0, 50.0, 100)  # FreiHAND's evaluation: 0-50 mm, 100 thresholds
PCK_2D_THRESHOLDS = np.linspace(0.0, 0.2, 100)  # of the longer side of the hand's 2D box
_MIN_ALIGN_POINT = 3  # fewer points do not fix a similarity transform


class SampleMetric(NamedTuple):
    """One metric of each sample of a batch; the mean over samples is sum(total) / sum(count)."""

    total: np.ndarray  # [B] float64
    count: np.ndarray  # [B] float64; 0 where the sample has no valid point


def point_distance(pred: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Euclidean distances. Args: pred, target [..., 3] mm. Returns: [...] mm."""
    return np.sqrt(np.square(pred - target).sum(axis=-1))


def box_side(point: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Longer side of the tight box around each sample's valid points; 0 where fewer than two are valid.

    Args: point [B, N, 2]; valid [B, N] 0 or 1. Returns: [B], in the unit of point.
    """
    mask = (valid > 0)[..., None]
    extent = np.where(mask, point, -np.inf).max(axis=1) - np.where(mask, point, np.inf).min(axis=1)
    return np.maximum(extent.max(axis=1), 0.0)  # -inf without a valid point


def sum_valid(value: np.ndarray, valid: np.ndarray) -> SampleMetric:
    """Sum over a sample's valid points; what invalid points hold, NaN included, does not matter.

    Args: value [B, N]; valid [B, N] 0 or 1.
    """
    mask = valid > 0
    return SampleMetric(np.where(mask, value, 0.0).sum(axis=1), mask.sum(axis=1).astype(np.float64))


def point_error(pred: np.ndarray, target: np.ndarray, valid: np.ndarray) -> SampleMetric:
    """Summed distance of a sample's valid points (MPJPE, MPVPE). Args: pred, target [B, N, 3] mm; valid [B, N]."""
    return sum_valid(point_distance(pred, target), valid)


def align_procrustes(pred: np.ndarray, target: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """`pred` moved onto `target` by the best similarity transform (rotation, scale, translation; no reflection) in the
    least-squares sense over valid points: Umeyama, "Least-squares estimation of transformation parameters", 1991.

    Args: pred, target [B, N, 3]; valid [B, N]. Returns: [B, N, 3], all points transformed; NaN for a sample whose valid
    points hold NaN or infinity. A prediction collapsed into one point is only translated.
    """
    weight = (valid > 0)[..., None].astype(np.float64)
    pred_valid, target_valid = np.where(weight > 0, pred, 0.0), np.where(weight > 0, target, 0.0)
    finite = np.isfinite(pred_valid).all(axis=(1, 2)) & np.isfinite(target_valid).all(axis=(1, 2))
    keep = finite[:, None, None]
    pred_valid, target_valid = np.where(keep, pred_valid, 0.0), np.where(keep, target_valid, 0.0)

    count = np.maximum(weight.sum(axis=1, keepdims=True), 1.0)
    pred_mean = pred_valid.sum(axis=1, keepdims=True) / count
    target_mean = target_valid.sum(axis=1, keepdims=True) / count
    pred_centred = (pred_valid - pred_mean) * weight
    target_centred = (target_valid - target_mean) * weight

    covariance = np.swapaxes(target_centred, 1, 2) @ pred_centred
    left, singular, right = np.linalg.svd(covariance)
    sign = np.ones_like(singular)
    sign[:, 2] = np.where(np.linalg.det(left) * np.linalg.det(right) < 0, -1.0, 1.0)
    rotation = (left * sign[:, None, :]) @ right
    variance = np.square(pred_centred).sum(axis=(1, 2))
    scale = np.where(variance > 0, (singular * sign).sum(axis=1) / np.where(variance > 0, variance, 1.0), 1.0)
    with np.errstate(invalid="ignore"):
        aligned = scale[:, None, None] * (pred - pred_mean) @ np.swapaxes(rotation, 1, 2) + target_mean
    return np.where(keep, aligned, np.nan)


def procrustes_error(pred: np.ndarray, target: np.ndarray, valid: np.ndarray) -> SampleMetric:
    """`point_error` after `align_procrustes` (PA-MPJPE, PA-MPVPE); samples with fewer than 3 valid points count 0."""
    enough = (valid > 0).sum(axis=1, keepdims=True) >= _MIN_ALIGN_POINT
    usable = (valid > 0) & enough
    return point_error(align_procrustes(pred, target, usable), target, usable)


def align_scale_translation(pred: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`pred` scaled about its wrist until the bone from wrist to middle knuckle is as long as the target's, and moved
    onto the target's wrist: HO-3D's `scale and translation` alignment (its eval.py, joints 0 and 4 of MANO's order).

    Args: pred, target [B, 21, 3], both ends of that bone known. Returns: [B, 21, 3].
    """

    def bone(joint: np.ndarray) -> np.ndarray:
        return point_distance(joint[:, MIDDLE_KNUCKLE], joint[:, WRIST])[:, None, None]

    length = bone(pred)
    scale = np.where(length > 0, bone(target) / np.where(length > 0, length, 1.0), 1.0)
    return scale * (pred - pred[:, WRIST : WRIST + 1]) + target[:, WRIST : WRIST + 1]


def pck_curve(distance: np.ndarray, valid: np.ndarray, thresholds: np.ndarray = PCK_THRESHOLDS_MM) -> SampleMetric:
    """Number of a sample's valid points within each threshold; the curve is sum(total) / sum(count).

    Args: distance, valid [B, N]; thresholds [T] in the same unit. Returns: SampleMetric(total [B, T], count [B]).
    """
    mask = valid > 0
    first = np.searchsorted(thresholds, distance)  # the first threshold that the distance is within
    slot = np.where(mask, first, len(thresholds)) + (len(thresholds) + 1) * np.arange(len(distance))[:, None]
    count = np.bincount(slot.ravel(), minlength=len(distance) * (len(thresholds) + 1)).reshape(len(distance), -1)
    return SampleMetric(np.cumsum(count[:, :-1], axis=1).astype(np.float64), mask.sum(axis=1).astype(np.float64))


def pck_auc(distance: np.ndarray, valid: np.ndarray, thresholds: np.ndarray = PCK_THRESHOLDS_MM) -> SampleMetric:
    """Area under the PCK curve by the trapezoidal rule, between 0 and 1 (FreiHAND's `auc`).

    Args: distance, valid [B, N]; thresholds [T] mm, increasing. Returns: SampleMetric in units of points.
    """
    return curve_auc(pck_curve(distance, valid, thresholds), thresholds)


def curve_auc(curve: SampleMetric, thresholds: np.ndarray = PCK_THRESHOLDS_MM) -> SampleMetric:
    """`pck_auc` of what `pck_curve` gave."""
    width = np.diff(thresholds)
    area = (0.5 * (curve.total[:, 1:] + curve.total[:, :-1]) * width).sum(axis=1) / width.sum()
    return SampleMetric(area, curve.count)


def f_scores(
    pred: np.ndarray, target: np.ndarray, sample_valid: np.ndarray, thresholds: Sequence[float]
) -> list[SampleMetric]:
    """Harmonic mean of precision and recall of a surface at each distance (Knapitsch et al., "Tanks and Temples",
    2017), on vertices as FreiHAND does: a vertex is right when the nearest of the other mesh is nearer than that.

    Args: pred, target [B, V, 3] mm; sample_valid [B]; thresholds in mm. Returns: scores of 0..1, one per valid sample.
    """
    usable = sample_valid > 0
    score = np.zeros((len(thresholds), len(pred)))
    for i in np.flatnonzero(usable):
        to_target, to_pred = _nearest_squared(pred[i], target[i])
        for k, threshold in enumerate(thresholds):
            precision = (to_target < threshold**2).mean()
            recall = (to_pred < threshold**2).mean()
            score[k, i] = 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
    return [SampleMetric(row, usable.astype(np.float64)) for row in score]


def _nearest_squared(pred: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[V, 3], [W, 3] -> squared distance of each point to the nearest of the other set, [V] and [W].

    |a - b|^2 = |a|^2 + |b|^2 - 2 a b is one matrix product; about the target's centre it is exact to 1e-9 mm^2.
    """
    centre = target.mean(axis=0)
    pred, target = pred - centre, target - centre
    left = np.column_stack((pred, np.square(pred).sum(axis=1), np.ones(len(pred))))
    right = np.column_stack((-2.0 * target, np.ones(len(target)), np.square(target).sum(axis=1)))
    pair = left @ right.T
    return pair.min(axis=1), pair.min(axis=0)


def _array(tensor: Any) -> np.ndarray:
    """A tensor as float64 array on the CPU."""
    return tensor.detach().cpu().double().numpy()


def evaluate_batch(prediction: Prediction, batch: Batch, target_vert: Any) -> dict[str, SampleMetric]:
    """The validation's metrics of each sample of a batch, mm.

    Args: prediction; batch; target_vert [B, V, 3] mm tensor: vertices of the hand model for the target's pose and
    shape, the wrist joint at the origin (anything where has_mano is 0).

    Returns, with the samples each counts:
      mpjpe_cam   joints in the camera frame; has_intr and the joint valid
      mpjpe_rel   joints against the wrist (all 21, the wrist itself among them); the joint and the wrist valid
      mpjpe_pa    joints after Procrustes alignment with scale; at least 3 joints valid
      mpvpe_rel   vertices against the wrist; has_mano
      root_error  the wrist in the camera frame; has_intr and the wrist valid
    """
    pred_joint, target_joint = _array(prediction.joint_cam), _array(batch.joint_cam)
    valid = _array(batch.joint_3d_valid) > 0
    has_intr = _array(batch.has_intr)[:, None] > 0
    has_mano = _array(batch.has_mano)[:, None] > 0
    pred_root, target_root = pred_joint[:, :1], target_joint[:, :1]
    pred_vert, vert = _array(prediction.vert_cam), _array(target_vert)
    vert_valid = np.broadcast_to(has_mano, vert.shape[:2])
    root_valid = valid[:, WRIST : WRIST + 1]
    return {
        "mpjpe_cam": point_error(pred_joint, target_joint, valid & has_intr),
        "mpjpe_rel": point_error(pred_joint - pred_root, target_joint - target_root, valid & root_valid),
        "mpjpe_pa": procrustes_error(pred_joint, target_joint, valid),
        "mpvpe_rel": point_error(pred_vert - pred_root, vert, vert_valid),
        "root_error": point_error(pred_root, target_root, root_valid & has_intr),
    }


class MetricAccumulator:
    """Gathers per-sample metrics of a validation, over batches and processes, and averages them."""

    def __init__(self) -> None:
        # data set -> metric -> chunks of rows (position, total, count); float64 holds positions exactly up to 2^53
        self._rows: dict[str, dict[str, list[np.ndarray]]] = {}

    def update(self, position: np.ndarray, source: Sequence[str], values: dict[str, SampleMetric]) -> None:
        """Add a batch.

        Args: position [B] int, the sample's place in the data order, negative for padding; source: B names of data
        sets; values: metric name -> SampleMetric of the batch.
        """
        position, names = np.asarray(position), np.asarray(source, dtype=object)
        for name in sorted(set(source)):
            chosen = (position >= 0) & (names == name)
            if chosen.any():
                rows = {key: np.column_stack((position, *value))[chosen] for key, value in values.items()}
                self.merge({name: rows})

    def merge(self, state: dict[str, dict[str, np.ndarray]]) -> None:
        """Add what another accumulator gathered (its `state()`)."""
        for source, metrics in state.items():
            for name, rows in metrics.items():
                self._rows.setdefault(source, {}).setdefault(name, []).append(rows)

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """Data set -> metric -> rows [S, 3] (position, total, count): what a process hands to the others."""
        return {source: {name: _unique_rows(r) for name, r in m.items()} for source, m in self._rows.items()}

    def sources(self) -> list[str]:
        """Names of the data sets seen, sorted."""
        return sorted(self._rows)

    def compute(self, source: str | None = None) -> dict[str, float]:
        """Mean of each metric, over all samples or those of one data set; a metric without a valid point is absent."""
        gathered: dict[str, list[np.ndarray]] = {}
        for key, metrics in self._rows.items():
            for name, rows in metrics.items() if source in (None, key) else ():
                gathered.setdefault(name, []).extend(rows)
        result = {}
        for name in sorted(gathered):
            _, total, count = _unique_rows(gathered[name]).T.tolist()
            if math.fsum(count) > 0:
                result[name] = math.fsum(total) / math.fsum(count)
        return result


def _unique_rows(chunks: list[np.ndarray]) -> np.ndarray:
    """One row per position, sorted; of several the smallest stays, so that the order of arrival does not matter."""
    rows = np.concatenate(chunks)
    rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
    first = np.ones(len(rows), dtype=bool)
    first[1:] = rows[1:, 0] != rows[:-1, 0]
    return rows[first]
