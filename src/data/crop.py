"""From a Sample to a row of a Batch: one homography moves image, 2D, 3D and MANO root together.

The camera that takes the patch is that of src/geometry/patch.py; turn, zoom and shift are drawn in src/data/augment.py.
Shape legend: J = 21 joints, S patch side. Computed in float64, returned in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from src.batch import NUM_JOINT, NUM_POSE, NUM_SHAPE, Sample
from src.data.augment import Augmentation, PixelAugmentation, augment_pixels
from src.geometry.patch import (
    BORDER,
    MIRROR,
    Aim,
    PatchView,
    Warp,
    apply_warp,
    mirror_pose,
    plan_warp,
    turn_root,
    view_of_patch,
)


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


def view_of_sample(sample: Sample, augmentation: Augmentation, img_size: int, expansion_ratio: float) -> PatchView:
    """The camera that looks at the hand of `sample`; a perspective turn that would leave the scene is dropped."""
    turn = (augmentation.roll, augmentation.tilt, augmentation.zoom, augmentation.shift)
    aim = Aim(sample.hand_bbox, sample.focal, sample.princpt, sample.is_right, expansion_ratio, *turn)
    return view_of_patch(aim, img_size)


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
    planes = np.empty((3, img_size, img_size), np.uint8)
    row, view = turn_sample(sample, augmentation, planes, expansion_ratio, position)
    fill_patch(planes, sample.image, plan_warp(sample.image.shape[1::-1], view, img_size), augmentation.pixel)
    return row


def fill_patch(planes: np.ndarray, image: np.ndarray, warp: Warp | None, pixel: PixelAugmentation) -> None:
    """Paint the patch [3, S, S] uint8 from `image` [H, W, 3] uint8."""
    cv2.split(augment_pixels(apply_warp(image, warp, planes.shape[-1]), pixel), list(planes))


def turn_sample(
    sample: Sample, augmentation: Augmentation, planes: np.ndarray, expansion_ratio: float, position: int = 0
) -> tuple[PatchSample, PatchView]:
    """The annotations of `sample` as its patch camera sees them, beside a patch `planes` [3, S, S] still to be painted;
    and that camera. Other arguments as `crop_sample`; the image is not looked at."""
    view = view_of_sample(sample, augmentation, planes.shape[-1], expansion_ratio)
    valid_2d, valid_3d = sample.joint_2d_valid[:, None], sample.joint_3d_valid[:, None]
    joint = sample.joint_img @ view.image_to_patch[:, :2].T + view.image_to_patch[:, 2]
    # Only a joint annotated as visible and yet behind the turned camera could divide by zero; it is kept finite.
    joint_patch = joint[:, :2] / np.maximum(joint[:, 2:], 1e-3)
    joint_cam, pose = sample.joint_cam, sample.mano_pose
    if not sample.is_right:
        joint_cam, pose = joint_cam * MIRROR, mirror_pose(pose)
    if sample.has_mano:
        pose = turn_root(pose, view.cam_rot)
    row = PatchSample(
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
    return row, view


def padding_patch(img_size: int, planes: np.ndarray | None = None) -> PatchSample:
    """The row that fills up a validation batch: position -1, grey (painted into `planes` if given), every flag 0, every
    number finite."""
    planes = np.empty((3, img_size, img_size), np.uint8) if planes is None else planes
    planes[:] = np.array(BORDER, np.uint8)[:, None, None]
    return PatchSample(
        key="",
        source="",
        position=-1,
        is_right=True,
        patch=planes,
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
