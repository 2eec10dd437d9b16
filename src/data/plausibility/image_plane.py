"""2D joints, boxes and images, and hands that are all the same. Shape legend: N hands, J = 21 joints."""

from __future__ import annotations

import numpy as np

from src.data.plausibility.hands import Hands
from src.data.plausibility.verdict import Verdict, extent, longer_side, verdict

_MIN_JOINT = 5
_MIN_EQUAL = 8
_MISSING_PX = (0.0, -1.0)  # both coordinates of a joint that a data set does not know


def _share_inside(hands: Hands, box: np.ndarray, margin: float) -> np.ndarray:
    """[N] share of the known 2D joints in the box [N, 4], grown by `margin` of its size on each side."""
    grow = margin * np.abs(box[:, 2:] - box[:, :2])
    joint, valid = hands.joint_img, hands.joint_2d_valid
    inside = ((joint >= (box[:, :2] - grow)[:, None]) & (joint <= (box[:, 2:] + grow)[:, None])).all(axis=-1)
    return (inside & valid).sum(axis=1) / np.maximum(valid.sum(axis=1), 1)


def judge_box(hands: Hands) -> Verdict:
    """Whether boxes contain the 2D joints."""
    box = hands.hand_bbox
    checked = hands.joint_2d_valid.sum(axis=1) >= _MIN_JOINT
    share = _share_inside(hands, box, 0.25)
    as_xywh = np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1)
    tight = extent(hands.joint_img, hands.joint_2d_valid)
    is_xywh = (_overlap(as_xywh, tight) > 0.8) & (_overlap(box, tight) < 0.6) & (hands.joint_2d_valid.sum(axis=1) > 10)
    result = verdict(checked, (share < 0.7) | is_xywh, 100 * share)
    result.cause[result.bad & is_xywh] = "hand_bbox looks like x, y, width, height: it must be x1, y1, x2, y2"
    moved = tight + np.tile(box[:, :2], 2)
    in_crop = result.bad & ~is_xywh & (_overlap(moved, box) > 0.6)
    result.cause[in_crop] = "joint_img looks relative to the box: add its corner"
    return result


def _overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[N] intersection over union of boxes [N, 4]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        side = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
        shared = np.where((side > 0).all(axis=1), side.prod(axis=1), 0.0)
        total = (one[:, 2:] - one[:, :2]).prod(axis=1) + (other[:, 2:] - other[:, :2]).prod(axis=1) - shared
        return np.nan_to_num(shared / total)


def judge_pixels(hands: Hands) -> Verdict:
    """Whether 2D joints span more than a few pixels."""
    valid = hands.joint_2d_valid
    size = longer_side(extent(hands.joint_img, valid))
    result = verdict(valid.sum(axis=1) >= _MIN_JOINT, size < 4, size)
    small = (np.abs(hands.joint_img) <= 1.5) | ~valid[..., None]
    result.cause[result.bad & small.all(axis=(1, 2))] = "joint_img looks normalised: it must be in px"
    return result


def judge_missing(hands: Hands) -> Verdict:
    """Whether joints are flagged as known although they have the values of unknown ones."""
    at = [(hands.joint_img == value).all(axis=-1) & hands.joint_2d_valid for value in _MISSING_PX]
    at.append((hands.joint_cam == 0).all(axis=-1) & hands.joint_3d_valid)
    number = np.sum(at, axis=2).max(axis=0)
    # a single one may be the corner of a tight crop, or the origin of joints that are relative to it
    return verdict(hands.joint_2d_valid.any(axis=1) | hands.joint_3d_valid.any(axis=1), number > 1, number)


def judge_image(hands: Hands) -> Verdict:
    """Whether most 2D joints are inside the image."""
    known = hands.image_size[:, 0] > 0
    box = np.concatenate([np.zeros((len(hands), 2)), hands.image_size], axis=1)
    share = _share_inside(hands, box, 0.02)
    return verdict(known & (hands.joint_2d_valid.sum(axis=1) >= _MIN_JOINT), share < 0.25, 100 * share)


def judge_equal(hands: Hands) -> Verdict:
    """Whether all hands are the same hand."""
    label = np.concatenate([hands.joint_img.reshape(len(hands), -1), hands.joint_cam.reshape(len(hands), -1)], axis=1)
    known = hands.joint_2d_valid.any(axis=1) | hands.joint_3d_valid.any(axis=1)
    equal = np.zeros(len(hands), bool)
    for source in np.unique(hands.source):
        rows = np.flatnonzero((hands.source == source) & known)
        if len(rows) >= _MIN_EQUAL:
            equal[rows] = (label[rows] == label[rows[0]]).all(axis=1)
    return verdict(known, equal, np.zeros(len(hands)))


def judge_labels(hands: Hands) -> Verdict:
    """Whether anything but the box is known."""
    known = hands.joint_2d_valid.any(axis=1) | hands.joint_3d_valid.any(axis=1) | hands.has_mano
    return verdict(np.ones(len(hands), bool), ~known, np.zeros(len(hands)))
