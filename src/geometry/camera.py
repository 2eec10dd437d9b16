"""The pinhole camera, for numpy arrays and torch tensors alike.

Shape legend: `...` any batch dimensions, N points.

Uses only operators that both libraries have and does not import torch, so that data workers and the network share the
code. Elementwise only, so autocast does not lower the precision. Units: mm in space, px in images; pixel centres are at
integer coordinates. Camera frame: x right, y down, z forward.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", np.ndarray, "torch.Tensor")

# Points nearer than this, or behind the camera, are projected from this depth: finite, and far outside the image.
MIN_DEPTH_MM = 10.0


def project(point: Array, focal: Array, princpt: Array) -> Array:
    """Pixels of camera-space points. Depth is clamped to MIN_DEPTH_MM; clamped depths get no gradient.

    Args: point [..., N, 3] mm; focal [..., 2] px; princpt [..., 2] px. Returns: [..., N, 2] px.
    """
    depth = point[..., 2:].clip(MIN_DEPTH_MM, None)
    return point[..., :2] / depth * focal[..., None, :] + princpt[..., None, :]


def pixel_ray(pixel: Array, focal: Array, princpt: Array) -> Array:
    """Direction (x/z, y/z) of the ray through each pixel.

    Args: pixel [..., N, 2] px; focal, princpt [..., 2] px. Returns: [..., N, 2], no unit.
    """
    return (pixel - princpt[..., None, :]) / focal[..., None, :]


def unproject(pixel: Array, depth: Array, focal: Array, princpt: Array) -> Array:
    """Camera-space points from pixels and depths, the inverse of `project`.

    Args: pixel [..., N, 2] px; depth [..., N] mm; focal, princpt [..., 2] px. Returns: [..., N, 3] mm.
    """
    depth = depth[..., None]
    parts = (pixel_ray(pixel, focal, princpt) * depth, depth)
    if isinstance(pixel, np.ndarray):
        return np.concatenate(parts, axis=-1)
    import torch  # already loaded: the input is a tensor

    return torch.cat(parts, dim=-1)


def guess_intrinsics(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """(focal [2], princpt [2]) for unknown intrinsics: the image diagonal (a 53 degree diagonal view), the centre."""
    focal = np.full(2, math.hypot(width, height), np.float32)
    return focal, np.array([0.5 * (width - 1), 0.5 * (height - 1)], np.float32)
