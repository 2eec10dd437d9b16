"""The pinhole camera and homographies, for numpy arrays and torch tensors alike.

Shape legend: `...` any batch dimensions, N points.

Written in operators that both libraries have, and without importing torch, so that data workers use the same code as
the network. Elementwise only: autocast does not lower the precision. Units: mm in space, px in images; a pixel's
centre lies at integer coordinates. Camera frame: x right, y down, z forward.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", np.ndarray, "torch.Tensor")

# Points nearer than this, or behind the camera, are projected as if they lay at this depth: finite, and far outside.
MIN_DEPTH_MM = 10.0
# The same for the third homogeneous coordinate of a homography's image.
MIN_HOMOGENEOUS = 1e-6


def project(point: Array, focal: Array, princpt: Array) -> Array:
    """Pixels of camera-space points; depth is raised to MIN_DEPTH_MM, with no gradient to the depths so raised.

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
    """The points that `project` sends to these pixels.

    Args: pixel [..., N, 2] px; depth [..., N] mm; focal, princpt [..., 2] px. Returns: [..., N, 3] mm.
    """
    depth = depth[..., None]
    parts = (pixel_ray(pixel, focal, princpt) * depth, depth)
    if isinstance(pixel, np.ndarray):
        return np.concatenate(parts, axis=-1)
    import torch  # a tensor came in: loaded already

    return torch.cat(parts, dim=-1)


def transform_points(homography: Array, point: Array) -> Array:
    """Image points under a homography. Points that it sends behind the image plane come out finite and meaningless.

    Args: homography [..., 3, 3]; point [..., N, 2] px. Returns: [..., N, 2] px.
    """
    image = (homography[..., None, :, :2] * point[..., None, :]).sum(-1) + homography[..., None, :, 2]
    return image[..., :2] / image[..., 2:].clip(MIN_HOMOGENEOUS, None)


def guess_intrinsics(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """(focal [2], princpt [2]) where nothing is known: the image's diagonal (a view of 53 degrees), and its centre."""
    focal = np.full(2, math.hypot(width, height), np.float32)
    return focal, np.array([0.5 * (width - 1), 0.5 * (height - 1)], np.float32)
