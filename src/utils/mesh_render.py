"""A small z-buffer rasteriser in numpy: triangles to pixels with exact visibility, a few milliseconds per hand.

Every triangle is cut into pixel rows, every row into pixels, all of them at once; `np.minimum.at` keeps the nearest.
Inverse depth is interpolated (it is affine on the screen), vertex attributes are interpolated affinely, which is exact
enough for triangles of a few pixels.

Shape legend: V vertices, F triangles, S spans (one triangle on one pixel row), N pixels hit, C attributes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Raster:
    """What each covered pixel sees: pixel [N] flat index (y * width + x), face [N] triangle id, attr [N, C]."""

    pixel: np.ndarray
    face: np.ndarray
    attr: np.ndarray


def rasterise(point: np.ndarray, depth: np.ndarray, face: np.ndarray, attr: np.ndarray, size: tuple[int, int]) -> Raster:
    """Draw front-facing triangles (the outward faces of a closed mesh, seen with x right, y down, z forward).

    Args: point [V, 2] px, pixel centres at integers; depth [V], all > 0 where used; face [F, 3]; attr [V, C] float32;
    size (width, height). Returns: a Raster of the nearest surface at each covered pixel.
    """
    width, height = size
    tri = point[face].astype(np.float32)  # [F, 3, 2]
    edge1, edge2 = tri[:, 1] - tri[:, 0], tri[:, 2] - tri[:, 0]
    area = edge1[:, 0] * edge2[:, 1] - edge1[:, 1] * edge2[:, 0]
    low, high = tri.min(1), tri.max(1)
    inside = (high[:, 0] >= 0) & (low[:, 0] <= width - 1) & (high[:, 1] >= 0) & (low[:, 1] <= height - 1)
    keep = np.flatnonzero((area < -1e-6) & inside)
    tri, low, high = tri[keep], low[keep], high[keep]

    span_tri, span_y, first, last = _spans(tri, low, high, width, height)
    value = np.concatenate([(1.0 / depth)[:, None].astype(np.float32), attr.astype(np.float32)], axis=1)[face[keep]]  # [F, 3, 1 + C]
    slope_x, slope_y = _slopes(tri, value, area[keep])
    dx = first.astype(np.float32) - tri[span_tri, 0, 0]
    dy = span_y.astype(np.float32) - tri[span_tri, 0, 1]
    start = value[span_tri, 0] + slope_x[span_tri] * dx[:, None] + slope_y[span_tri] * dy[:, None]  # [S, 1 + C]

    count = last - first + 1
    span = np.repeat(np.arange(len(count)), count)
    step = np.arange(len(span)) - (np.cumsum(count) - count)[span]
    pixel = (span_y * width + first)[span] + step
    near = -(start[:, 0][span] + slope_x[span_tri, 0][span] * step.astype(np.float32))
    buffer = np.zeros(width * height, np.float32)
    np.minimum.at(buffer, pixel, near)
    seen = np.flatnonzero(near == buffer[pixel])
    span, step = span[seen], step[seen].astype(np.float32)
    out = start[:, 1:][span] + slope_x[span_tri, 1:][span] * step[:, None]
    return Raster(pixel[seen], keep[span_tri[span]], out)


def _spans(tri: np.ndarray, low: np.ndarray, high: np.ndarray, width: int, height: int) -> tuple[np.ndarray, ...]:
    """Cut triangles [F, 3, 2] into pixel rows: triangle id, row, first and last column of each span [S]."""
    top = np.maximum(np.ceil(low[:, 1]), 0).astype(np.int64)
    num = np.maximum(np.minimum(np.floor(high[:, 1]), height - 1).astype(np.int64) - top + 1, 0)
    owner = np.repeat(np.arange(len(tri)), num)
    row = top[owner] + np.arange(len(owner)) - (np.cumsum(num) - num)[owner]
    left = np.full(len(owner), -0.5, np.float32)
    right = np.full(len(owner), width - 0.5, np.float32)
    for i in range(3):
        a, b = tri[:, i], tri[:, (i + 1) % 3]
        rise = b[:, 1] - a[:, 1]
        flat = np.abs(rise) < 1e-6
        slope = (b[:, 0] - a[:, 0]) / np.where(flat, np.float32(1.0), rise)
        x = a[owner, 0] + slope[owner] * (row.astype(np.float32) - a[owner, 1])
        # going round a front-facing triangle, its left side leads down the screen and its right side up
        bound_left, bound_right = (rise > 0) & ~flat, (rise < 0) & ~flat
        right = np.where(bound_right[owner], np.minimum(right, x), right)
        left = np.where(bound_left[owner], np.maximum(left, x), left)
    first = np.maximum(np.ceil(left - 1e-4), 0).astype(np.int64)
    last = np.minimum(np.floor(right + 1e-4), width - 1).astype(np.int64)
    hit = np.flatnonzero(last >= first)
    return owner[hit], row[hit], first[hit], last[hit]


def _slopes(tri: np.ndarray, value: np.ndarray, area: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Screen gradients [F, C] along x and y of values [F, 3, C] given at the corners of triangles [F, 3, 2]."""
    e1, e2 = (tri[:, 1] - tri[:, 0]) / area[:, None], (tri[:, 2] - tri[:, 0]) / area[:, None]
    d1, d2 = value[:, 1] - value[:, 0], value[:, 2] - value[:, 0]
    return d1 * e2[:, 1:] - d2 * e1[:, 1:], d2 * e1[:, :1] - d1 * e2[:, :1]
