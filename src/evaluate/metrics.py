"""Every metric of an evaluation for each sample of a batch: joints and vertices, in three frames of reference.

Shape legend: B batch, J = 21 joints, V vertices, T = 100 thresholds. mm unless said.

The frames are `cam` (as they stand in the camera), `rel` (prediction and target each about its own wrist) and `pa`
(the prediction moved onto the target by the best similarity). docs/EVALUATION.md lists the formulas and where they
come from. A metric that asks for what a sample lacks has count 0 there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from src.batch import Batch, Prediction
from src.hand.skeleton import MIDDLE_KNUCKLE, WRIST
from src.metric import (
    PCK_2D_THRESHOLDS,
    SampleMetric,
    align_procrustes,
    align_scale_translation,
    box_side,
    curve_auc,
    f_scores,
    pck_curve,
    point_distance,
    point_error,
    sum_valid,
)

FRAMES = {"cam": "camera", "rel": "root-relative", "pa": "Procrustes"}
F_THRESHOLDS_MM = (5.0, 15.0)
PCK_MM = 20.0
PCK_2D = {"pck05_2d": 0.05, "pck10_2d": 0.1, "pck15_2d": 0.15, "pck20_2d": 0.2}  # shares of the 2D box
_MIN_ALIGN_POINT = 3
_MIN_BOX_PX = 1.0


class _Pair(NamedTuple):
    """Prediction and target in one frame of reference."""

    pred: np.ndarray  # [B, N, 3]
    target: np.ndarray  # [B, N, 3]
    valid: np.ndarray  # [B, N] bool


def measure(prediction: Prediction, batch: Batch, target_vert: Any) -> dict[str, SampleMetric]:
    """The metrics of each sample.

    Args: prediction; batch; target_vert [B, V, 3] mm tensor: the hand model posed as the target, its wrist joint at the
    origin (anything where has_mano is 0).

    Returns, with `*` one of `cam`, `rel`, `pa`:
      mpjpe_*, pck20_*, auc_*   joints: mean distance, share within 20 mm, area under the PCK curve 0-50 mm
      joint_*, curve_*          the same joints one by one [B, J], and the PCK curve [B, T]
      mpjpe_st                  joints after HO-3D's alignment of scale and translation
      root_error                the wrist in the camera
      error_2d                  joints in px of the patch
      pck*_2d, auc_2d, curve_2d see measure_2d
      mpvpe_*, auc_vert_*, curve_vert_*, f5_*, f15_*   vertices: the same, and F-scores at 5 and 15 mm
    """
    pred, target = _array(prediction.joint_cam), _array(batch.joint_cam)
    valid = _array(batch.joint_3d_valid) > 0
    has_intr = _array(batch.has_intr)[:, None] > 0
    has_wrist = valid[:, WRIST : WRIST + 1]
    known = {"cam": valid & has_intr, "rel": valid & has_wrist, "pa": valid}
    joints = _frames(pred, target, pred[:, :1], target[:, :1], known)
    values = {}
    for name, pair in joints.items():
        values |= _joint_values(name, pair)
    values["mpjpe_st"] = _scale_translation_error(pred, target, valid)
    values["root_error"] = point_error(pred[:, :1], target[:, :1], has_wrist & has_intr)
    pixel = point_distance(_array(prediction.joint_patch), _array(batch.joint_patch))
    values["error_2d"] = sum_valid(pixel, _array(batch.joint_2d_valid))
    pred_img, target_img = (to_source_image(joints, batch) for joints in (prediction.joint_patch, batch.joint_patch))
    values |= measure_2d(pred_img, target_img, _array(batch.joint_2d_valid) > 0)

    has_mano = np.broadcast_to(_array(batch.has_mano)[:, None] > 0, target_vert.shape[:2])
    vert = _array(target_vert) + target[:, :1]
    known = {"cam": has_mano & has_intr & has_wrist, "rel": has_mano, "pa": has_mano}
    for name, pair in _frames(_array(prediction.vert_cam), vert, pred[:, :1], target[:, :1], known).items():
        values |= _vertex_values(name, pair)
    return values


def measure_2d(pred: np.ndarray, target: np.ndarray, valid: np.ndarray) -> dict[str, SampleMetric]:
    """PCK of the 2D joints, relative to the longer side of the tight box of the sample's valid target joints.

    A sample with fewer than two valid joints, or with all of them within one pixel, has no box and counts 0.

    Args: pred [B, J, 2] px of the source image; infinite or NaN is wrong at every threshold; target [B, J, 2];
    valid [B, J] bool.

    Returns: pck05_2d, pck10_2d, pck15_2d, pck20_2d: share of joints within 0.05, ... of the box; auc_2d, curve_2d: area
    under the PCK curve from 0 to 0.2 of the box, and the curve [B, T].
    """
    side = box_side(target, valid)
    has_box = (side >= _MIN_BOX_PX)[:, None]
    mask = valid & has_box
    distance = point_distance(pred, target) / np.where(has_box, side[:, None], 1.0)
    curve = pck_curve(distance, mask, PCK_2D_THRESHOLDS)
    values = {name: sum_valid(distance <= threshold, mask) for name, threshold in PCK_2D.items()}
    return values | {"auc_2d": curve_auc(curve, PCK_2D_THRESHOLDS), "curve_2d": curve}


def to_source_image(point: Any, batch: Batch) -> np.ndarray:
    """Points of the patch in the source image: mirrored back for left hands, infinite where behind its camera.

    Args: point [B, N, 2] px of the patch, tensor. Returns: [B, N, 2] px float64.
    """
    patch_to_image = np.linalg.inv(_array(batch.image_to_patch))
    moved = _array(point) @ patch_to_image[..., :2].swapaxes(1, 2) + patch_to_image[:, None, :, 2]
    in_front = moved[..., 2:] > 0
    return np.where(in_front, moved[..., :2] / np.where(in_front, moved[..., 2:], 1.0), np.inf)


def _frames(
    pred: np.ndarray, target: np.ndarray, pred_root: np.ndarray, target_root: np.ndarray, known: dict[str, np.ndarray]
) -> dict[str, _Pair]:
    """The points [B, N, 3] in each frame of FRAMES, and which of them are known there."""
    enough = known["pa"].sum(axis=1, keepdims=True) >= _MIN_ALIGN_POINT
    to_align = known["pa"] & enough
    return {
        "cam": _Pair(pred, target, known["cam"]),
        "rel": _Pair(pred - pred_root, target - target_root, known["rel"]),
        "pa": _Pair(align_procrustes(pred, target, to_align), target, to_align),
    }


def _joint_values(frame: str, pair: _Pair) -> dict[str, SampleMetric]:
    distance = point_distance(pair.pred, pair.target)
    mask, curve = pair.valid, pck_curve(distance, pair.valid)
    return {
        f"mpjpe_{frame}": sum_valid(distance, mask),
        f"pck20_{frame}": sum_valid(distance <= PCK_MM, mask),
        f"auc_{frame}": curve_auc(curve),
        f"joint_{frame}": SampleMetric(np.where(mask, distance, 0.0), mask.astype(np.float64)),
        f"curve_{frame}": curve,
    }


def _vertex_values(frame: str, pair: _Pair) -> dict[str, SampleMetric]:
    distance = point_distance(pair.pred, pair.target)
    curve = pck_curve(distance, pair.valid)
    values = {
        f"mpvpe_{frame}": sum_valid(distance, pair.valid),
        f"auc_vert_{frame}": curve_auc(curve),
        f"curve_vert_{frame}": curve,
    }
    scores = f_scores(pair.pred, pair.target, pair.valid.all(axis=1), F_THRESHOLDS_MM)
    return values | {f"f{threshold:.0f}_{frame}": score for threshold, score in zip(F_THRESHOLDS_MM, scores)}


def _scale_translation_error(pred: np.ndarray, target: np.ndarray, valid: np.ndarray) -> SampleMetric:
    has_bone = valid[:, [WRIST, MIDDLE_KNUCKLE]].all(axis=1, keepdims=True)
    return point_error(align_scale_translation(pred, target), target, valid & has_bone)


def _array(tensor: Any) -> np.ndarray:
    """A tensor as float64 array on the CPU."""
    return tensor.detach().cpu().double().numpy()
