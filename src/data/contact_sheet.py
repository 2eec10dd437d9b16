"""A contact sheet of the loader's output: patches with joints, before and after strong augmentation.

Each hand has three rows: the plain crop, an augmented crop, and the augmented crop with the 3D joints projected by the
patch camera. All three skeletons must match the hand: the second shows that image and 2D joints move together, the
third that camera and 3D joints do.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import cv2
import numpy as np

from src.batch import Batch
from src.data.augment import NUM_UNIFORM, Augmentation, draw_augmentation
from src.data.crop import crop_samples
from src.data.dataset import HandDataset
from src.data.order.plan import FixedPlan, Place, SourcePlan
from src.data.rng import uniforms
from src.data.shards.index import ShardIndex
from src.utils.vis import draw_skeleton, tile

# Stronger than any choice in config/augmentation, so that errors in the geometry are obvious.
STRONG = SimpleNamespace(
    rot_max=180.0,
    persp_rot_max=35.0,
    scale_z_range=[0.8, 1.3],
    scale_f_range=[0.9, 1.1],
    shift_max=0.15,
    brightness=0.4,
    contrast=0.4,
    saturation=0.5,
    noise_std=12.0,
    blur_max=2.0,
    occlusion_prob=0.4,
)


def spread_places(shards: Sequence[ShardIndex], num: int) -> list[Place]:
    """`num` evenly spaced places among all healthy frames of the shards, or all of them if there are fewer."""
    source = SourcePlan(shards, stride=1, seed=0)
    frames = np.linspace(0, source.num_frame - 1, min(num, source.num_frame)).round().astype(int)
    return [Place(0, *source.split(frame)) for frame in np.unique(frames).tolist()]


def contact_sheet(
    shards: Sequence[ShardIndex], num_hand: int = 24, num_column: int = 8, side: int = 224, expansion_ratio: float = 2.0
) -> np.ndarray | None:
    """The sheet as uint8 RGB, `num_column` hands side by side; None if the shards have no usable frame.

    Args:
        shards: indexes; the hands are spaced evenly over their frames.
        side: of a patch, px; expansion_ratio: side of the crop over the longer side of the hand's box.
    """
    places = spread_places(shards, num_hand)
    dataset = HandDataset(
        [shards], FixedPlan(places), stride=1, hand_model="", img_size=side, expansion_ratio=expansion_ratio
    )
    columns = []
    for number, place in enumerate(places):
        strong = draw_augmentation(uniforms("sheet", number, num=NUM_UNIFORM), STRONG)
        try:
            batch = crop_samples([dataset.read(place)] * 2, [Augmentation(), strong], side, expansion_ratio)
        except Exception:
            continue  # counted where the loader reads it
        columns.append((_with_2d(batch, 0), _with_2d(batch, 1), _with_3d(batch, 1)))
    if not columns:
        return None
    rows = []
    for begin in range(0, len(columns), num_column):
        group = columns[begin : begin + num_column]
        blank = [np.full_like(group[0][0], 24)] * (min(num_column, len(columns)) - len(group))
        rows += [image for row in zip(*group, strict=True) for image in (*row, *blank)]
    return tile(rows, min(num_column, len(columns)))


def _patch(batch: Batch, row: int) -> np.ndarray:
    return np.ascontiguousarray(batch.patch[row].transpose(1, 2, 0))


def _with_2d(batch: Batch, row: int) -> np.ndarray:
    """The patch with its 2D joints, labelled with side and data set."""
    image = draw_skeleton(_patch(batch, row), batch.joint_patch[row], batch.joint_2d_valid[row])
    return _label(image, f"{'right' if batch.is_right[row] else 'left, mirrored'} {batch.source[row]}")


def _with_3d(batch: Batch, row: int) -> np.ndarray:
    """The patch with its 3D joints projected by the patch camera, where joints and camera are known."""
    joint_cam, valid = batch.joint_cam[row], batch.joint_3d_valid[row]
    if not (batch.has_intr[row] and valid.any()):
        return _label(_patch(batch, row), "no 3D in a known camera")
    depth = np.maximum(joint_cam[:, 2:], 1.0)
    joint = joint_cam[:, :2] / depth * batch.patch_focal[row] + batch.patch_princpt[row]
    return _label(draw_skeleton(_patch(batch, row), joint, valid), "3D")


def _label(image: np.ndarray, text: str) -> np.ndarray:
    text = text.encode("ascii", "replace").decode()  # OpenCV cannot draw other characters
    font, origin = cv2.FONT_HERSHEY_SIMPLEX, (4, image.shape[0] - 6)
    cv2.putText(image, text, origin, font, 0.38, (0, 0, 0), 3, cv2.LINE_AA)
    return cv2.putText(image, text, origin, font, 0.38, (255, 255, 255), 1, cv2.LINE_AA)
