"""The grid of image tokens: position in the patch, camera features, position embedding.

Shapes: B batch, N = grid_size^2 tokens, row by row as the backbone orders them.
"""

from __future__ import annotations

import math

import torch

from src.geometry.camera import pixel_ray

CAMERA_FEATURES = 3  # ray x, ray y, log of the focal length over the patch side


def token_centres(grid_size: int, patch_size: int) -> torch.Tensor:
    """Centre of each token, [N, 2] px (x, y) of the patch."""
    centre = (torch.arange(grid_size) + 0.5) * patch_size - 0.5
    row, col = torch.meshgrid(centre, centre, indexing="ij")
    return torch.stack([col, row], dim=-1).flatten(0, 1)


def log_zoom(focal: torch.Tensor, img_size: int) -> torch.Tensor:
    """[B, 2] px -> [B, 1] log of the focal length over the patch side: how narrow the field of view is."""
    return (focal.mean(-1, keepdim=True) / img_size).log()


def camera_features(centre: torch.Tensor, focal: torch.Tensor, princpt: torch.Tensor, img_size: int) -> torch.Tensor:
    """Ray x/z and y/z of each token's centre in the patch camera, and the zoom.

    Args: centre [N, 2] px; focal, princpt [B, 2] px. Returns: [B, N, CAMERA_FEATURES].
    """
    ray = pixel_ray(centre, focal, princpt)
    return torch.cat([ray, log_zoom(focal, img_size)[:, None].expand(-1, ray.shape[1], -1)], dim=-1)


def sincos_position(grid_size: int, dim: int) -> torch.Tensor:
    """Sines and cosines of row and column at `dim / 4` frequencies each, [N, dim], amplitude 1.

    Frequencies rise from one half-wave over the patch to one over a token, the form of Vaswani et al. (2017) in 2D.
    """
    assert dim % 4 == 0
    frequency = torch.logspace(0, math.log10(max(grid_size, 2)), dim // 4)
    angle = ((torch.arange(grid_size) + 0.5) / grid_size * 2 - 1)[:, None] * frequency * math.pi / 2
    wave = torch.cat([angle.sin(), angle.cos()], dim=-1)  # [grid, dim / 2]
    row = wave[:, None].expand(-1, grid_size, -1)
    return torch.cat([row, row.transpose(0, 1)], dim=-1).flatten(0, 1)
