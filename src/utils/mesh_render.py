"""A small z-buffer rasteriser in numpy: renders a coloured mesh to an RGBA image with exact visibility, in about 2 ms.

All triangles are split into pixel rows and these into pixels at once; `np.minimum.at` keeps the nearest. Inverse depth
is affine in screen space; vertex colours are interpolated affinely too, which is accurate for triangles of a few
pixels. Colour and inverse depth are rows of four float32, the layout that numpy gathers fastest.

Shape legend: V vertices, F triangles, S spans (one triangle on one pixel row), N pixels of all spans.
"""

from __future__ import annotations

import numpy as np


def render_mesh(
    point: np.ndarray, depth: np.ndarray, face: np.ndarray, colour: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Render the outward faces of a mesh, without antialiasing (for that, render larger and average).

    Args: point [V, 2] px (x right, y down, pixel centres at integers); depth [V], > 0 where a face uses it; face
    [F, 3], outward by the right-hand rule in a frame with z forward; colour [V, 3] RGB 0..255; size (width, height).
    Returns: [height, width, 4] uint8 RGBA, zero outside the mesh.
    """
    width, height = size
    tri = point[face].astype(np.float32)  # [F, 3, 2]
    edge1, edge2 = tri[:, 1] - tri[:, 0], tri[:, 2] - tri[:, 0]
    area = edge1[:, 0] * edge2[:, 1] - edge1[:, 1] * edge2[:, 0]
    low = np.minimum(np.minimum(tri[:, 0], tri[:, 1]), tri[:, 2])
    high = np.maximum(np.maximum(tri[:, 0], tri[:, 1]), tri[:, 2])
    inside = (high[:, 0] >= 0) & (low[:, 0] <= width - 1) & (high[:, 1] >= 0) & (low[:, 1] <= height - 1)
    keep = np.flatnonzero((area < -1e-6) & inside)
    tri = tri[keep]
    owner, row, first, last = _spans(tri, low[keep, 1], high[keep, 1], width, height)

    value = np.empty((len(point), 4), np.float32)  # colour and inverse depth
    value[:, :3], value[:, 3] = np.clip(colour, 0.0, 255.0), 1.0 / depth
    value = value[face[keep]]
    slope_x, slope_y = _slopes(tri, value, area[keep])
    dx = first.astype(np.float32) - tri[owner, 0, 0]
    dy = row.astype(np.float32) - tri[owner, 0, 1]
    slope = slope_x.take(owner, axis=0)
    start = value[:, 0].take(owner, axis=0) + slope * dx[:, None] + slope_y.take(owner, axis=0) * dy[:, None]
    return _fill(row * width + first, last - first + 1, start, slope, width * height).reshape(height, width, 4)


def _fill(begin: np.ndarray, count: np.ndarray, start: np.ndarray, slope: np.ndarray, num_pixel: int) -> np.ndarray:
    """Fill the spans: begin [S] flat pixel, count [S] pixels, start and slope [S, 4] -> packed RGBA [num_pixel]."""
    skipped = np.cumsum(count) - count
    span = np.repeat(np.arange(len(count)), count)
    position = np.arange(len(span))
    pixel = (begin - skipped).take(span) + position
    step = (position - skipped.take(span)).astype(np.float32)
    value = start.take(span, axis=0) + slope.take(span, axis=0) * step[:, None]
    distance = -value[:, 3]
    buffer = np.zeros(num_pixel, np.float32)
    np.minimum.at(buffer, pixel, distance)
    seen = np.flatnonzero(distance == buffer.take(pixel))
    np.clip(value, 0.0, 255.0, out=value)  # at a triangle's edge the affine colour may leave the range
    value[:, 3] = 255.0
    packed = value.astype(np.uint8).view(np.uint32)[:, 0]
    image = np.zeros(num_pixel, np.uint32)
    image[pixel.take(seen)] = packed.take(seen)
    return image.view(np.uint8)


def _spans(tri: np.ndarray, low: np.ndarray, high: np.ndarray, width: int, height: int) -> tuple[np.ndarray, ...]:
    """Split triangles [F, 3, 2] with vertical extent low, high [F] into pixel rows.

    Returns triangle id, row, first and last column of each span [S].
    """
    top = np.maximum(np.ceil(low), 0).astype(np.int64)
    num = np.maximum(np.minimum(np.floor(high), height - 1).astype(np.int64) - top + 1, 0)
    owner = np.repeat(np.arange(len(tri)), num)
    row = np.arange(len(owner)) + (top - np.cumsum(num) + num).take(owner)
    y, zero, far = row.astype(np.float32), np.float32(0), np.float32(1e9)
    left = np.full(len(owner), -0.5, np.float32)
    right = np.full(len(owner), width - 0.5, np.float32)
    for i in range(3):
        a, b = tri[:, i], tri[:, (i + 1) % 3]
        rise = b[:, 1] - a[:, 1]
        slope = (b[:, 0] - a[:, 0]) / np.where(np.abs(rise) < 1e-6, np.float32(1.0), rise)
        x = a[:, 0].take(owner) + slope.take(owner) * (y - a[:, 1].take(owner))
        # along the contour of a front-facing triangle, left edges lead down the screen and right edges up
        left = np.maximum(left, x - np.where(rise >= 1e-6, zero, far).take(owner))
        right = np.minimum(right, x + np.where(rise <= -1e-6, zero, far).take(owner))
    first = np.maximum(np.ceil(left - 1e-3), 0).astype(np.int64)
    last = np.minimum(np.floor(right + 1e-3), width - 1).astype(np.int64)
    hit = np.flatnonzero(last >= first)
    return owner[hit], row[hit], first[hit], last[hit]


def _slopes(tri: np.ndarray, value: np.ndarray, area: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Screen gradients [F, 4] along x and y of values [F, 3, 4] at the corners of triangles [F, 3, 2]."""
    e1, e2 = (tri[:, 1] - tri[:, 0]) / area[:, None], (tri[:, 2] - tri[:, 0]) / area[:, None]
    d1, d2 = value[:, 1] - value[:, 0], value[:, 2] - value[:, 0]
    return d1 * e2[:, 1:] - d2 * e1[:, 1:], d2 * e1[:, :1] - d1 * e2[:, :1]


def incident_faces(face: np.ndarray, num: int) -> np.ndarray:
    """Indices of the faces at each vertex, [V, K], padded with the number of faces F."""
    order = np.argsort(face.ravel(), kind="stable")
    owner = face.ravel()[order]
    rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
    table = np.full((num, rank.max() + 1), len(face))
    table[owner, rank] = order // 3
    return table


def vertex_normals(vert: np.ndarray, face: np.ndarray, table: np.ndarray | None = None) -> np.ndarray:
    """Area-weighted unit normals [N, V, 3] of N meshes with the same faces."""
    table = incident_faces(face, vert.shape[1]) if table is None else table
    a, b, c = vert[:, face[:, 0]], vert[:, face[:, 1]], vert[:, face[:, 2]]
    u, v = b - a, c - a
    normal = np.zeros((len(vert), len(face) + 1, 3), np.float32)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        normal[:, :-1, i] = u[..., j] * v[..., k] - u[..., k] * v[..., j]
    total = normal[:, table[:, 0]]
    for column in table.T[1:]:
        total += normal[:, column]
    return total / np.maximum(np.sqrt((total * total).sum(-1, keepdims=True)), 1e-9)
