"""Heads: from refined queries to MANO rotations, MANO shape and the wrist's place in the patch camera.

Each starts at a sensible answer (open hand, mean shape, middle of the patch) and learns what differs. All compute in float32.
Shapes: B batch, D decoder width, S patch side in px.
"""

from __future__ import annotations

import torch
from torch import nn

from src.geometry.camera import unproject
from src.geometry.rotation import rotation_6d_to_matrix

SCENE_WIDTH = 300.0  # mm: the width of scene that a patch shows at the hand's depth, before anything is learned


def _small_linear(dim: int, out: int) -> nn.Linear:
    """A linear layer whose output starts near its bias of zero."""
    linear = nn.Linear(dim, out)
    nn.init.normal_(linear.weight, std=0.002)
    nn.init.zeros_(linear.bias)
    return linear


class PoseHead(nn.Module):
    """One query per MANO joint -> its rotation, through the 6D form (Zhou et al., CVPR 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = _small_linear(dim, 6)
        self.register_buffer("identity_6d", torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]), persistent=False)

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        """[B, 16, D] -> rotation matrices [B, 16, 3, 3]."""
        return rotation_6d_to_matrix(self.linear(query) + self.identity_6d)


class ShapeHead(nn.Module):
    """One query -> the ten shape coefficients."""

    def __init__(self, dim: int, num_shape: int) -> None:
        super().__init__()
        self.linear = _small_linear(dim, num_shape)

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, 10]."""
        return self.linear(query)


class RootHead(nn.Module):
    """One query -> the wrist in the patch camera, as a pixel of the patch and a depth along that pixel's ray.

    Depth is predicted relative to `focal / S * SCENE_WIDTH`: a zoom of the patch or another lens then changes nothing the
    network must learn, and no size of the target's hand is needed to return to millimetres.
    """

    def __init__(self, dim: int, img_size: int) -> None:
        super().__init__()
        self.linear = _small_linear(dim, 3)
        self.img_size = img_size

    def forward(self, query: torch.Tensor, focal: torch.Tensor, princpt: torch.Tensor) -> torch.Tensor:
        """query [B, D], focal and princpt [B, 2] px -> wrist [B, 3] mm."""
        out = self.linear(query)
        pixel = (self.img_size - 1) / 2 + self.img_size * out[:, :2]
        depth = focal.mean(-1, keepdim=True) / self.img_size * SCENE_WIDTH * out[:, 2:].clamp(-5.0, 5.0).exp()
        return unproject(pixel[:, None], depth, focal, princpt)[:, 0]
