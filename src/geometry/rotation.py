"""Rotations as pure torch functions: axis-angle, matrix and the continuous 6D form, with finite gradients everywhere.

Shape legend: `...` any batch dimensions.

Angles are in radians. Matrices act on column vectors from the left, x' = R x. All operations are elementwise, so
autocast does not change them; bfloat16 and float16 input is converted to float32, float64 stays float64.
"""

from __future__ import annotations

import torch

# Below this squared angle (or squared half-angle sine) a Taylor series is used; its error is below 1e-16.
_SMALL_SQUARED = 1e-5
# A 6D vector shorter than this, or a second part closer than this (squared sine) to the first, has no direction.
_DEGENERATE_SQUARED = 1e-12
_PARALLEL_SQUARED = 1e-8


def _at_least_float32(value: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == torch.float64 else value.float()


def axis_angle_to_matrix(axis_angle: torch.Tensor) -> torch.Tensor:
    """Rodrigues' formula R = cos(t) I + sin(t)/t [v]x + (1 - cos(t))/t^2 v v^T, t = |v|, smooth through t = 0.

    Args: axis_angle [..., 3]. Returns: rotation matrices [..., 3, 3].
    """
    vec = _at_least_float32(axis_angle)
    squared = (vec * vec).sum(-1, keepdim=True)
    small = squared < _SMALL_SQUARED
    angle = torch.where(small, torch.ones_like(squared), squared).sqrt()
    half_sine = (0.5 * angle).sin()
    sinc = torch.where(small, 1 - squared / 6 + squared * squared / 120, angle.sin() / angle)
    versine = torch.where(small, 0.5 - squared / 24 + squared * squared / 720, 2 * (half_sine / angle) ** 2)
    cosine = 1 - versine * squared

    x, y, z = vec.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack((zero, -z, y, z, zero, -x, -y, x, zero), dim=-1).unflatten(-1, (3, 3))
    outer = vec.unsqueeze(-1) * vec.unsqueeze(-2)
    eye = torch.eye(3, dtype=vec.dtype, device=vec.device)
    return cosine.unsqueeze(-1) * eye + sinc.unsqueeze(-1) * cross + versine.unsqueeze(-1) * outer


def matrix_to_axis_angle(matrix: torch.Tensor) -> torch.Tensor:
    """The axis-angle vector of a rotation, angle in [0, pi], computed through the unit quaternion.

    The symmetric matrix 4 q q^T is linear in R; its row with the largest diagonal entry is q up to scale, and is
    well conditioned for every rotation (Shepperd 1978), so the gradient stays finite at 0 and at pi.

    Args: matrix [..., 3, 3] rotations. Returns: [..., 3].
    """
    m = _at_least_float32(matrix)
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = m.flatten(-2).unbind(-1)
    outer = torch.stack(
        (
            *(1 + m00 + m11 + m22, m21 - m12, m02 - m20, m10 - m01),
            *(m21 - m12, 1 + m00 - m11 - m22, m01 + m10, m02 + m20),
            *(m02 - m20, m01 + m10, 1 - m00 + m11 - m22, m12 + m21),
            *(m10 - m01, m02 + m20, m12 + m21, 1 - m00 - m11 + m22),
        ),
        dim=-1,
    ).unflatten(-1, (4, 4))
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row = outer.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    quat = row / (row * row).sum(-1, keepdim=True).sqrt()
    quat = torch.where(quat[..., :1] < 0, -quat, quat)
    return _quaternion_to_axis_angle(quat)


def _quaternion_to_axis_angle(quat: torch.Tensor) -> torch.Tensor:
    """[..., 4] unit quaternion (w, x, y, z), w >= 0 -> [..., 3]: 2 atan2(|v|, w) v / |v|, smooth through |v| = 0."""
    real, imag = quat[..., :1], quat[..., 1:]
    squared = (imag * imag).sum(-1, keepdim=True)
    small = squared < _SMALL_SQUARED
    sine = torch.where(small, torch.ones_like(squared), squared).sqrt()
    series = 2 + squared / 3 + 3 * squared * squared / 20  # 2 asin(s) / s
    return imag * torch.where(small, series, 2 * torch.atan2(sine, real) / sine)


def rotation_6d_to_matrix(rotation_6d: torch.Tensor) -> torch.Tensor:
    """Gram-Schmidt of Zhou et al., "On the Continuity of Rotation Representations", CVPR 2019: the six numbers are the
    first two columns. The result is always a rotation: a degenerate column is replaced by an axis without gradient.

    Args: rotation_6d [..., 6]. Returns: [..., 3, 3].
    """
    first, second = _at_least_float32(rotation_6d).split(3, dim=-1)
    axes = torch.eye(3, dtype=first.dtype, device=first.device)
    degenerate = (first * first).sum(-1, keepdim=True) < _DEGENERATE_SQUARED
    col0 = _normalise(torch.where(degenerate, axes[0].expand_as(first), first))

    rest = _remove_along(second, col0)
    limit = (second * second).sum(-1, keepdim=True) * _PARALLEL_SQUARED + _DEGENERATE_SQUARED
    parallel = (rest * rest).sum(-1, keepdim=True) < limit
    spare = axes[col0.detach().abs().argmin(-1)]  # the coordinate axis farthest from col0
    rest = torch.where(parallel, _remove_along(spare, col0), rest)
    col1 = _normalise(_remove_along(_normalise(rest), col0))  # twice: exact also for nearly parallel parts
    return torch.stack((col0, col1, torch.linalg.cross(col0, col1)), dim=-1)


def _remove_along(vec: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return vec - (vec * unit).sum(-1, keepdim=True) * unit


def _normalise(vec: torch.Tensor) -> torch.Tensor:
    """Scale to unit length; the caller ensures a nonzero length."""
    return vec / (vec * vec).sum(-1, keepdim=True).sqrt()


def matrix_to_rotation_6d(matrix: torch.Tensor) -> torch.Tensor:
    """The first two columns of a rotation. Args: matrix [..., 3, 3]. Returns: [..., 6]."""
    return _at_least_float32(matrix)[..., :2].transpose(-1, -2).flatten(-2)
