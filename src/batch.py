"""The contract between data, model, loss and metric: Sample, Batch and Prediction, every field with shape and unit.

Shape legend: B batch, J = 21 joints (OpenPose order), S patch side, G tokens along it, V vertices of the hand model.

Frames and conventions
  * Lengths are millimetres, angles radians, `_img` is pixels of the source image, `_patch` pixels of the square patch.
  * Pixel centres are at integer coordinates (OpenCV's convention), for images, patches and principal points.
  * The camera frame is x right, y down, z forward (OpenCV).
  * Every hand in a Batch is a right hand: left hands are mirrored (`is_right` is the original side).
  * The *patch camera* is the pinhole camera that would have taken the patch: intrinsics `patch_focal`, `patch_princpt`,
    rotated by `cam_rot` relative to the (mirrored) source camera. All 3D quantities of a Batch and of a Prediction are
    in its frame, so that `project(joint_cam, patch_focal, patch_princpt)` equals `joint_patch`.
  * MANO pose is 16 x axis-angle, root first. `flat_hand_mean` True: the angles are the joint rotations themselves;
    False: the model's mean pose must be added first. A Prediction always uses True.
  * Unknown values are zero with their flag 0, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

NUM_JOINT = 21
NUM_POSE = 48
NUM_SHAPE = 10


@dataclass
class Sample:
    """One hand in one image as stored in the shard (numpy, float32 unless noted), before mirroring and cropping."""

    key: str  # unique within a data set: "<shard key>/<frame>"
    source: str  # name of the data set
    image: np.ndarray  # [H, W, 3] uint8 RGB
    is_right: bool
    hand_bbox: np.ndarray  # [4] xyxy px
    joint_img: np.ndarray  # [J, 2] px
    joint_2d_valid: np.ndarray  # [J] 0 or 1
    joint_cam: np.ndarray  # [J, 3] mm; only joint_cam - joint_cam[0] is meaningful where has_intr is 0
    joint_3d_valid: np.ndarray  # [J] 0 or 1
    mano_pose: np.ndarray  # [48] axis-angle
    mano_shape: np.ndarray  # [10]
    has_mano: bool  # the MANO parameters are known, and of the hand model in use
    flat_hand_mean: bool
    focal: np.ndarray  # [2] px; stated in the shard or guessed where has_intr is 0
    princpt: np.ndarray  # [2] px
    has_intr: bool


@dataclass
class Batch:
    """Inputs and targets of a step. `patch` is uint8 and is normalised on the device.

    Data workers fill a Batch of numpy arrays; src/data/loader.py turns them into tensors.
    """

    key: list[str]
    source: list[str]
    position: torch.Tensor  # [B] int64: position in the data order; -1: padding of a validation batch
    is_right: torch.Tensor  # [B] bool, side of the hand in the source image
    patch: torch.Tensor  # [B, 3, S, S] uint8 RGB
    patch_focal: torch.Tensor  # [B, 2] px
    patch_princpt: torch.Tensor  # [B, 2] px
    cam_rot: torch.Tensor  # [B, 3, 3]: x_patch_camera = cam_rot @ x_(mirrored)source_camera
    image_to_patch: torch.Tensor  # [B, 3, 3] homography from source image px to patch px (mirror included)
    joint_patch: torch.Tensor  # [B, J, 2] px
    joint_2d_valid: torch.Tensor  # [B, J] 0 or 1
    joint_cam: torch.Tensor  # [B, J, 3] mm, patch camera
    joint_3d_valid: torch.Tensor  # [B, J] 0 or 1
    mano_pose: torch.Tensor  # [B, 48] axis-angle, root rotated into the patch camera
    mano_shape: torch.Tensor  # [B, 10]
    has_mano: torch.Tensor  # [B] 0 or 1
    flat_hand_mean: torch.Tensor  # [B] bool
    has_intr: torch.Tensor  # [B] 0 or 1

    def __len__(self) -> int:
        return self.patch.shape[0]

    def map(self, func: Callable[[Any], Any]) -> Batch:
        """A new Batch with `func` applied to every tensor (or numpy array)."""
        new = {f.name: func(v) for f in fields(self) if hasattr(v := getattr(self, f.name), "dtype")}
        return replace(self, **new)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self.map(lambda t: t.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory alive until `stream` has used it, although another stream allocated it."""
        for f in fields(self):
            if hasattr(value := getattr(self, f.name), "record_stream"):
                value.record_stream(stream)


@dataclass
class Prediction:
    """The output of PoseNet, in the patch camera; float32 for any autocast dtype."""

    mano_rotmat: torch.Tensor  # [B, 16, 3, 3] rotation of each MANO joint (flat_hand_mean=True), root first
    mano_pose: torch.Tensor  # [B, 48] the same as axis-angle
    mano_shape: torch.Tensor  # [B, 10]
    root_cam: torch.Tensor  # [B, 3] mm, wrist joint in the patch camera
    joint_cam: torch.Tensor  # [B, J, 3] mm
    vert_cam: torch.Tensor  # [B, V, 3] mm
    joint_patch: torch.Tensor  # [B, J, 2] px, projection of joint_cam
    joint_seen: torch.Tensor  # [B, J, 2] px, 2D keypoints predicted in the patch, before any 3D
    joint_heat: torch.Tensor | None = None  # [B, G, G, J] log weights of the tokens' votes (row, column)
