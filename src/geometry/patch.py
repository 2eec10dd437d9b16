"""The patch that the network sees, described as a virtual camera, and the image warp that renders it.

A left hand is mirrored first. Then a virtual camera, rotated by `R` against the (mirrored) source camera, looks at the
hand: `H = K_patch R K^-1` maps source pixels to patch pixels, exactly, for every point of the scene (Hartley &
Zisserman, Multiple View Geometry, 2nd ed., section 8.4.2: the image of a rotating camera). In-plane rotation is a
rotation about the principal axis, and scale is a change of focal length, so 3D lengths never change and nothing is
approximated. `K_patch` has one focal length for both axes: patch pixels are square even if source pixels are not, and
so is the crop, whose side is measured in the patch camera's plane.

Where the patch shows the source smaller than it is, the source is low-pass filtered first (`_tent`) and then sampled
once, bilinearly, at full resolution. Nothing is decimated, so the result does not depend on where the crop begins. The
filter follows the scale along each source axis at the hand's centre; under a tilt the scale varies over the patch.

Numpy and OpenCV. Training (src/data/crop.py) and prediction (src/predict/predictor.py) cut their patches here.
Shape legend: N patches, S patch side. Computed in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np

BORDER = (124, 116, 104)  # fills what is outside the image: ImageNet's mean colour, about zero after normalisation
MIRROR, MIRROR_AXIS = np.array([-1.0, 1.0, 1.0]), np.array([1.0, -1.0, -1.0])  # of points, of rotation vectors
_MIN_COS = 0.35  # a perspective rotation that puts the hand more than 70 degrees off the axis is dropped
_UNFILTERED = 1.0  # down to scale 1 / sqrt(1 + this) = 0.71 interpolation alone is as close as HaMeR's Gaussian
_STEPS = 64  # filters are computed for multiples of 1 / 64 of the shrink factor
_UNIT = 256  # and have taps that are multiples of 1 / 256, as OpenCV's fixed-point filter of uint8 images needs
_BOXES_FROM = 8.0  # from this shrink factor on, two box filters are as close to a tent, and cheaper


@dataclass(frozen=True)
class Aim:
    """What the virtual camera looks at: a hand's box in the source camera, plus the augmentation's random draws."""

    box: np.ndarray  # [4] xyxy px of the source
    focal: np.ndarray  # [2] px
    princpt: np.ndarray  # [2] px
    is_right: bool
    expansion_ratio: float  # side of the square / longer side of the box, both in square pixels
    roll: float = 0.0  # rad, about the principal axis
    tilt: tuple[float, float] = (0.0, 0.0)  # rad, rotation vector (x, y)
    zoom: float = 1.0  # factor on the side of the square
    shift: tuple[float, float] = (0.0, 0.0)  # fraction of the side


@dataclass(frozen=True)
class PatchView:
    """The virtual camera of one patch, or of N patches: then every field has a leading N (float64)."""

    focal: np.ndarray  # [] px, both axes
    princpt: np.ndarray  # [2] px
    cam_rot: np.ndarray  # [3, 3]
    image_to_patch: np.ndarray  # [3, 3]
    patch_to_image: np.ndarray  # [3, 3]
    scale: np.ndarray  # [2] patch px per source px along the source's x and y, at the centre of the hand's box

    def __getitem__(self, index: Any) -> PatchView:
        """The camera of one of N patches; `view[None]` turns a single one into N = 1."""
        return PatchView(*(value[index] for value in vars(self).values()))


@dataclass(frozen=True)
class Warp:
    """How a patch is sampled: the part of the image that is read, its low-pass filter, and the homography."""

    begin: tuple[int, int]  # (x, y) of the part's first pixel
    end: tuple[int, int]  # (x, y) one past its last pixel
    filters: tuple[np.ndarray, np.ndarray] | None  # kernels along x and y; None: not filtered, or by boxes
    boxes: tuple[tuple[int, int], ...]  # sides (x, y) of successive box filters, for a large shrink
    matrix: np.ndarray  # [3, 3] homography from patch px to px of the part


def view_of_patch(aim: Aim, img_size: int) -> PatchView:
    """The camera for `aim`; a perspective rotation that would leave the scene is dropped."""
    return views_of_patches([aim], img_size)[0]


def views_of_patches(aims: Sequence[Aim], img_size: int) -> PatchView:
    """The cameras for `aims` [N], vectorised; identical to the bit to one at a time."""
    rolled = np.array([_roll_of_camera(aim.roll) for aim in aims])
    rotation, tilted = rolled.copy(), [i for i, aim in enumerate(aims) if aim.tilt != (0.0, 0.0)]
    if tilted:
        tilt = np.array([cv2.Rodrigues(np.array([*aims[i].tilt, 0.0]))[0] for i in tilted])
        rotation[tilted] = rolled[tilted] @ tilt
    view, is_outside = _turned_views(aims, rotation, img_size)
    if is_outside.any():
        view, is_outside = _turned_views(aims, np.where(is_outside[:, None, None], rolled, rotation), img_size)
        assert not is_outside.any()
    return view


def _roll_of_camera(roll: float) -> list[list[float]]:
    """[3, 3] rotation about the principal axis by `roll` rad. A perspective rotation is applied before it."""
    cos, sin = math.cos(roll), math.sin(roll)
    return [[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]]


def _turned_views(aims: Sequence[Aim], rotation: np.ndarray, img_size: int) -> tuple[PatchView, np.ndarray]:
    """The cameras rotated by `rotation` [N, 3, 3], and which of them [N] see the hand too obliquely."""
    box, focal, princpt, shift = (
        np.array([getattr(aim, name) for aim in aims], np.float64) for name in ("box", "focal", "princpt", "shift")
    )
    to_ray = _rays(focal, princpt, np.array([1.0 if aim.is_right else -1.0 for aim in aims]))
    center = np.ones((len(aims), 3, 1))
    center[:, :2, 0] = 0.5 * (box[:, :2] + box[:, 2:])
    to_square, focal = focal, np.sqrt(focal[:, 0] * focal[:, 1])
    to_square = focal[:, None] / to_square  # [N, 2] of the patch camera per source px, before it is scaled
    to_plane = (rotation * np.stack([focal, focal, np.ones_like(focal)], axis=1)[..., None]) @ to_ray
    center_on_plane = (to_plane @ center)[..., 0]
    depth = center_on_plane[:, 2]
    is_tilted = rotation[:, 2, 2] != 1.0
    is_outside = is_tilted & (depth < _MIN_COS * np.linalg.norm(to_ray @ center, axis=1)[:, 0])
    depth = np.where(is_outside, 1.0, depth)
    # det(to_plane) = 1 up to the mirror's sign, so the plane is magnified by depth^-3 in area about this point.
    magnification = depth**-1.5
    expansion, zoom = np.array([(aim.expansion_ratio, aim.zoom) for aim in aims]).T
    side = ((box[:, 2:] - box[:, :2]) * to_square).max(axis=1) * expansion * zoom * magnification
    scale = img_size / side
    princpt = 0.5 * (img_size - 1) - scale[:, None] * (center_on_plane[:, :2] / depth[:, None] + shift * side[:, None])
    image_to_patch = _scale_and_shift(scale, princpt) @ to_plane
    patch_to_image = np.linalg.inv(image_to_patch)
    # Also outside: a corner of the patch looks behind the source camera.
    is_outside |= is_tilted & (_corners(patch_to_image, img_size)[..., 2].min(axis=1) <= 0.1)
    scales = _scale_at(image_to_patch, center[..., 0])
    return PatchView(scale * focal, princpt, rotation, image_to_patch, patch_to_image, scales), is_outside


def _scale_at(homography: np.ndarray, point: np.ndarray) -> np.ndarray:
    """[N, 2] lengths of the images of a step along x and along y at `point` [N, 3]: norms of the Jacobian's columns."""
    image = (homography @ point[..., None]) / (homography[:, 2:] @ point[..., None])
    jacobian = (homography[:, :2, :2] - image[:, :2] * homography[:, 2:, :2]) / (homography[:, 2:] @ point[..., None])
    return np.hypot(jacobian[:, 0], jacobian[:, 1])


def _rays(focal: np.ndarray, princpt: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """[N, 3, 3] matrices from source px to camera rays, mirrored where `sign` [N] is -1.

    Mirroring the image (x' = W - 1 - x, with the principal point) mirrors the rays, so W drops out.
    """
    to_ray = np.zeros((len(sign), 3, 3))
    to_ray[:, 0, 0], to_ray[:, 0, 2] = sign / focal[:, 0], -sign * princpt[:, 0] / focal[:, 0]
    to_ray[:, 1, 1], to_ray[:, 1, 2] = 1.0 / focal[:, 1], -princpt[:, 1] / focal[:, 1]
    to_ray[:, 2, 2] = 1.0
    return to_ray


def _scale_and_shift(scale: np.ndarray, shift: np.ndarray, divisor: np.ndarray | float = 1.0) -> np.ndarray:
    """[N, 3, 3] homographies x -> (scale x + shift) / divisor; scale, divisor [N], shift [N, 2]."""
    matrix = np.zeros((len(shift), 3, 3))
    matrix[:, 0, 0] = matrix[:, 1, 1] = scale
    matrix[:, :2, 2], matrix[:, 2, 2] = shift, divisor
    return matrix


def _corners(patch_to_image: np.ndarray, img_size: int) -> np.ndarray:
    """[N, 4, 3] homogeneous image coordinates of the patches' four outer corners."""
    low, high = -0.5, img_size - 0.5
    x, y = np.array([[low, high, high, low], [low, low, high, high]])[..., None]
    columns = patch_to_image[:, None]
    return columns[..., 0] * x + columns[..., 1] * y + columns[..., 2]


def plan_warps(sizes: Sequence[tuple[int, int]], views: PatchView, img_size: int) -> list[Warp | None]:
    """The warps for N views of images of `sizes` [N] (width, height); None if less than a pixel is visible."""
    limit, shrink = np.array(sizes), np.maximum(1.0 / views.scale, 1.0)
    margin = 1 + np.ceil(shrink)
    corner = _corners(views.patch_to_image, img_size)
    corner = corner[..., :2] / corner[..., 2:]
    begin = np.clip(np.floor(corner.min(axis=1)) - margin, 0, limit).astype(np.int64)
    end = np.clip(np.ceil(corner.max(axis=1)) + 1 + margin, 0, limit).astype(np.int64)
    matrix = _scale_and_shift(np.ones(len(begin)), -begin) @ views.patch_to_image
    shrink = np.minimum(shrink, np.maximum(end - begin, 1))  # there is nothing to average beyond the part
    columns = (column.tolist() for column in ((end - begin).min(axis=1), begin, end, shrink))
    return [
        Warp(tuple(begin), tuple(end), *_low_pass(*shrink), matrix) if size > 0 else None
        for size, begin, end, shrink, matrix in zip(*columns, matrix)
    ]


def _low_pass(shrink_x: float, shrink_y: float) -> tuple[tuple[np.ndarray, np.ndarray] | None, tuple]:
    """`Warp.filters` and `Warp.boxes` for a shrink by these factors."""
    if max(shrink_x, shrink_y) >= _BOXES_FROM:
        return None, tuple(zip(_two_boxes(shrink_x), _two_boxes(shrink_y)))
    filters = _tent(round(shrink_x * _STEPS)), _tent(round(shrink_y * _STEPS))
    return (None if all(taps.max() == 1.0 for taps in filters) else filters), ()


def _two_boxes(shrink: float) -> tuple[int, int]:
    """Odd sides of two box filters that together are about the tent of +-`shrink` px, as two equal boxes are exactly.

    Their cost does not depend on their sides, unlike that of `_tent`'s taps.
    """
    low = 2 * int((shrink - 1.0) / 2.0) + 1
    pairs = ((low, low), (low, low + 2), (low + 2, low + 2))
    return min(pairs, key=lambda pair: abs(pair[0] ** 2 + pair[1] ** 2 - 2.0 * shrink**2))


@lru_cache(maxsize=1024)
def _tent(shrink_steps: int) -> np.ndarray:
    """[2n + 1] taps that sum to 1: the low-pass filter of a source that is shrunk by `shrink_steps` / _STEPS.

    Linear interpolation is a filter, too: a tent of +-1 px, on average of variance 1/6 px^2. What is missing to a tent
    of +-a px, variance a^2 / 6, is applied here: taps that fall linearly from the centre, of variance (a^2 - 1) / 6.
    For an integer `a` the result is exactly that tent, the antialiased bilinear filter of Pillow and torchvision.
    a^2 = shrink^2 - _UNFILTERED, at least 1.
    """
    square = max(1.0, (shrink_steps / _STEPS) ** 2 - _UNFILTERED)
    num = max(1, math.ceil(math.sqrt(square)) - 1)
    variance, pairs = (square - 1.0) / 6.0, num * (num + 1)
    # tap j is proportional to width - |j|; the width solves sum(j^2 tap) = variance * sum(tap)
    width = pairs * (0.5 * pairs - variance) / ((2 * num + 1) * (pairs / 3.0 - variance))
    unit = _UNIT / (width * (2 * num + 1) - pairs)
    # Sums from the left end on are rounded, not taps: the rounding errors must not add up in the centre.
    sums = [0, *(round(unit * count * (width - num + 0.5 * (count - 1))) for count in range(1, num + 1))]
    side = [after - before for before, after in itertools.pairwise(sums)]
    return np.array([*side, _UNIT - 2 * sums[-1], *reversed(side)]) / _UNIT


def warp_image(image: np.ndarray, view: PatchView, img_size: int) -> np.ndarray:
    """The patch [S, S, 3] uint8 of `image` [H, W, 3] uint8. Sampled once; pixels outside are BORDER."""
    (warp,) = plan_warps([image.shape[1::-1]], view[None], img_size)
    return apply_warp(image, warp, img_size)


def apply_warp(image: np.ndarray, warp: Warp | None, img_size: int) -> np.ndarray:
    """As `warp_image`, for a warp that was planned for images of this size.

    Only the part that the patch shows is read. It is sampled with four channels, which is more than twice as fast in
    OpenCV as with three.
    """
    if warp is None:
        return np.full((img_size, img_size, 3), BORDER, np.uint8)
    (left, top), (right, bottom), matrix = warp.begin, warp.end, warp.matrix
    part = image[top:bottom, left:right]
    for sides in warp.boxes:
        part = cv2.blur(part, sides, borderType=cv2.BORDER_REFLECT)
    if warp.filters is not None:
        part = cv2.sepFilter2D(part, -1, *warp.filters, borderType=cv2.BORDER_REFLECT)
    part = cv2.cvtColor(part, cv2.COLOR_RGB2RGBA)
    size, how = (img_size, img_size), {"flags": cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, "borderValue": BORDER}
    if abs(matrix[2, 0]) < 1e-12 and abs(matrix[2, 1]) < 1e-12:
        patch = cv2.warpAffine(part, matrix[:2] / matrix[2, 2], size, **how)
    else:
        patch = cv2.warpPerspective(part, matrix, size, **how)
    return cv2.cvtColor(patch, cv2.COLOR_RGBA2RGB)


def mirror_pose(pose: np.ndarray) -> np.ndarray:
    """Axis-angle [..., 3k] of the mirror image (x negated), left to right or back: y and z change sign."""
    return (pose.reshape(-1, 3) * MIRROR_AXIS).reshape(pose.shape)


def turn_roots(pose: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """MANO poses [N, 48] in frames rotated by `rotation` [N, 3, 3] (or [3, 3]); only the root changes."""
    turned = pose.astype(np.float64)
    root = rotation @ np.array([cv2.Rodrigues(vector)[0] for vector in turned[:, :3]]).reshape(-1, 3, 3)
    turned[:, :3] = np.array([cv2.Rodrigues(matrix)[0] for matrix in root]).reshape(-1, 3)
    return turned
