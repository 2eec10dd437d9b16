"""Camera and depth: whether 3D joints, intrinsics and 2D joints belong together.

Shape legend: N hands, J = 21 joints.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from src.data.plausibility.hands import Hands
from src.data.plausibility.size import SCALE, hand_scale
from src.data.plausibility.verdict import Verdict, extent, longer_side, masked, median, verdict, within
from src.hand.skeleton import WRIST

_DEPTH_MM = (50.0, 10_000.0)
_MIN_JOINT = 5
# Median 2D error in px, and relative to the hand's longer side in the image; both must be exceeded. Manual labels are
# within about 5 %. A smaller error counts only if it is systematic: a correction leaves less than a third of it.
_GROSS_PX, _GROSS_BOX = 6.0, 0.1
_CLEAR_PX, _CLEAR_BOX = 3.0, 0.03
_AS_GOOD, _SAME_PX = 1.5, 0.5  # a more specific correction is preferred if its error is that close to the smallest
_RESIZED = "2D joints look {:.2g} times as large: image and 2D resized without focal and princpt, or the reverse"
# The same without intrinsics, where perspective is ignored: at most 0.24, for a hand 23 cm from the camera. A smaller
# error counts only if a correction removes most of it.
_SHAPE_CLEAR, _SHAPE_GROSS = 0.15, 0.28
_FOCAL = (0.2, 50.0)  # relative to half of the image: fields of view of about 160 and 2 degrees


def _in_front(hands: Hands) -> np.ndarray:
    """[N] whether all known 3D joints are in front of the camera."""
    return (~hands.joint_3d_valid | (hands.joint_cam[..., 2] > 0)).all(axis=1)


def _median_depth(hands: Hands) -> np.ndarray:
    """[N] median depth of the known joints, mm; independent of the unit of joint_cam."""
    scale = hand_scale(hands)
    unit = np.where(within(scale, SCALE) | ~(scale > 0), 1.0, scale)
    return median(masked(hands.joint_cam[..., 2], hands.joint_3d_valid)) / unit


def judge_depth(hands: Hands) -> Verdict:
    """Whether hands with intrinsics are in front of the camera, at a plausible distance."""
    depth = _median_depth(hands)
    checked = hands.has_intr & ~np.isnan(depth)
    result = verdict(checked, ~within(depth, _DEPTH_MM) | ~_in_front(hands), depth)
    at_wrist = (hands.joint_cam[:, WRIST] == 0).all(axis=1) & hands.joint_3d_valid[:, WRIST]
    result.cause[result.bad & at_wrist] = "joint_cam is relative to the wrist; has_intr must be 0 then"
    opengl = result.bad & ~at_wrist & within(-depth, _DEPTH_MM)
    result.cause[opengl] = "the camera frame looks like OpenGL's: negate y and z"
    return result


def _both(hands: Hands) -> np.ndarray:
    return hands.joint_2d_valid & hands.joint_3d_valid


def _size(hands: Hands) -> np.ndarray:
    """[N] longer side of the hand in the image, px, from the joints that are known in 2D and 3D."""
    return longer_side(extent(hands.joint_img, _both(hands)))


def _pixel_error(pixel: np.ndarray, hands: Hands) -> np.ndarray:
    """[N] median distance in px between `pixel` [N, J, 2] and joint_img."""
    return median(masked(np.linalg.norm(pixel - hands.joint_img, axis=-1), _both(hands)))


def _project(hands: Hands, axes: Sequence[float] = (1, 1, 1)) -> np.ndarray:
    """[N, J, 2] px of joint_cam with its axes multiplied by `axes`; not clamped, so independent of its unit."""
    point = hands.joint_cam * np.array(axes, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        return point[..., :2] / point[..., 2:] * hands.focal[:, None] + hands.princpt[:, None]


def judge_projection(hands: Hands) -> Verdict:
    """Whether projected 3D joints meet the 2D joints, where the camera is known."""
    valid = _both(hands)
    checked = hands.has_intr & (valid.sum(axis=1) >= _MIN_JOINT) & _in_front(hands)
    size, error = _size(hands), _pixel_error(_project(hands), hands)
    result = verdict(checked, error > np.maximum(_GROSS_PX, _GROSS_BOX * size), error)
    rows = np.flatnonzero(checked & (error > np.maximum(_CLEAR_PX, _CLEAR_BOX * size)))
    if len(rows):
        result.cause[rows] = _projection_causes(hands.select(rows), error[rows] / 3)
        result.bad[rows] |= result.cause[rows] != ""
    return result


def _agree(hands: Hands) -> np.ndarray:
    """[N] whether projected 3D joints meet the 2D joints of hands that are more than a few px large."""
    size, is_enough = _size(hands), _both(hands).sum(axis=1) >= _MIN_JOINT
    return (
        is_enough
        & (size > _GROSS_PX)
        & (_pixel_error(_project(hands), hands) < np.minimum(_GROSS_PX, _GROSS_BOX * size))
    )


def _projection_causes(hands: Hands, limit: np.ndarray) -> np.ndarray:
    """[N] the correction that makes 2D and projected 3D agree best, if within `limit` px; of equal ones, the first."""
    pixel, valid = _project(hands), _both(hands)
    swapped = hands.joint_img[..., ::-1] - hands.joint_img
    tries: dict[str, np.ndarray] = {
        "x and y of joint_img look swapped": pixel - swapped,
        "y of joint_cam points up: negate it": _project(hands, (1, -1, 1)),
        "x of joint_cam looks negated (mirrored)": _project(hands, (-1, 1, 1)),
        "x and y of joint_cam look negated": _project(hands, (-1, -1, 1)),
        "x and y of princpt look swapped": pixel + (hands.princpt[:, ::-1] - hands.princpt)[:, None],
    }
    resize = _ratio(pixel + 0.5, hands.joint_img + 0.5, valid)
    tries[_RESIZED] = (pixel + 0.5) * resize[:, None, None] - 0.5
    centre, own = _mean(pixel, valid), _mean(hands.joint_img, valid)
    tries["a constant shift: wrong princpt, or 2D joints of another crop"] = pixel - centre + own
    scale = _ratio(pixel - centre, hands.joint_img - own, valid)
    framed = (pixel - centre) * scale[:, None, None] + own
    tries["shift and scale: wrong focal and princpt, or 2D joints of another crop"] = framed
    error = np.array([_pixel_error(moved, hands) for moved in tries.values()])
    first = (error <= np.maximum(_AS_GOOD * error.min(axis=0), _SAME_PX)).argmax(axis=0)
    cause = np.array([*tries], object)[first]
    cause[error[first, np.arange(len(hands))] >= limit] = ""
    resized = cause == _RESIZED
    cause[resized] = [_RESIZED.format(ratio) for ratio in resize[resized]]
    return cause


def _mean(pixel: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[N, 1, 2] mean of the valid joints."""
    weight = valid[..., None] / np.maximum(valid.sum(axis=1), 1)[:, None, None]
    return np.where(valid[..., None], pixel * weight, 0.0).sum(axis=1, keepdims=True)


def _ratio(one: np.ndarray, other: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[N] the factor k >= 0 that minimises |k one - other|^2 over the valid joints."""
    one, other = (np.where(valid[..., None], each, 0.0) for each in (one, other))
    return np.maximum((one * other).sum(axis=(1, 2)), 0.0) / np.maximum((one * one).sum(axis=(1, 2)), 1e-12)


def judge_shape_2d(hands: Hands) -> Verdict:
    """Whether 3D joints, scaled and shifted, resemble the 2D joints, where the camera is unknown."""
    valid = _both(hands)
    size = _size(hands)
    checked = ~hands.has_intr & (valid.sum(axis=1) > _MIN_JOINT) & (size > 0) & (hand_scale(hands) > 0)
    own = hands.joint_img - _mean(hands.joint_img, valid)

    def error(plane: np.ndarray) -> np.ndarray:
        plane = plane - _mean(plane, valid)
        fitted = plane * _ratio(plane, own, valid)[:, None, None]
        return median(masked(np.linalg.norm(fitted - own, axis=-1), valid)) / np.maximum(size, 1e-9)

    plane = hands.joint_cam[..., :2]
    stated = error(plane)
    tries = {
        "y of joint_cam points up: negate it": error(plane * [1, -1]),
        "x of joint_cam or joint_img looks negated (mirrored)": error(plane * [-1, 1]),
        "x and y look swapped": error(plane[..., ::-1]),
    }
    best = np.min(list(tries.values()), axis=0)
    is_clear = best < 0.4 * stated
    result = verdict(checked, (is_clear & (stated > _SHAPE_CLEAR)) | (stated > _SHAPE_GROSS), 100 * stated)
    for name, value in tries.items():
        result.cause[result.bad & is_clear & (value == best)] = name
    return result


def judge_focal(hands: Hands) -> Verdict:
    """Whether stated focal lengths are those of a camera, in pixels; unless 2D and projected 3D joints agree, which
    long lenses and crops do, too."""
    centre = np.abs(hands.princpt).max(axis=1)
    half = np.maximum(centre, hands.image_size.max(axis=1) / 2)  # the principal point of a crop may be anywhere
    ratio = hands.focal.min(axis=1) / np.maximum(half, 1e-9)
    ratio = np.where(ratio < _FOCAL[0], ratio, hands.focal.max(axis=1) / np.maximum(half, 1e-9))
    checked = hands.has_intr & (half > 0) & ~_agree(hands)
    result = verdict(checked, ~within(ratio, _FOCAL), hands.focal.max(axis=1))
    result.cause[result.bad & (centre < 2)] = "princpt looks normalised: it must be in px"
    result.cause[result.bad & (centre >= 2) & (ratio < 1)] = "focal may be in mm or normalised: it must be in px"
    return result
