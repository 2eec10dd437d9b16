"""The hand camera: computed from the predicted 2D keypoints, it looks at their centre with the palm upright.

A patch is cut from anywhere in the source image, at any in-plane rotation. The same view of a hand therefore has a
different rotation in the patch camera for each position and each image rotation (allocentric versus egocentric
orientation: Kundu, Li, Rehg, "3D-RCNN", CVPR 2018, section 3.3). Both follow from the 2D keypoints alone. The decoder
gets the keypoints in the hand camera and the root rotation is predicted relative to it, so the network need not learn
the effect of camera rotation.

Shapes: B batch, J joints, N points. Elementwise operations, all in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from src.geometry.camera import pixel_ray

PALM = slice(5, 18, 4)  # joints 5, 9, 13, 17, the knuckles: the direction from the wrist to their mean is up
MIN_DEPTH = 0.1  # directions more than 84 degrees off the axis are clamped there
SHORT = 0.05  # patch sides: below about this length of the palm in 2D the roll fades out, its direction is noise


class HandFrame(NamedTuple):
    """The hand camera: same position as the patch camera, rotated."""

    rot: torch.Tensor  # [B, 3, 3]: x_patch_camera = rot @ x_hand_camera
    unit: torch.Tensor  # [B, 1] patch sides per unit of x/z: scales the view of a patch to a width of about one

    def project(self, pixel: torch.Tensor, focal: torch.Tensor, princpt: torch.Tensor) -> torch.Tensor:
        """Pixels of the patch projected into the hand camera, in patch sides relative to its axis.

        Args: pixel [B, N, 2] or [N, 2] px; focal, princpt [B, 2] px. Returns: [B, N, 2], y downwards.
        """
        return self.unit[:, None] * _rotate_back(pixel_ray(pixel, focal, princpt), self.rot)


def hand_frame(keypoint: torch.Tensor, focal: torch.Tensor, princpt: torch.Tensor, img_size: int) -> HandFrame:
    """The hand camera of 2D keypoints. It is detached: the keypoints are supervised by `loss_joint_seen` alone, and the
    roll of a hand that points at the camera is meaningless.

    Args: keypoint [B, J, 2] px of the patch; focal, princpt [B, 2] px; img_size: S, px.
    """
    ray = pixel_ray(keypoint.detach().float(), focal, princpt)
    middle = F.normalize(F.pad(ray, (0, 1), value=1.0), dim=-1).mean(dim=1)
    look = _shortest_rotation(F.normalize(middle, dim=-1))
    plane = _rotate_back(ray, look)
    unit = focal.mean(-1, keepdim=True) / img_size
    upwards = plane[:, PALM].mean(dim=1) - plane[:, 0]
    return HandFrame(_rolled(look, unit * upwards), unit)


def _shortest_rotation(axis: torch.Tensor) -> torch.Tensor:
    """Unit vectors [B, 3] with z > 0 -> the rotations [B, 3, 3] of least angle that map (0, 0, 1) to them."""
    x, y, z = axis.unbind(-1)
    scale = 1.0 / (1.0 + z)
    rows = (1.0 - x * x * scale, -x * y * scale, x, -x * y * scale, 1.0 - y * y * scale, y, -x, -y, z)
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def _rolled(look: torch.Tensor, upwards: torch.Tensor) -> torch.Tensor:
    """`look` [B, 3, 3] rolled about its own axis, so that `upwards` [B, 2], in patch sides, becomes (0, -1)."""
    fade = SHORT * (-(upwards / SHORT).square().sum(-1)).exp()  # 1e-6 for a palm of 0.16 sides
    down = F.normalize(torch.stack([-upwards[:, 0], fade - upwards[:, 1]], dim=-1), dim=-1)
    right = torch.stack([down[:, 1], -down[:, 0]], dim=-1)
    x_axis, y_axis, z_axis = look.unbind(-1)
    turned = [axis[:, :1] * x_axis + axis[:, 1:] * y_axis for axis in (right, down)]
    return torch.stack([*turned, z_axis], dim=-1)


def _rotate_back(ray: torch.Tensor, rot: torch.Tensor) -> torch.Tensor:
    """Directions x/z, y/z [B, N, 2] in the patch camera -> the same in the camera rotated by `rot` [B, 3, 3]."""
    x, y = ray[..., 0], ray[..., 1]
    turned = [x * rot[:, None, 0, i] + y * rot[:, None, 1, i] + rot[:, None, 2, i] for i in range(3)]
    return torch.stack(turned[:2], dim=-1) / turned[2].clamp(min=MIN_DEPTH)[..., None]
