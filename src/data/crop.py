"""From a Sample to the square patch a network sees: one homography moves image, 2D, 3D and MANO root together.

A left hand is mirrored first. Then a virtual camera, turned by `R` against the (mirrored) source camera, looks at the
hand: `H = K_patch R K^-1` maps source pixels to patch pixels, exactly, for every point of the scene (Hartley &
Zisserman, Multiple View Geometry, 2nd ed., section 8.4.2: the image of a rotating camera). Turns of the picture are
turns of the camera about its principal axis, scale and focal changes are its zoom, so no 3D length ever changes and
nothing is approximated. `K_patch` has one focal length for both axes: pixels of the patch are square even where those
of the source are not.

Shape legend: J = 21 joints, S patch side. Computed in float64, returned in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from src.batch import NUM_JOINT, NUM_POSE, NUM_SHAPE, Sample
from src.data.augment import Augmentation, augment_pixels

_BORDER = (124, 116, 104)  # ImageNet's mean colour: close to zero after normalisation
_MIRROR, _MIRROR_AXIS = np.array([-1.0, 1.0, 1.0]), np.array([1.0, -1.0, -1.0])  # of points, of rotation vectors
_MIN_COS = 0.35  # a perspective turn that shows the hand at more than 70 degrees off the axis is not carried out
_SHRINK_FROM = 0.5  # below this scale the source is averaged before it is sampled, against aliasing


@dataclass
class PatchSample:
    """One row of a Batch as numpy arrays; every field as described in src/batch.py, without the leading B."""

    key: str
    source: str
    position: int
    is_right: bool
    patch: np.ndarray
    patch_focal: np.ndarray
    patch_princpt: np.ndarray
    cam_rot: np.ndarray
    image_to_patch: np.ndarray
    joint_patch: np.ndarray
    joint_2d_valid: np.ndarray
    joint_cam: np.ndarray
    joint_3d_valid: np.ndarray
    mano_pose: np.ndarray
    mano_shape: np.ndarray
    has_mano: float
    flat_hand_mean: bool
    has_intr: float


@dataclass(frozen=True)
class PatchView:
    """The virtual camera of one patch (float64)."""

    focal: float  # px, both axes
    princpt: np.ndarray  # [2] px
    cam_rot: np.ndarray  # [3, 3]
    image_to_patch: np.ndarray  # [3, 3]
    patch_to_image: np.ndarray  # [3, 3]
    scale: float  # patch px per source px at the centre of the hand's box


def rotation_of_camera(roll: float, tilt: tuple[float, float]) -> np.ndarray:
    """[3, 3] roll about the principal axis after a perspective turn by the rotation vector (tilt x, tilt y, 0); rad."""
    cos, sin = math.cos(roll), math.sin(roll)
    turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    return turn if tilt == (0.0, 0.0) else turn @ cv2.Rodrigues(np.array([tilt[0], tilt[1], 0.0]))[0]


def view_of_patch(sample: Sample, augmentation: Augmentation, img_size: int, expansion_ratio: float) -> PatchView:
    """The camera that looks at the hand of `sample`; a perspective turn that would leave the scene is dropped."""
    rotation = rotation_of_camera(augmentation.roll, augmentation.tilt)
    view = _view(sample, augmentation, rotation, img_size, expansion_ratio)
    if view is None:
        rotation = rotation_of_camera(augmentation.roll, (0.0, 0.0))
        view = _view(sample, augmentation, rotation, img_size, expansion_ratio)
        assert view is not None
    return view


def _view(
    sample: Sample, augmentation: Augmentation, rotation: np.ndarray, img_size: int, expansion_ratio: float
) -> PatchView | None:
    """The camera turned by `rotation`, or None where that shows the hand too obliquely."""
    (fx, fy), (cx, cy) = sample.focal.tolist(), sample.princpt.tolist()
    x0, y0, x1, y1 = sample.hand_bbox.tolist()
    focal = math.sqrt(fx * fy)
    # Mirroring the image (x' = W - 1 - x, with the principal point) mirrors the rays, so W drops out.
    side_sign = 1.0 if sample.is_right else -1.0
    to_ray = np.array([[side_sign / fx, 0.0, -side_sign * cx / fx], [0.0, 1.0 / fy, -cy / fy], [0.0, 0.0, 1.0]])
    center = np.array([0.5 * (x0 + x1), 0.5 * (y0 + y1), 1.0])
    to_plane = (rotation * ((focal,), (focal,), (1.0,))) @ to_ray
    center_x, center_y, depth = (to_plane @ center).tolist()
    is_tilted = rotation[2, 2] != 1.0
    if is_tilted and depth < _MIN_COS * math.hypot(*(to_ray @ center)):
        return None
    # det(to_plane) = 1 up to the mirror's sign, so the plane is magnified by depth^-3 in area about this point.
    magnification = depth**-1.5
    side = max(x1 - x0, y1 - y0) * expansion_ratio * augmentation.zoom * magnification
    scale = img_size / side
    shift_x, shift_y = augmentation.shift
    middle = 0.5 * (img_size - 1)
    princpt = np.array(
        [middle - scale * (center_x / depth + shift_x * side), middle - scale * (center_y / depth + shift_y * side)]
    )
    to_patch = np.array([[scale, 0.0, princpt[0]], [0.0, scale, princpt[1]], [0.0, 0.0, 1.0]])
    image_to_patch = to_patch @ to_plane
    patch_to_image = np.linalg.inv(image_to_patch)
    if is_tilted and not _in_front(patch_to_image, img_size):
        return None
    return PatchView(scale * focal, princpt, rotation, image_to_patch, patch_to_image, scale * magnification)


@lru_cache(maxsize=16)
def _corners(img_size: int) -> np.ndarray:
    """[3, 4] homogeneous outer corners of the patch."""
    low, high = -0.5, img_size - 0.5
    return np.array([[low, high, high, low], [low, low, high, high], [1.0, 1.0, 1.0, 1.0]])


def _in_front(patch_to_image: np.ndarray, img_size: int) -> bool:
    """Whether every corner of the patch looks at something in front of the source camera."""
    return min((patch_to_image[2] @ _corners(img_size)).tolist()) > 0.1


def warp_image(image: np.ndarray, view: PatchView, img_size: int) -> np.ndarray:
    """The patch [S, S, 3] uint8 of `image` [H, W, 3] uint8; the source is sampled once, outside of it lies grey.

    Only the part that the patch shows is touched. It is sampled with a fourth channel, which OpenCV does at more than
    twice the speed of three.
    """
    factor = int(1.0 / view.scale) if view.scale <= _SHRINK_FROM else 1
    begin, end = _shown_part(image, view.patch_to_image, img_size, 1 + factor)
    count = (end - begin) // factor
    if (count < 1).any():  # the patch shows next to nothing of the image
        return np.full((img_size, img_size, 3), _BORDER, np.uint8)
    end = begin + count * factor
    part = image[begin[1] : end[1], begin[0] : end[0]]
    if factor > 1:
        part = cv2.resize(part, tuple(count.tolist()), interpolation=cv2.INTER_AREA)
    middle = 0.5 * (factor - 1)
    to_part = np.array([[1.0, 0.0, -begin[0] - middle], [0.0, 1.0, -begin[1] - middle], [0.0, 0.0, factor]])
    matrix = to_part @ view.patch_to_image
    part = cv2.cvtColor(part, cv2.COLOR_RGB2RGBA)
    size, how = (img_size, img_size), {"flags": cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, "borderValue": _BORDER}
    if abs(matrix[2, 0]) < 1e-12 and abs(matrix[2, 1]) < 1e-12:
        patch = cv2.warpAffine(part, matrix[:2] / matrix[2, 2], size, **how)
    else:
        patch = cv2.warpPerspective(part, matrix, size, **how)
    return cv2.cvtColor(patch, cv2.COLOR_RGBA2RGB)


def _shown_part(
    image: np.ndarray, patch_to_image: np.ndarray, img_size: int, margin: int
) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the first pixel of the part of the image that the patch shows, and of the first one behind it."""
    x, y, depth = patch_to_image @ _corners(img_size)
    corner = np.stack([x, y]) / depth
    limit = np.array(image.shape[1::-1])
    begin, end = np.floor(corner.min(axis=1)) - margin, np.ceil(corner.max(axis=1)) + margin + 1
    return tuple(np.minimum(np.maximum(edge, 0.0), limit).astype(int) for edge in (begin, end))


def mirror_pose(pose: np.ndarray) -> np.ndarray:
    """Axis-angle [..., 3k] of a left hand as that of the mirrored (right) hand: y and z change sign."""
    return (pose.reshape(-1, 3) * _MIRROR_AXIS).reshape(pose.shape)


def turn_root(pose: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """MANO pose [48] seen from a camera turned by `rotation`: only the root is not relative to a parent."""
    turned = pose.astype(np.float64)
    turned[:3] = cv2.Rodrigues(rotation @ cv2.Rodrigues(turned[:3])[0])[0][:, 0]
    return turned


def crop_sample(
    sample: Sample, augmentation: Augmentation, img_size: int, expansion_ratio: float, position: int = 0
) -> PatchSample:
    """Cut the hand out of its image.

    Args:
        sample: as the shard holds it; unchanged.
        augmentation: identity for validation.
        img_size: side S of the patch, px.
        expansion_ratio: side of the square over the longer side of `hand_bbox`.
        position: place in the data order, handed through.
    """
    view = view_of_patch(sample, augmentation, img_size, expansion_ratio)
    patch = augment_pixels(warp_image(sample.image, view, img_size), augmentation.pixel)
    planes = np.empty((3, img_size, img_size), np.uint8)
    cv2.split(patch, list(planes))
    valid_2d, valid_3d = sample.joint_2d_valid[:, None], sample.joint_3d_valid[:, None]
    joint = sample.joint_img @ view.image_to_patch[:, :2].T + view.image_to_patch[:, 2]
    # Only a joint annotated as visible and yet behind the turned camera could divide by zero; it is kept finite.
    joint_patch = joint[:, :2] / np.maximum(joint[:, 2:], 1e-3)
    joint_cam, pose = sample.joint_cam, sample.mano_pose
    if not sample.is_right:
        joint_cam, pose = joint_cam * _MIRROR, mirror_pose(pose)
    if sample.has_mano:
        pose = turn_root(pose, view.cam_rot)
    return PatchSample(
        key=sample.key,
        source=sample.source,
        position=position,
        is_right=sample.is_right,
        patch=planes,
        patch_focal=np.array((view.focal, view.focal), np.float32),
        patch_princpt=view.princpt.astype(np.float32),
        cam_rot=view.cam_rot.astype(np.float32),
        image_to_patch=view.image_to_patch.astype(np.float32),
        joint_patch=(joint_patch * valid_2d).astype(np.float32),
        joint_2d_valid=sample.joint_2d_valid.astype(np.float32, copy=False),
        joint_cam=((joint_cam @ view.cam_rot.T) * valid_3d).astype(np.float32),
        joint_3d_valid=sample.joint_3d_valid.astype(np.float32, copy=False),
        mano_pose=(pose * sample.has_mano).astype(np.float32),
        mano_shape=(sample.mano_shape * sample.has_mano).astype(np.float32),
        has_mano=float(sample.has_mano),
        flat_hand_mean=sample.flat_hand_mean,
        has_intr=float(sample.has_intr),
    )


def padding_patch(img_size: int) -> PatchSample:
    """The row that fills up a validation batch: position -1, grey, every flag 0, every number finite."""
    return PatchSample(
        key="",
        source="",
        position=-1,
        is_right=True,
        patch=np.broadcast_to(np.array(_BORDER, np.uint8)[:, None, None], (3, img_size, img_size)).copy(),
        patch_focal=np.full(2, img_size, np.float32),
        patch_princpt=np.full(2, 0.5 * (img_size - 1), np.float32),
        cam_rot=np.eye(3, dtype=np.float32),
        image_to_patch=np.eye(3, dtype=np.float32),
        joint_patch=np.zeros((NUM_JOINT, 2), np.float32),
        joint_2d_valid=np.zeros(NUM_JOINT, np.float32),
        joint_cam=np.zeros((NUM_JOINT, 3), np.float32),
        joint_3d_valid=np.zeros(NUM_JOINT, np.float32),
        mano_pose=np.zeros(NUM_POSE, np.float32),
        mano_shape=np.zeros(NUM_SHAPE, np.float32),
        has_mano=0.0,
        flat_hand_mean=True,
        has_intr=0.0,
    )
