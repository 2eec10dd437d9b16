"""Hand pose metrics: the one table of them, for validation and script/evaluate.py, and the per-sample results.

Shape legend: B batch, S samples, N points (21 joints or V vertices), J = 21 joints, T = 100 thresholds, K columns of a
metric (1, J or T). Lengths are mm unless stated otherwise.

* `target_points` decides what a prediction is compared with and which points of which samples count. A hand of which an
  alignment leaves nothing to measure does not count: its error would be 0 for any prediction.
* `METRICS` lists every metric: the points it compares and how it reduces their distances.
* `Samples` holds one (sum, count) pair per sample and metric. A mean is sum / count over all samples: the mean over all
  points. `<metric>_joints` has a pair per joint; its mean is the mean over joints of each joint's sum / count, which
  differs where joints are missing.

Everything here is numpy float64 on the CPU, one sample independent of the others in its batch. Sums over samples use
math.fsum (exactly rounded, so independent of the order). Given equal network outputs, a result is bit-identical for any
batch size, number of workers or number of processes.

The frames of reference are `cam` (camera coordinates), `rel` (prediction and target relative to their own wrists) and
`pa` (prediction aligned to the target by the best similarity transform). docs/EVALUATION.md lists formulas and sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from src.batch import Batch, Prediction
from src.geometry.points import align_procrustes, box_side, nearest_squared
from src.hand.skeleton import MIDDLE_KNUCKLE, WRIST

FRAMES = {"cam": "camera", "rel": "root-relative", "pa": "Procrustes"}
PCK_THRESHOLDS_MM = np.linspace(0.0, 50.0, 100)  # FreiHAND's evaluation: 0-50 mm, 100 thresholds
PCK_2D_THRESHOLDS = np.linspace(0.0, 0.2, 100)  # fractions of the longer side of the hand's 2D box
PCK_MM = 20.0
PCK_2D = {"pck05_2d": 0.05, "pck10_2d": 0.1, "pck15_2d": 0.15, "pck20_2d": 0.2}  # fractions of the 2D box
F_THRESHOLDS_MM = (5.0, 15.0)
OVER_JOINTS = "_joints"  # suffix of a metric that is averaged joint by joint
ALIGNED_JOINTS = {"rel": (WRIST,)}  # frame -> joints whose error is 0 by definition
_MIN_ALIGN_POINT = 3  # fewer points do not determine a similarity transform
_MIN_ALIGN_MM = 1.0  # points closer together are one point: scaling a prediction to it leaves no error
_MIN_BOX_PX = 1.0


class SampleMetric(NamedTuple):
    """One metric of each sample; the mean over samples is sum(total) / sum(count)."""

    total: np.ndarray  # [B] or [B, K] float64
    count: np.ndarray  # [B] or [B, K] float64; 0 where the sample has no valid point


class Target(NamedTuple):
    """What a prediction is compared with, in one frame of reference."""

    point: np.ndarray  # [B, N, 2 or 3]
    valid: np.ndarray  # [B, N] bool: the points that count
    unit: np.ndarray | float = 1.0  # [B, 1]: distances are divided by it
    thresholds: np.ndarray = PCK_THRESHOLDS_MM  # [T] of the PCK curve, in this unit


def target_points(batch: Batch, target_vert: Any) -> dict[str, Target]:
    """The targets by name of `Metric.points`. This is the one place that decides which samples and points count.

    Args: batch; target_vert [B, V, 3] mm tensor: vertices of the hand model for the target's pose and shape, the wrist
    joint at the origin (arbitrary where has_mano is 0).
    """
    joint, vert = _array(batch.joint_cam), _array(target_vert)
    root = joint[:, :1]
    valid, valid_2d = _array(batch.joint_3d_valid) > 0, _array(batch.joint_2d_valid) > 0
    has_intr = _array(batch.has_intr)[:, None] > 0
    has_wrist = valid[:, [WRIST]]
    has_mano = np.broadcast_to(_array(batch.has_mano)[:, None] > 0, vert.shape[:2])
    return {
        "joint_cam": Target(joint, valid & has_intr),
        "joint_rel": Target(joint - root, valid & _knows_more_than(valid, [WRIST])),
        "joint_pa": alignment_target(joint, valid),
        "joint_st": Target(joint, valid & _has_bone(joint) & _knows_more_than(valid, [WRIST, MIDDLE_KNUCKLE])),
        "root": Target(root, has_wrist & has_intr),
        "joint_patch": Target(_array(batch.joint_patch), valid_2d),
        "joint_2d": box_target(to_source_image(batch.joint_patch, batch), valid_2d),
        "vert_cam": Target(vert + root, has_mano & has_intr & has_wrist),
        "vert_rel": Target(vert, has_mano),
        "vert_pa": alignment_target(vert + root, has_mano),
    }


def _knows_more_than(valid: np.ndarray, aligned: list[int]) -> np.ndarray:
    """Whether the joints that define an alignment are valid, and another one beside them: [B, J] -> [B, 1]."""
    return valid[:, aligned].all(axis=1, keepdims=True) & (valid.sum(axis=1, keepdims=True) > len(aligned))


def _has_bone(joint: np.ndarray) -> np.ndarray:
    """Whether the bone from wrist to middle knuckle has a length to scale to: [B, J, 3] mm -> [B, 1]."""
    bone = joint[:, MIDDLE_KNUCKLE] - joint[:, WRIST]
    return np.linalg.norm(bone, axis=-1, keepdims=True) >= _MIN_ALIGN_MM


def alignment_target(point: np.ndarray, valid: np.ndarray) -> Target:
    """The target of a Procrustes alignment.

    A sample with fewer than three valid points, or with all of them within one millimetre, does not count.

    Args: point [B, N, 3] mm; valid [B, N] bool.
    """
    has_shape = (valid.sum(axis=1) >= _MIN_ALIGN_POINT) & (box_side(point, valid) >= _MIN_ALIGN_MM)
    return Target(point, valid & has_shape[:, None])


def box_target(point: np.ndarray, valid: np.ndarray) -> Target:
    """The target of 2D PCK: distances are relative to the longer side of the tight box of the sample's valid points.

    A sample with fewer than two valid points, or with all of them within one pixel, has no box and does not count.

    Args: point [B, J, 2] px of the source image; valid [B, J] bool.
    """
    side = box_side(point, valid)[:, None]
    has_box = side >= _MIN_BOX_PX
    return Target(point, valid & has_box, np.where(has_box, side, 1.0), PCK_2D_THRESHOLDS)


def predicted_points(prediction: Prediction, batch: Batch, target: dict[str, Target]) -> dict[str, np.ndarray]:
    """The predicted points [B, N, 2 or 3] in the frames of the targets, by the same names."""
    joint, vert = _array(prediction.joint_cam), _array(prediction.vert_cam)
    root = joint[:, :1]
    return {
        "joint_cam": joint,
        "joint_rel": joint - root,
        "joint_pa": align_procrustes(joint, *target["joint_pa"][:2]),
        "joint_st": align_scale_translation(joint, target["joint_st"].point),
        "root": root,
        "joint_patch": _array(prediction.joint_patch),
        "joint_2d": to_source_image(prediction.joint_patch, batch),
        "vert_cam": vert,
        "vert_rel": vert - root,
        "vert_pa": align_procrustes(vert, *target["vert_pa"][:2]),
    }


def to_source_image(point: Any, batch: Batch) -> np.ndarray:
    """Map points of the patch to the source image: mirrored back for left hands, infinite if behind its camera.

    Args: point [B, N, 2] px of the patch, tensor. Returns: [B, N, 2] px float64.
    """
    patch_to_image = np.linalg.inv(_array(batch.image_to_patch))
    moved = _array(point) @ patch_to_image[..., :2].swapaxes(1, 2) + patch_to_image[:, None, :, 2]
    in_front = moved[..., 2:] > 0
    return np.where(in_front, moved[..., :2] / np.where(in_front, moved[..., 2:], 1.0), np.inf)


class PointErrors:
    """Predicted points [B, N, 2 or 3] against a Target. Intermediate results that metrics share are computed once."""

    def __init__(self, pred: np.ndarray, target: Target) -> None:
        self.pred, self.target = pred, target

    @cached_property
    def distance(self) -> np.ndarray:
        """[B, N] in the target's unit."""
        return np.linalg.norm(self.pred - self.target.point, axis=-1) / self.target.unit

    @cached_property
    def _steps(self) -> np.ndarray:
        """[B, N, T] whether a point is valid and within each threshold."""
        return (self.distance[..., None] <= self.target.thresholds) & self.target.valid[..., None]

    @cached_property
    def curve(self) -> SampleMetric:
        """The number of valid points within each threshold; the PCK curve is sum(total) / sum(count)."""
        return SampleMetric(*(part.sum(axis=1).astype(np.float64) for part in (self._steps, self.target.valid)))

    @cached_property
    def f_scores(self) -> list[SampleMetric]:
        """F-scores at F_THRESHOLDS_MM of the samples whose points are all valid."""
        return f_scores(self.pred, self.target.point, self.target.valid.all(axis=1), F_THRESHOLDS_MM)

    def each(self) -> SampleMetric:
        """The distances point by point, [B, N]; those of invalid points, NaN included, are ignored."""
        valid = self.target.valid
        return SampleMetric(np.where(valid, self.distance, 0.0), valid.astype(np.float64))

    def mean(self) -> SampleMetric:
        """Mean distance (MPJPE, MPVPE)."""
        return SampleMetric(*(part.sum(axis=1) for part in self.each()))

    def each_share(self, threshold: float) -> SampleMetric:
        """Whether each point is within a distance, [B, N]. An infinite or NaN distance is never within it."""
        valid = self.target.valid
        return SampleMetric(((self.distance <= threshold) & valid).astype(np.float64), valid.astype(np.float64))

    def share(self, threshold: float) -> SampleMetric:
        """Fraction of points within a distance (PCK)."""
        return SampleMetric(*(part.sum(axis=1) for part in self.each_share(threshold)))

    def each_auc(self) -> SampleMetric:
        """Area under the PCK curve of each point, [B, N]: a step from 0 to 1 at its distance."""
        return SampleMetric(self._area(self._steps.astype(np.float64)), self.target.valid.astype(np.float64))

    def auc(self) -> SampleMetric:
        """Area under the PCK curve by the trapezoidal rule, between 0 and 1 (FreiHAND's `auc`)."""
        return SampleMetric(self._area(self.curve.total), self.curve.count)

    def _area(self, curve: np.ndarray) -> np.ndarray:
        """Area under curves [..., T] over that of a curve that is 1 everywhere."""
        width = np.diff(self.target.thresholds)
        return (0.5 * (curve[..., 1:] + curve[..., :-1]) * width).sum(axis=-1) / width.sum()


_Value = Callable[[PointErrors], SampleMetric]


class Metric(NamedTuple):
    """A row of the table of metrics."""

    points: str  # the compared points: a key of `target_points`
    value: _Value
    label: str = ""  # row in the tables of an evaluation; "": not shown there
    unit: str = ""  # "mm", "px", "%" (a fraction, shown in %), or "" for a score between 0 and 1
    frame: str = "cam"  # column in the tables: a key of FRAMES


def _averages(
    name: str, points: str, pooled: _Value, each: _Value, label: str, unit: str = "", frame: str = "cam"
) -> dict[str, Metric]:
    """A metric of joints as the mean over all points and, as `<name>_joints`, as the mean over joints.

    Args: pooled: a value [B] per sample; each: a value [B, J] per joint.
    """
    return {
        name: Metric(points, pooled, label, unit, frame),
        name + OVER_JOINTS: Metric(points, each, label, unit, frame),
    }


def _mean_distance(name: str, points: str, *shown: str) -> dict[str, Metric]:
    return _averages(name, points, PointErrors.mean, PointErrors.each, *shown)


def _share(name: str, points: str, threshold: float, *shown: str) -> dict[str, Metric]:
    pooled, each = (partial(method, threshold=threshold) for method in (PointErrors.share, PointErrors.each_share))
    return _averages(name, points, pooled, each, *shown)


def _auc(name: str, points: str, *shown: str) -> dict[str, Metric]:
    return _averages(name, points, PointErrors.auc, PointErrors.each_auc, *shown)


def _joint_metrics(frame: str) -> dict[str, Metric]:
    points = f"joint_{frame}"
    return {
        **_mean_distance(f"mpjpe_{frame}", points, "MPJPE", "mm", frame),
        **_share(f"pck20_{frame}", points, PCK_MM, f"PCK at {PCK_MM:.0f} mm", "%", frame),
        **_auc(f"auc_{frame}", points, "AUC 0-50 mm", "", frame),
        f"joint_{frame}": Metric(points, PointErrors.each),
        f"curve_{frame}": Metric(points, lambda e: e.curve),
    }


def _vertex_metrics(frame: str) -> dict[str, Metric]:
    points = f"vert_{frame}"
    return {
        f"mpvpe_{frame}": Metric(points, PointErrors.mean, "MPVPE", "mm", frame),
        f"auc_vert_{frame}": Metric(points, PointErrors.auc, "AUC of vertices", "", frame),
        f"curve_vert_{frame}": Metric(points, lambda e: e.curve),
        f"f5_{frame}": Metric(points, lambda e: e.f_scores[0], "F@5 mm", "", frame),
        f"f15_{frame}": Metric(points, lambda e: e.f_scores[1], "F@15 mm", "", frame),
    }


METRICS: dict[str, Metric] = {
    **{name: metric for frame in FRAMES for name, metric in _joint_metrics(frame).items()},
    **_mean_distance("mpjpe_st", "joint_st", "MPJPE scale-translation", "mm", "rel"),
    "root_error": Metric("root", PointErrors.mean, "root error", "mm"),
    **_mean_distance("error_2d", "joint_patch", "2D error of the patch", "px"),
    **{
        key: metric
        for name, share in PCK_2D.items()
        for key, metric in _share(name, "joint_2d", share, f"2D PCK at {share:g} box", "%").items()
    },
    **_auc("auc_2d", "joint_2d", "2D AUC 0-0.2 box"),
    "curve_2d": Metric("joint_2d", lambda e: e.curve),
    **{name: metric for frame in FRAMES for name, metric in _vertex_metrics(frame).items()},
}
UNITS = {name: metric.unit for name, metric in METRICS.items() if metric.label}


def measure(
    prediction: Prediction, batch: Batch, target_vert: Any, names: Iterable[str] = tuple(METRICS)
) -> dict[str, SampleMetric]:
    """The metrics `names` of each sample of a batch; `target_vert` as in `target_points`."""
    target = target_points(batch, target_vert)
    return compare(predicted_points(prediction, batch, target), target, names)


def compare(
    pred: dict[str, np.ndarray], target: dict[str, Target], names: Iterable[str] = tuple(METRICS)
) -> dict[str, SampleMetric]:
    """The metrics `names` of predicted points; metrics whose points are not in `pred` are omitted."""
    errors = {points: PointErrors(pred[points], target[points]) for points in pred}
    return {name: METRICS[name].value(errors[METRICS[name].points]) for name in names if METRICS[name].points in errors}


def align_scale_translation(pred: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Scale `pred` so that its bone from wrist to middle knuckle is as long as the target's, and translate its wrist to
    the target's: HO-3D's `scale and translation` alignment (its eval.py, joints 0 and 4 of MANO's order).

    Args: pred, target [B, 21, 3], both ends of that bone valid. Returns: [B, 21, 3].
    """

    def bone(joint: np.ndarray) -> np.ndarray:
        return np.linalg.norm(joint[:, MIDDLE_KNUCKLE] - joint[:, WRIST], axis=-1)[:, None, None]

    length = bone(pred)
    scale = np.where(length > 0, bone(target) / np.where(length > 0, length, 1.0), 1.0)
    return scale * (pred - pred[:, WRIST : WRIST + 1]) + target[:, WRIST : WRIST + 1]


def f_scores(
    pred: np.ndarray, target: np.ndarray, sample_valid: np.ndarray, thresholds: Sequence[float]
) -> list[SampleMetric]:
    """Harmonic mean of precision and recall of a surface at each distance (Knapitsch et al., "Tanks and Temples",
    2017), on vertices as FreiHAND does: a vertex is correct if the nearest vertex of the other mesh is within the
    distance.

    Args: pred, target [B, V, 3] mm; sample_valid [B]; thresholds in mm. Returns: for each threshold a score between 0
    and 1 per valid sample.
    """
    usable = sample_valid > 0
    score = np.zeros((len(thresholds), len(pred)))
    for i in np.flatnonzero(usable):
        to_target, to_pred = nearest_squared(pred[i], target[i])
        for k, threshold in enumerate(thresholds):
            precision = (to_target < threshold**2).mean()
            recall = (to_pred < threshold**2).mean()
            score[k, i] = 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
    return [SampleMetric(row, usable.astype(np.float64)) for row in score]


def _array(tensor: Any) -> np.ndarray:
    """The tensor as a float64 array on the CPU."""
    return tensor.detach().cpu().double().numpy()


@dataclass(frozen=True)
class Samples:
    """The results of many samples, one row per sample."""

    position: np.ndarray  # [S] int: place in the data order
    key: np.ndarray  # [S] str
    source: np.ndarray  # [S] str: data set
    is_right: np.ndarray  # [S] bool
    metric: dict[str, SampleMetric]  # name -> totals [S, K], counts [S, K] or [S, 1]
    joint_cam: np.ndarray | None = None  # [S, J, 3] mm in the camera of the source image, original side; optional
    vert_cam: np.ndarray | None = None  # [S, V, 3]

    def __len__(self) -> int:
        return len(self.position)

    @classmethod
    def of_batch(cls, batch: Batch, values: dict[str, SampleMetric], **hands: np.ndarray) -> Samples:
        """The samples of a batch without its padding; `hands`: joint_cam and vert_cam."""
        position = batch.position.cpu().numpy()

        def columns(value: np.ndarray) -> np.ndarray:
            value = value.reshape(len(position), -1)
            with np.errstate(over="ignore"):
                narrow = value.astype(np.float32)  # numbers of points, most of the memory, lose nothing
            return narrow if np.array_equal(narrow, value) else value

        samples = cls(
            position=position,
            key=np.array(batch.key, dtype=object),
            source=np.array(batch.source, dtype=object),
            is_right=batch.is_right.cpu().numpy(),
            metric={name: SampleMetric(columns(v.total), columns(v.count)) for name, v in values.items()},
            **hands,
        )
        return samples.select(position >= 0)

    @classmethod
    def join(cls, parts: Sequence[Samples]) -> Samples:
        """All samples sorted by position. Of duplicates the smallest row is kept, whatever the order of `parts`."""
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name, value in vars(parts[0]).items()
            if isinstance(value, np.ndarray)
        }
        metric = {
            name: SampleMetric(*(np.concatenate(column) for column in zip(*(part.metric[name] for part in parts))))
            for name in parts[0].metric
        }
        joined = cls(metric=metric, **columns)
        if (np.diff(joined.position) > 0).all():
            return joined
        order = np.lexsort((*(column[:, 0] for value in metric.values() for column in value), joined.position))
        return joined.select(order[np.unique(joined.position[order], return_index=True)[1]])

    def select(self, rows: np.ndarray) -> Samples:
        """The samples given by an index or a mask."""
        columns = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        metric = {name: SampleMetric(total[rows], count[rows]) for name, (total, count) in self.metric.items()}
        return replace(self, metric=metric, **columns)

    def means(self) -> dict[str, float]:
        """The mean of each metric, sorted by name; a metric without a valid point is absent."""
        known = {name: self.metric[name] for name in sorted(self.metric) if self.metric[name].count.any()}
        return {name: mean(*value) for name, value in known.items()}


def mean(total: np.ndarray, count: np.ndarray) -> float:
    """sum / count of a column [S, 1]; of several columns [S, J] the mean over those with a count, as in FreiHAND's
    EvalUtil and InterHand2.6M's evaluate. Sums are exactly rounded; the count must not be 0 everywhere."""
    known = [column for column in range(count.shape[1]) if count[:, column].any()]
    means = [math.fsum(total[:, column].tolist()) / math.fsum(count[:, column].tolist()) for column in known]
    return math.fsum(means) / len(means)
