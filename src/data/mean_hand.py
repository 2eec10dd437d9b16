"""The image-independent baseline ("mean hand"): one prediction for all images, from the training labels alone.

Shape legend: N hands, B batch, J = 21 joints, V vertices, S patch side.

The best constant prediction depends on the metric, so there is one for each:
  * root-relative joints and vertices: their means over the training set, relative to the wrist;
  * joints after Procrustes alignment: the hand model with the mean rotation of each joint and the mean shape;
  * the wrist in the camera: its mean position in the patch, and the mean width of the patch in mm at the wrist's depth;
  * joints in the camera: that wrist plus the mean root-relative joints.
A network that does not beat these has learned nothing useful from the images.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from src.batch import Batch
from src.data.augment import Augmentation
from src.data.crop import patch_labels
from src.data.dataset import HandDataset
from src.data.sample import annotated_sample
from src.data.shards.errors import SampleError
from src.geometry.camera import project, unproject
from src.hand.mano import ManoLayer
from src.hand.skeleton import HandArrays

_POSE_BATCH = 250
_DECIMALS = 4  # of mm, kept of posed hands: a matrix product's last bits depend on the number of threads


@dataclass(frozen=True)
class MeanHand:
    """The constant predictions; None where the training set has no such labels."""

    joint_rel: np.ndarray | None = None  # [J, 3] mm, relative to the wrist
    joint_posed: np.ndarray | None = None  # [J, 3] mm, mean articulation; orientation and size are arbitrary
    vert_rel: np.ndarray | None = None  # [V, 3] mm, relative to the wrist
    wrist_offset: np.ndarray | None = None  # [2] from the centre of the patch, as a fraction of its side
    patch_width: float | None = None  # mm that the patch's side spans at the wrist's depth: depth * S / focal

    def root_cam(self, focal: np.ndarray, princpt: np.ndarray, img_size: int) -> np.ndarray | None:
        """The wrist [B, 3] mm in patch cameras with this focal [B, 2] and princpt [B, 2] px; None if unknown."""
        if self.wrist_offset is None or self.patch_width is None:
            return None
        pixel = 0.5 * (img_size - 1) + img_size * self.wrist_offset
        depth = self.patch_width * focal[:, 0] / img_size
        return unproject(np.broadcast_to(pixel, (len(focal), 1, 2)), depth[:, None], focal, princpt)[:, 0]


def mean_hand(dataset: HandDataset, hand: HandArrays, max_sample: int = 2000) -> MeanHand:
    """The baseline from the first `max_sample` positions of the training order, left hands mirrored.

    Does not depend on the number of processes and workers; decodes no image.
    """
    found = []
    for position in range(min(max_sample, len(dataset))):
        try:
            clip, number = dataset.annotation(dataset.plan.locate(position))
            # The image size only matters for a guessed camera, and there only root-relative labels are used.
            size = (int(max(clip.hand_bbox[number, 2], 0)) + 1, int(max(clip.hand_bbox[number, 3], 0)) + 1)
            sample = annotated_sample(clip, number, size, "", dataset.hand_model)
            labels, _ = patch_labels([sample], [Augmentation()], dataset.img_size, dataset.expansion_ratio)
            found.append(labels)
        except (SampleError, OSError, ValueError, ArithmeticError):
            continue  # reported when training reads it
    if not found:
        return MeanHand()
    columns = {name: np.concatenate([labels[name] for labels in found]) for name in found[0]}
    return mean_of(SimpleNamespace(**columns), hand, dataset.img_size)


def mean_of(labels: Batch, hand: HandArrays, img_size: int) -> MeanHand:
    """The baseline of these labels, from patches with a side of `img_size` px.

    Args: labels: the fields of a Batch without augmentation, as numpy arrays; images are not needed.
    """
    posed, vert = _mean_hand_model(labels, hand)
    offset, width = _mean_position(labels, img_size)
    return MeanHand(_mean_joints(labels), posed, vert, offset, width)


def _mean_joints(labels: Batch) -> np.ndarray | None:
    """Mean wrist-relative joints [J, 3]; None if a joint is not known, together with the wrist, in any hand."""
    valid = (labels.joint_3d_valid * labels.joint_3d_valid[:, :1]).astype(np.float64)[..., None]
    relative = (labels.joint_cam - labels.joint_cam[:, :1]).astype(np.float64)
    count = valid.sum(axis=0)
    return (relative * valid).sum(axis=0) / count if count.all() else None


@torch.no_grad()
def _mean_hand_model(labels: Batch, hand: HandArrays) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Joints [J, 3] of the mean articulation and mean vertices [V, 3], wrist-relative; None without MANO labels."""
    known = labels.has_mano > 0
    if not known.any():
        return None, None
    layer = ManoLayer(hand).double()
    names = ("mano_pose", "mano_shape", "flat_hand_mean")
    pose, shape, is_flat = (torch.from_numpy(getattr(labels, name)[known]) for name in names)
    rotmat, shape = layer.pose_to_rotmat(pose, is_flat), shape.double()
    total = torch.zeros(layer.num_vertex, 3, dtype=torch.float64)
    for some in torch.arange(len(pose)).split(_POSE_BATCH):
        total += layer(rotmat[some], shape[some]).vert.sum(dim=0)
    articulated = layer(mean_rotation(rotmat)[None], shape.mean(dim=0, keepdim=True)).joint[0]
    return articulated.numpy().round(_DECIMALS), (total / len(pose)).numpy().round(_DECIMALS)


def mean_rotation(rotmat: torch.Tensor) -> torch.Tensor:
    """[..., 3, 3] the rotations closest to the mean of rotation matrices [N, ..., 3, 3] in the Frobenius norm."""
    left, _, right = torch.linalg.svd(rotmat.mean(dim=0))
    sign = torch.ones(left.shape[:-1], dtype=left.dtype)
    sign[..., 2] = torch.linalg.det(left @ right)
    return (left * sign[..., None, :]) @ right


def _mean_position(labels: Batch, img_size: int) -> tuple[np.ndarray | None, float | None]:
    """`wrist_offset` and `patch_width` over the hands with known camera, wrist and depth; None if there are none."""
    wrist = labels.joint_cam[:, 0].astype(np.float64)
    known = (labels.has_intr > 0) & (labels.joint_3d_valid[:, 0] > 0) & (wrist[:, 2] > 0)
    if not known.any():
        return None, None
    wrist, focal = wrist[known], labels.patch_focal[known].astype(np.float64)
    pixel = project(wrist[:, None], focal, labels.patch_princpt[known].astype(np.float64))[:, 0]
    offset = (pixel - 0.5 * (img_size - 1)).mean(axis=0) / img_size
    return offset, float((wrist[:, 2] * img_size / focal[:, 0]).mean())
