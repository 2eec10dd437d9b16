"""From Samples to the rows of a Batch: one homography moves image, 2D, 3D and MANO root together.

src/geometry/patch.py defines the camera of a patch, src/data/augment.py draws its roll, tilt, zoom and shift. Labels
are computed for all samples of a batch at once (`patch_labels`), images are cropped one by one (`fill_patch`).
Shape legend: N samples, J = 21 joints, S patch side. Computed in float64, stored as float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from src.batch import NUM_JOINT, NUM_POSE, NUM_SHAPE, Batch, Sample
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
    views_of_patches,
)


def empty_batch(num: int, img_size: int) -> Batch:
    """A Batch of `num` rows whose values are not set yet; numpy arrays in place of tensors."""

    def empty(*shape: int, dtype: type = np.float32) -> np.ndarray:
        return np.empty((num, *shape), dtype)

    return Batch(
        key=[""] * num,
        source=[""] * num,
        position=empty(dtype=np.int64),
        is_right=empty(dtype=np.bool_),
        patch=empty(3, img_size, img_size, dtype=np.uint8),
        patch_focal=empty(2),
        patch_princpt=empty(2),
        cam_rot=empty(3, 3),
        image_to_patch=empty(3, 3),
        joint_patch=empty(NUM_JOINT, 2),
        joint_2d_valid=empty(NUM_JOINT),
        joint_cam=empty(NUM_JOINT, 3),
        joint_3d_valid=empty(NUM_JOINT),
        mano_pose=empty(NUM_POSE),
        mano_shape=empty(NUM_SHAPE),
        has_mano=empty(),
        flat_hand_mean=empty(dtype=np.bool_),
        has_intr=empty(),
    )


def pad_rows(batch: Batch, rows: Sequence[int]) -> None:
    """Turn `rows` into padding: position -1, a grey patch, every flag 0, every number finite."""
    img_size = batch.patch.shape[-1]
    values = {name: 0 for name, value in vars(batch).items() if isinstance(value, np.ndarray)} | {
        "position": -1,
        "is_right": True,
        "patch": np.array(BORDER, np.uint8)[:, None, None],
        "patch_focal": img_size,
        "patch_princpt": 0.5 * (img_size - 1),
        "cam_rot": np.eye(3),
        "image_to_patch": np.eye(3),
        "flat_hand_mean": True,
    }
    _set_rows(batch, rows, values)
    for row in rows:
        batch.key[row] = batch.source[row] = ""


def _set_rows(batch: Batch, rows: Sequence[int], values: dict[str, np.ndarray]) -> None:
    for name, value in values.items():
        getattr(batch, name)[list(rows)] = value


def crop_samples(
    samples: Sequence[Sample], augmentations: Sequence[Augmentation], img_size: int, expansion_ratio: float
) -> Batch:
    """Crop the hands out of their images. Each row is equal to the bit whatever the other samples are.

    Args:
        samples: N samples with their images; unchanged.
        augmentations: one per sample; the identity for validation.
        img_size: side S of the patch, px.
        expansion_ratio: side of the crop over the longer side of `hand_bbox`.

    Returns:
        A Batch of N rows as numpy arrays; positions 0 .. N - 1.
    """
    batch = empty_batch(len(samples), img_size)
    batch.position[:] = np.arange(len(samples))
    view = fill_labels(batch, range(len(samples)), samples, augmentations, expansion_ratio)
    warps = plan_warps([sample.image.shape[1::-1] for sample in samples], view, img_size)
    for patch, sample, warp, augmentation in zip(batch.patch, samples, warps, augmentations):
        fill_patch(patch, sample.image, warp, augmentation.pixel)
    return batch


def fill_patch(patch: np.ndarray, image: np.ndarray, warp: Warp | None, pixel: PixelAugmentation) -> None:
    """Write the crop of `image` [H, W, 3] uint8 into `patch` [3, S, S] uint8."""
    cv2.split(augment_pixels(apply_warp(image, warp, patch.shape[-1]), pixel), list(patch))


def fill_labels(
    batch: Batch,
    rows: Sequence[int],
    samples: Sequence[Sample],
    augmentations: Sequence[Augmentation],
    expansion_ratio: float,
) -> PatchView:
    """Write key, source and labels of N samples into N `rows` of `batch`; returns their patch cameras."""
    labels, view = patch_labels(samples, augmentations, batch.patch.shape[-1], expansion_ratio)
    _set_rows(batch, rows, labels)
    for row, sample in zip(rows, samples):
        batch.key[row], batch.source[row] = sample.key, sample.source
    return view


def patch_labels(
    samples: Sequence[Sample], augmentations: Sequence[Augmentation], img_size: int, expansion_ratio: float
) -> tuple[dict[str, np.ndarray], PatchView]:
    """Labels of N samples in their patch cameras, named and shaped as in Batch, and those cameras.

    The samples' images are not used. Arguments as in `crop_samples`.
    """
    aims = [
        Aim(s.hand_bbox, s.focal, s.princpt, s.is_right, expansion_ratio, a.roll, a.tilt, a.zoom, a.shift)
        for s, a in zip(samples, augmentations, strict=True)
    ]
    view = views_of_patches(aims, img_size)
    labels = {
        "is_right": np.array([sample.is_right for sample in samples]),
        "patch_focal": np.stack([view.focal, view.focal], axis=1),
        "patch_princpt": view.princpt,
        "cam_rot": view.cam_rot,
        "image_to_patch": view.image_to_patch,
        **_joint_labels(samples, view),
        **_mano_labels(samples, view),
        "flat_hand_mean": np.array([sample.flat_hand_mean for sample in samples]),
        "has_intr": _stack(samples, "has_intr"),
    }
    for name in labels.keys() - {"is_right", "flat_hand_mean"}:
        labels[name] = labels[name].astype(np.float32)
    return labels, view


def _stack(samples: Sequence[Sample], name: str) -> np.ndarray:
    """[N, ...] one field of all samples, float64."""
    return np.array([getattr(sample, name) for sample in samples], np.float64)


def _mirror(samples: Sequence[Sample], axes: np.ndarray) -> np.ndarray:
    """[N, 1, 3] factors that turn every hand into a right hand: `axes` for left hands, ones for right hands."""
    return np.array([np.ones(3) if sample.is_right else axes for sample in samples])[:, None]


def _joint_labels(samples: Sequence[Sample], view: PatchView) -> dict[str, np.ndarray]:
    """Joints in patch px [N, J, 2] and in the patch camera [N, J, 3] mm with their flags; unknown joints are 0."""
    valid_2d, valid_3d = _stack(samples, "joint_2d_valid"), _stack(samples, "joint_3d_valid")
    homography = view.image_to_patch
    joint = _stack(samples, "joint_img") @ homography[..., :2].swapaxes(1, 2) + homography[:, None, :, 2]
    # Only a joint annotated as visible that is behind the rotated camera could divide by zero; keep it finite.
    joint_patch = joint[..., :2] / np.maximum(joint[..., 2:], 1e-3)
    joint_cam = (_stack(samples, "joint_cam") * _mirror(samples, MIRROR)) @ view.cam_rot.swapaxes(1, 2)
    return {
        "joint_patch": joint_patch * valid_2d[..., None],
        "joint_2d_valid": valid_2d,
        "joint_cam": joint_cam * valid_3d[..., None],
        "joint_3d_valid": valid_3d,
    }


def _mano_labels(samples: Sequence[Sample], view: PatchView) -> dict[str, np.ndarray]:
    """MANO pose [N, 48] (axis-angle, root in the patch camera), shape [N, 10] and their flag; unknown ones are 0."""
    has_mano = _stack(samples, "has_mano")[:, None]
    pose = _stack(samples, "mano_pose").reshape(len(samples), -1, 3) * _mirror(samples, MIRROR_AXIS)
    pose, known = pose.reshape(len(samples), -1), np.flatnonzero(has_mano)
    pose[known] = turn_roots(pose[known], view.cam_rot[known])
    shape = _stack(samples, "mano_shape")
    return {"mano_pose": pose * has_mano, "mano_shape": shape * has_mano, "has_mano": has_mano[:, 0]}
