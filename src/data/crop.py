"""From a Sample to a row of a Batch: one homography moves image, 2D, 3D and MANO root together.

The camera that takes the patch is that of src/geometry/patch.py; turn, zoom and shift are drawn in src/data/augment.py.
All samples of a batch are turned at once (`turn_samples`); their pictures are cut one by one (`fill_patch`).
Shape legend: N samples, J = 21 joints, S patch side. Computed in float64, returned in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from src.batch import NUM_JOINT, NUM_POSE, NUM_SHAPE, Sample
from src.data.augment import Augmentation, PixelAugmentation, augment_pixels
from src.geometry.patch import (
    BORDER,
    MIRROR,
    MIRROR_AXIS,
    Aim,
    PatchView,
    Warp,
    apply_warp,
    plan_warps,
    turn_roots,
    view_of_patch,
    views_of_patches,
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
    return view_of_patch(_aim(sample, augmentation, expansion_ratio), img_size)


def _aim(sample: Sample, augmentation: Augmentation, expansion_ratio: float) -> Aim:
    turn = (augmentation.roll, augmentation.tilt, augmentation.zoom, augmentation.shift)
    return Aim(sample.hand_bbox, sample.focal, sample.princpt, sample.is_right, expansion_ratio, *turn)


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
    return crop_samples([sample], [augmentation], img_size, expansion_ratio, [position])[0]


def crop_samples(
    samples: Sequence[Sample],
    augmentations: Sequence[Augmentation],
    img_size: int,
    expansion_ratio: float,
    positions: Sequence[int],
) -> list[PatchSample]:
    """As `crop_sample`, of N samples: at a fraction of the cost, and to the bit the same."""
    patches = np.empty((len(samples), 3, img_size, img_size), np.uint8)
    rows, views = turn_samples(samples, augmentations, patches, expansion_ratio, positions)
    warps = plan_warps([sample.image.shape[1::-1] for sample in samples], views, img_size)
    for patch, sample, warp, augmentation in zip(patches, samples, warps, augmentations):
        fill_patch(patch, sample.image, warp, augmentation.pixel)
    return rows


def fill_patch(planes: np.ndarray, image: np.ndarray, warp: Warp | None, pixel: PixelAugmentation) -> None:
    """Paint the patch [3, S, S] uint8 from `image` [H, W, 3] uint8."""
    cv2.split(augment_pixels(apply_warp(image, warp, planes.shape[-1]), pixel), list(planes))


def turn_samples(
    samples: Sequence[Sample],
    augmentations: Sequence[Augmentation],
    patches: Sequence[np.ndarray],
    expansion_ratio: float,
    positions: Sequence[int],
) -> tuple[list[PatchSample], PatchView]:
    """The annotations of N samples as their patch cameras see them, beside `patches` [3, S, S] still to be painted; and
    those cameras. Other arguments as `crop_sample`, one for each sample; the images are not looked at."""
    aims = [_aim(sample, augmentation, expansion_ratio) for sample, augmentation in zip(samples, augmentations)]
    view = views_of_patches(aims, patches[0].shape[-1])
    labels = {
        "patch_focal": np.stack([view.focal, view.focal], axis=1),
        "patch_princpt": view.princpt,
        "cam_rot": view.cam_rot,
        "image_to_patch": view.image_to_patch,
        **_turned_joints(samples, view),
        **_turned_hands(samples, view),
    }
    labels = {name: value.astype(np.float32, copy=False) for name, value in labels.items()}
    rows = [
        PatchSample(
            key=sample.key,
            source=sample.source,
            position=position,
            is_right=sample.is_right,
            patch=patch,
            has_mano=float(sample.has_mano),
            flat_hand_mean=sample.flat_hand_mean,
            has_intr=float(sample.has_intr),
            **{name: values[i] for name, values in labels.items()},
        )
        for i, (sample, position, patch) in enumerate(zip(samples, positions, patches))
    ]
    return rows, view


def _stack(samples: Sequence[Sample], name: str) -> np.ndarray:
    """[N, ...] one field of all samples, float64."""
    return np.array([getattr(sample, name) for sample in samples], np.float64)


def _mirror(samples: Sequence[Sample], axes: np.ndarray) -> np.ndarray:
    """[N, 1, 3] the factors that make a right hand of each sample's: `axes` where it is a left one."""
    return np.array([np.ones(3) if sample.is_right else axes for sample in samples])[:, None]


def _turned_joints(samples: Sequence[Sample], view: PatchView) -> dict[str, np.ndarray]:
    """The joints' labels, float64: [N, J, 2] px of the patch, [N, J, 3] mm, 0 where they are not known."""
    valid_2d, valid_3d = _stack(samples, "joint_2d_valid"), _stack(samples, "joint_3d_valid")
    homography = view.image_to_patch
    joint = _stack(samples, "joint_img") @ homography[..., :2].swapaxes(1, 2) + homography[:, None, :, 2]
    # Only a joint annotated as visible and yet behind the turned camera could divide by zero; it is kept finite.
    joint_patch = joint[..., :2] / np.maximum(joint[..., 2:], 1e-3)
    joint_cam = (_stack(samples, "joint_cam") * _mirror(samples, MIRROR)) @ view.cam_rot.swapaxes(1, 2)
    return {
        "joint_patch": joint_patch * valid_2d[..., None],
        "joint_2d_valid": valid_2d,
        "joint_cam": joint_cam * valid_3d[..., None],
        "joint_3d_valid": valid_3d,
    }


def _turned_hands(samples: Sequence[Sample], view: PatchView) -> dict[str, np.ndarray]:
    """The MANO parameters, float64: [N, 48] axis-angle and [N, 10], 0 where they are not known."""
    has_mano = _stack(samples, "has_mano")[:, None]
    pose = _stack(samples, "mano_pose").reshape(len(samples), -1, 3) * _mirror(samples, MIRROR_AXIS)
    pose, known = pose.reshape(len(samples), -1), np.flatnonzero(has_mano)
    pose[known] = turn_roots(pose[known], view.cam_rot[known])
    return {"mano_pose": pose * has_mano, "mano_shape": _stack(samples, "mano_shape") * has_mano}


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
