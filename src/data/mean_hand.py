"""The image-independent baseline: one answer for every image, computed from labels of the training set alone.

Shape legend: N hands, B batch, J = 21 joints, V vertices, S patch side.

What a metric compares decides what the best constant answer is, so there is one for each:
  * root-relative joints and vertices: their means over the training set, each about its wrist;
  * joints after Procrustes alignment: the hand model with the mean rotation of each joint and the mean shape;
  * the wrist in the camera: the mean place in the patch and the mean width of the patch, in mm at the wrist's depth;
  * joints in the camera: that wrist plus the mean root-relative joints.
A network that is not better than these has learned nothing of the kind from its images.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from src.data.augment import identity_augmentation
from src.data.crop import PatchSample, turn_samples
from src.data.dataset import HandDataset
from src.data.sample import annotated_sample
from src.data.shards.errors import SampleError
from src.geometry.camera import project, unproject
from src.hand.mano import ManoLayer
from src.hand.skeleton import HandArrays

_POSED_TOGETHER = 250
# Decimals of mm that are kept of a posed hand: the order in which a matrix product adds up depends on the number of
# threads, and must not reach the logs.
_DECIMALS = 4


@dataclass(frozen=True)
class HandLabels:
    """Labels of N hands in their patch cameras, without augmentation; each as in src/batch.py, as numpy array."""

    joint_cam: np.ndarray  # [N, J, 3] mm
    joint_3d_valid: np.ndarray  # [N, J]
    mano_pose: np.ndarray  # [N, 48]
    mano_shape: np.ndarray  # [N, 10]
    has_mano: np.ndarray  # [N]
    flat_hand_mean: np.ndarray  # [N] bool
    has_intr: np.ndarray  # [N]
    patch_focal: np.ndarray  # [N, 2] px
    patch_princpt: np.ndarray  # [N, 2] px


@dataclass(frozen=True)
class MeanHand:
    """The constant answers; None where the training set has no label of the kind."""

    joint_rel: np.ndarray | None = None  # [J, 3] mm about the wrist
    joint_posed: np.ndarray | None = None  # [J, 3] mm, mean articulation; its orientation and size mean nothing
    vert_rel: np.ndarray | None = None  # [V, 3] mm about the wrist
    wrist_offset: np.ndarray | None = None  # [2] from the patch's centre, in sides of the patch
    patch_width: float | None = None  # mm that the patch's side spans at the wrist's depth: depth * S / focal

    def root_cam(self, focal: np.ndarray, princpt: np.ndarray, img_size: int) -> np.ndarray | None:
        """The wrist [B, 3] mm in patch cameras with this focal [B, 2] and princpt [B, 2] px; None where not known."""
        if self.wrist_offset is None or self.patch_width is None:
            return None
        pixel = 0.5 * (img_size - 1) + img_size * self.wrist_offset
        depth = self.patch_width * focal[:, 0] / img_size
        return unproject(np.broadcast_to(pixel, (len(focal), 1, 2)), depth[:, None], focal, princpt)[:, 0]


def mean_hand(dataset: HandDataset, hand: HandArrays, max_sample: int = 2000) -> MeanHand:
    """The baseline from the first `max_sample` positions of the training order, left hands mirrored. The same whatever
    the number of processes and workers; decodes no image."""
    return mean_of(training_labels(dataset, max_sample), hand, dataset.img_size)


def training_labels(dataset: HandDataset, max_sample: int) -> HandLabels:
    """Labels of the first positions of `dataset`, cropped as in validation. Images are neither read nor decoded."""
    rows: list[PatchSample] = []
    patch = [np.empty((3, dataset.img_size, dataset.img_size), np.uint8)]
    for position in range(min(max_sample, len(dataset))):
        try:
            clip, number = dataset.annotation(dataset.plan.locate(position))
            # The image's size would give a camera where none is known: there only root-relative labels are used.
            size = (int(max(clip.hand_bbox[number, 2], 0)) + 1, int(max(clip.hand_bbox[number, 3], 0)) + 1)
            sample = annotated_sample(clip, number, size, "", dataset.hand_model)
            rows += turn_samples([sample], [identity_augmentation()], patch, dataset.expansion_ratio, [position])[0]
        except (SampleError, OSError, ValueError, ArithmeticError):
            continue  # reported when training reads it
    return HandLabels(**{f.name: np.array([getattr(row, f.name) for row in rows]) for f in fields(HandLabels)})


def mean_of(labels: HandLabels, hand: HandArrays, img_size: int) -> MeanHand:
    """The constant answers for these labels, from patches with a side of `img_size` px."""
    if not len(labels.has_mano):
        return MeanHand()
    posed, vert = _mean_hand_model(labels, hand)
    offset, width = _mean_place(labels, img_size)
    return MeanHand(_mean_joints(labels), posed, vert, offset, width)


def _mean_joints(labels: HandLabels) -> np.ndarray | None:
    """Mean wrist-relative joints [J, 3]; None where no hand has its wrist."""
    valid = (labels.joint_3d_valid * labels.joint_3d_valid[:, :1]).astype(np.float64)[..., None]
    relative = (labels.joint_cam - labels.joint_cam[:, :1]).astype(np.float64)
    count = valid.sum(axis=0)
    return (relative * valid).sum(axis=0) / np.maximum(count, 1) if count[0] > 0 else None


@torch.no_grad()
def _mean_hand_model(labels: HandLabels, hand: HandArrays) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Joints [J, 3] of the mean articulation and mean vertices [V, 3], about the wrist; None without MANO labels."""
    known = labels.has_mano > 0
    if not known.any():
        return None, None
    layer = ManoLayer(hand).double()
    names = ("mano_pose", "mano_shape", "flat_hand_mean")
    pose, shape, is_flat = (torch.from_numpy(getattr(labels, name)[known]) for name in names)
    rotmat, shape = layer.pose_to_rotmat(pose, is_flat), shape.double()
    total = torch.zeros(layer.num_vertex, 3, dtype=torch.float64)
    for some in torch.arange(len(pose)).split(_POSED_TOGETHER):
        total += layer(rotmat[some], shape[some]).vert.sum(dim=0)
    articulated = layer(mean_rotation(rotmat)[None], shape.mean(dim=0, keepdim=True)).joint[0]
    return articulated.numpy().round(_DECIMALS), (total / len(pose)).numpy().round(_DECIMALS)


def mean_rotation(rotmat: torch.Tensor) -> torch.Tensor:
    """The rotations nearest to the means of rotation matrices [N, ..., 3, 3], in the Frobenius norm. [..., 3, 3]"""
    left, _, right = torch.linalg.svd(rotmat.mean(dim=0))
    sign = torch.ones(left.shape[:-1], dtype=left.dtype)
    sign[..., 2] = torch.linalg.det(left @ right)
    return (left * sign[..., None, :]) @ right


def _mean_place(labels: HandLabels, img_size: int) -> tuple[np.ndarray | None, float | None]:
    """`wrist_offset` and `patch_width` over the hands with a camera, a wrist and a depth; None where there is none."""
    wrist = labels.joint_cam[:, 0].astype(np.float64)
    known = (labels.has_intr > 0) & (labels.joint_3d_valid[:, 0] > 0) & (wrist[:, 2] > 0)
    if not known.any():
        return None, None
    wrist, focal = wrist[known], labels.patch_focal[known].astype(np.float64)
    pixel = project(wrist[:, None], focal, labels.patch_princpt[known].astype(np.float64))[:, 0]
    offset = (pixel - 0.5 * (img_size - 1)).mean(axis=0) / img_size
    return offset, float((wrist[:, 2] * img_size / focal[:, 0]).mean())
