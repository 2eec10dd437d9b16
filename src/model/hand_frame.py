"""The hand's own camera, found from the joints seen in the patch: it looks at their middle, upright by the palm.

A patch is cut from anywhere in the source camera's view and turned any way. So the same hand, seen from the same side,
has another rotation in the patch camera for each turn of the picture and each place in the view (allocentric and
egocentric orientation: Kundu, Li, Rehg, "3D-RCNN", CVPR 2018, section 3.3). Both are known from 2D alone. The decoder
gets the joints seen as this camera sees them, and the root's rotation is predicted against it: that a turn of the
camera turns the hand need not be learned.

Shapes: B batch, J joints, N points. Elementwise operations in float32 throughout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from src.geometry.camera import pixel_ray

PALM = (5, 9, 13, 17)  # the knuckles; from the wrist to their middle is upwards
MIN_DEPTH = 0.1  # a direction more than 84 degrees off the axis is drawn as if it were there
SHORT = 0.05  # patch sides: a palm seen as shorter than about this has no direction, and rolls less and less


class HandFrame(NamedTuple):
    """A camera at the place of the patch camera, turned."""

    rot: torch.Tensor  # [B, 3, 3]: x_patch_camera = rot @ x_hand_camera
    unit: torch.Tensor  # [B, 1] patch sides per unit of x/z: brings the view of a patch to a width of about one

    def see(self, pixel: torch.Tensor, focal: torch.Tensor, princpt: torch.Tensor) -> torch.Tensor:
        """Pixels of the patch as the hand's camera sees them, in sides of a patch about its axis.

        Args: pixel [B, N, 2] or [N, 2] px; focal, princpt [B, 2] px. Returns: [B, N, 2], y downwards.
        """
        return self.unit[:, None] * _turned_back(pixel_ray(pixel, focal, princpt), self.rot)


def hand_frame(seen: torch.Tensor, focal: torch.Tensor, princpt: torch.Tensor, img_size: int) -> HandFrame:
    """The frame of the joints seen. Nothing of the loss flows back through it: where the joints are is for
    `loss_joint_seen` to teach, and a hand that points at the camera has a turn of no meaning.

    Args: seen [B, J, 2] px of the patch; focal, princpt [B, 2] px; img_size: S, px.
    """
    ray = pixel_ray(seen.detach().float(), focal, princpt)
    middle = F.normalize(F.pad(ray, (0, 1), value=1.0), dim=-1).mean(dim=1)
    look = _shortest_turn(F.normalize(middle, dim=-1))
    plane = _turned_back(ray, look)
    unit = focal.mean(-1, keepdim=True) / img_size
    upwards = plane[:, list(PALM)].mean(dim=1) - plane[:, 0]
    return HandFrame(_rolled(look, unit * upwards), unit)


def _shortest_turn(axis: torch.Tensor) -> torch.Tensor:
    """Unit vectors [B, 3] with z > 0 -> the rotations [B, 3, 3] by the least angle that turn (0, 0, 1) there."""
    x, y, z = axis.unbind(-1)
    scale = 1.0 / (1.0 + z)
    rows = (1.0 - x * x * scale, -x * y * scale, x, -x * y * scale, 1.0 - y * y * scale, y, -x, -y, z)
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def _rolled(look: torch.Tensor, upwards: torch.Tensor) -> torch.Tensor:
    """`look` [B, 3, 3] rolled about its own axis, so that `upwards` [B, 2], in patch sides, becomes (0, -1)."""
    doubt = SHORT * (-(upwards / SHORT).square().sum(-1)).exp()  # 1e-6 where the palm is seen as 0.16 sides long
    down = F.normalize(torch.stack([-upwards[:, 0], doubt - upwards[:, 1]], dim=-1), dim=-1)
    right = torch.stack([down[:, 1], -down[:, 0]], dim=-1)
    x_axis, y_axis = look[..., 0], look[..., 1]
    return torch.stack(
        [
            right[:, :1] * x_axis + right[:, 1:] * y_axis,
            down[:, :1] * x_axis + down[:, 1:] * y_axis,
            look[..., 2],
        ],
        dim=-1,
    )


def _turned_back(ray: torch.Tensor, rot: torch.Tensor) -> torch.Tensor:
    """Directions x/z, y/z [B, N, 2] of the patch camera -> the same in the camera turned by `rot` [B, 3, 3]."""
    x, y = ray[..., 0], ray[..., 1]
    turned = [x * rot[:, None, 0, i] + y * rot[:, None, 1, i] + rot[:, None, 2, i] for i in range(3)]
    return torch.stack(turned[:2], dim=-1) / turned[2].clamp(min=MIN_DEPTH)[..., None]
