"""The patch a network sees, as a camera: which pixels of a photograph it shows, and the picture it would have taken.

A left hand is mirrored first. Then a virtual camera, turned by `R` against the (mirrored) source camera, looks at the
hand: `H = K_patch R K^-1` maps source pixels to patch pixels, exactly, for every point of the scene (Hartley &
Zisserman, Multiple View Geometry, 2nd ed., section 8.4.2: the image of a rotating camera). Turns of the picture are
turns of the camera about its principal axis, scale and focal changes are its zoom, so no 3D length ever changes and
nothing is approximated. `K_patch` has one focal length for both axes: pixels of the patch are square even where those
of the source are not.

Numpy and OpenCV. Training (src/data/crop.py) and prediction (src/model/predict.py) cut their patches here.
Shape legend: S patch side. Computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

BORDER = (124, 116, 104)  # outside of the image: ImageNet's mean colour, close to zero after normalisation
MIRROR, MIRROR_AXIS = np.array([-1.0, 1.0, 1.0]), np.array([1.0, -1.0, -1.0])  # of points, of rotation vectors
_MIN_COS = 0.35  # a perspective turn that shows the hand at more than 70 degrees off the axis is not carried out
_SHRINK_FROM = 0.5  # below this scale the source is averaged before it is sampled, against aliasing


@dataclass(frozen=True)
class Aim:
    """Where the virtual camera looks: at a hand's box through the source camera, with the draws of augmentation."""

    box: np.ndarray  # [4] xyxy px of the source
    focal: np.ndarray  # [2] px
    princpt: np.ndarray  # [2] px
    is_right: bool
    expansion_ratio: float  # side of the square over the longer side of the box
    roll: float = 0.0  # rad, about the principal axis
    tilt: tuple[float, float] = (0.0, 0.0)  # rad, rotation vector (x, y)
    zoom: float = 1.0  # factor on the side of the square
    shift: tuple[float, float] = (0.0, 0.0)  # fraction of the side


@dataclass(frozen=True)
class PatchView:
    """The virtual camera of one patch (float64)."""

    focal: float  # px, both axes
    princpt: np.ndarray  # [2] px
    cam_rot: np.ndarray  # [3, 3]
    image_to_patch: np.ndarray  # [3, 3]
    patch_to_image: np.ndarray  # [3, 3]
    scale: float  # patch px per source px at the centre of the hand's box


@dataclass(frozen=True)
class Warp:
    """How the pixels of a patch come from those of an image: the part that is read, shrunk, and where it lies."""

    begin: tuple[int, int]  # (x, y) of the part's first pixel
    end: tuple[int, int]  # (x, y) of the first one behind it
    factor: int  # the part is first shrunk by it, averaging
    matrix: np.ndarray  # [3, 3] homography from patch px to px of the shrunk part


def rotation_of_camera(roll: float, tilt: tuple[float, float]) -> np.ndarray:
    """[3, 3] roll about the principal axis after a perspective turn by the rotation vector (tilt x, tilt y, 0); rad."""
    cos, sin = math.cos(roll), math.sin(roll)
    turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    return turn if tilt == (0.0, 0.0) else turn @ cv2.Rodrigues(np.array([tilt[0], tilt[1], 0.0]))[0]


def view_of_patch(aim: Aim, img_size: int) -> PatchView:
    """The camera that `aim` asks for; a perspective turn that would leave the scene is dropped."""
    view = _view(aim, rotation_of_camera(aim.roll, aim.tilt), img_size)
    if view is None:
        view = _view(aim, rotation_of_camera(aim.roll, (0.0, 0.0)), img_size)
        assert view is not None
    return view


def _view(aim: Aim, rotation: np.ndarray, img_size: int) -> PatchView | None:
    """The camera turned by `rotation`, or None where that shows the hand too obliquely."""
    (fx, fy), (cx, cy) = aim.focal.tolist(), aim.princpt.tolist()
    x0, y0, x1, y1 = aim.box.tolist()
    focal = math.sqrt(fx * fy)
    # Mirroring the image (x' = W - 1 - x, with the principal point) mirrors the rays, so W drops out.
    side_sign = 1.0 if aim.is_right else -1.0
    to_ray = np.array([[side_sign / fx, 0.0, -side_sign * cx / fx], [0.0, 1.0 / fy, -cy / fy], [0.0, 0.0, 1.0]])
    center = np.array([0.5 * (x0 + x1), 0.5 * (y0 + y1), 1.0])
    to_plane = (rotation * ((focal,), (focal,), (1.0,))) @ to_ray
    center_x, center_y, depth = (to_plane @ center).tolist()
    is_tilted = rotation[2, 2] != 1.0
    if is_tilted and depth < _MIN_COS * math.hypot(*(to_ray @ center)):
        return None
    # det(to_plane) = 1 up to the mirror's sign, so the plane is magnified by depth^-3 in area about this point.
    magnification = depth**-1.5
    side = max(x1 - x0, y1 - y0) * aim.expansion_ratio * aim.zoom * magnification
    scale = img_size / side
    shift_x, shift_y = aim.shift
    middle = 0.5 * (img_size - 1)
    princpt = np.array(
        [middle - scale * (center_x / depth + shift_x * side), middle - scale * (center_y / depth + shift_y * side)]
    )
    to_patch = np.array([[scale, 0.0, princpt[0]], [0.0, scale, princpt[1]], [0.0, 0.0, 1.0]])
    image_to_patch = to_patch @ to_plane
    patch_to_image = np.linalg.inv(image_to_patch)
    if is_tilted and min(depth for _, _, depth in _corners(patch_to_image, img_size)) <= 0.1:
        return None  # a corner of the patch looks at what lies behind the source camera
    return PatchView(scale * focal, princpt, rotation, image_to_patch, patch_to_image, scale * magnification)


def _corners(patch_to_image: np.ndarray, img_size: int) -> list[list[float]]:
    """Homogeneous image coordinates of the patch's four outer corners."""
    low, high = -0.5, img_size - 0.5
    rows = patch_to_image.tolist()
    return [[a * x + b * y + c for a, b, c in rows] for x, y in ((low, low), (high, low), (high, high), (low, high))]


def plan_warp(size: tuple[int, int], view: PatchView, img_size: int) -> Warp | None:
    """What of an image of `size` (width, height) the patch shows, and how; None where that is next to nothing."""
    factor = int(1.0 / view.scale) if view.scale <= _SHRINK_FROM else 1
    corners = [(x / depth, y / depth) for x, y, depth in _corners(view.patch_to_image, img_size)]
    edges = []
    for values, limit in zip(zip(*corners), size):
        begin = min(max(math.floor(min(values)) - 1 - factor, 0), limit)
        count = (min(max(math.ceil(max(values)) + 2 + factor, 0), limit) - begin) // factor
        if count < 1:
            return None
        edges.append((begin, begin + count * factor))
    (left, right), (top, bottom) = edges
    middle = 0.5 * (factor - 1)
    to_part = np.array([[1.0, 0.0, -left - middle], [0.0, 1.0, -top - middle], [0.0, 0.0, factor]])
    return Warp((left, top), (right, bottom), factor, to_part @ view.patch_to_image)


def warp_image(image: np.ndarray, view: PatchView, img_size: int) -> np.ndarray:
    """The patch [S, S, 3] uint8 of `image` [H, W, 3] uint8; the source is sampled once, outside of it lies grey."""
    return apply_warp(image, plan_warp(image.shape[1::-1], view, img_size), img_size)


def apply_warp(image: np.ndarray, warp: Warp | None, img_size: int) -> np.ndarray:
    """As `warp_image`, for a warp that was planned for images of this size.

    Only the part that the patch shows is touched. It is sampled with a fourth channel, which OpenCV does at more than
    twice the speed of three.
    """
    if warp is None:
        return np.full((img_size, img_size, 3), BORDER, np.uint8)
    (left, top), (right, bottom), matrix = warp.begin, warp.end, warp.matrix
    part = image[top:bottom, left:right]
    if warp.factor > 1:
        size = ((right - left) // warp.factor, (bottom - top) // warp.factor)
        part = cv2.resize(part, size, interpolation=cv2.INTER_AREA)
    part = cv2.cvtColor(part, cv2.COLOR_RGB2RGBA)
    size, how = (img_size, img_size), {"flags": cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, "borderValue": BORDER}
    if abs(matrix[2, 0]) < 1e-12 and abs(matrix[2, 1]) < 1e-12:
        patch = cv2.warpAffine(part, matrix[:2] / matrix[2, 2], size, **how)
    else:
        patch = cv2.warpPerspective(part, matrix, size, **how)
    return cv2.cvtColor(patch, cv2.COLOR_RGBA2RGB)


def mirror_pose(pose: np.ndarray) -> np.ndarray:
    """Axis-angle [..., 3k] of a left hand as that of the mirrored (right) hand: y and z change sign."""
    return (pose.reshape(-1, 3) * MIRROR_AXIS).reshape(pose.shape)


def turn_root(pose: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """MANO pose [48] seen from a camera turned by `rotation`: only the root is not relative to a parent."""
    turned = pose.astype(np.float64)
    turned[:3] = cv2.Rodrigues(rotation @ cv2.Rodrigues(turned[:3])[0])[0][:, 0]
    return turned
