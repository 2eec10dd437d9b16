"""The mesh of the stand-in hand (see build.py): quads projected onto the implicit surface of `src.hand.standin.flesh`.

Numpy only. Lengths are in MILLIMETRES in MANO's axes: the fingers of the right hand point to -x, the back of the hand
to +y, the thumb to +z; the wrist joint is the origin. The mesh is our own design; no vertex was taken from another
hand model.

The topology resembles a knitted glove: the palm is a flat tube of rings (16 vertices on the back, 16 on the palm side,
one on each edge), each finger continues four columns of the back and four of the palm as a tube of ten, webs of two
quads close the gaps between fingers, and the thumb grows from a window in the radial edge. Every vertex then moves
along the gradient of the implicit surface until it is on the surface.

Shape legend: V vertices, F triangles, N query points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from src.hand.standin.design import unit
from src.hand.standin.flesh import Tube

THUMB_WINDOW = (2, 6)  # palm rings between which the thumb starts at the radial edge
COLUMN = (-1.0, -0.4, 0.4, 1.0)  # position of a finger's four columns across its breadth
NUM_RELAX = 8
# Angles of a ring's vertices around the axis: 0 is the radial side, 90 degrees the nail.
FINGER_ANGLE = np.radians([0, 48, 76, 104, 132, 180, 228, 256, 284, 312])
THUMB_ANGLE = np.radians([180, 216, 243, 270, 297, 324, 0, 36, 63, 90, 117, 144])

Field = Callable[[np.ndarray], np.ndarray]  # [N, 3] mm -> [N], zero on the surface, negative inside


@dataclass(frozen=True)
class Mesh:
    """vert [V, 3] mm, face [F, 3]; `digit` [V] is 0 thumb .. 4 pinky for tubes, -1 elsewhere; `column` [V] is the
    nearest long finger (1..4) of palm and webs as a fraction between fingers; tip [5] vertex ids, thumb to pinky."""

    vert: np.ndarray
    face: np.ndarray
    digit: np.ndarray
    column: np.ndarray
    tip: np.ndarray


def project(vert: np.ndarray, field: Field, num_step: int) -> np.ndarray:
    """Move [V, 3] along the field's gradient (forward differences) onto its zero level."""
    eps = 0.05 * np.eye(3)
    for _ in range(num_step):
        value = field(np.concatenate([vert, *(vert + e for e in eps)])).reshape(4, -1)
        grad = (value[1:] - value[0]).T / 0.05
        step = -value[0][:, None] * grad / np.maximum((grad * grad).sum(1, keepdims=True), 0.2)
        vert = vert + np.clip(step, -6.0, 6.0)
    return vert


class _Builder:
    def __init__(self) -> None:
        self.vert: list[np.ndarray] = []
        self.quad: list[tuple[int, ...]] = []
        self.digit: list[int] = []
        self.column: list[float] = []

    def add(self, point: np.ndarray, digit: int, column: float) -> int:
        self.vert.append(np.asarray(point, float))
        self.digit.append(digit)
        self.column.append(column)
        return len(self.vert) - 1

    def halfway(self, i: int, j: int, column: float) -> int:
        """A new palm vertex between two others."""
        return self.add(0.5 * (self.vert[i] + self.vert[j]), -1, column)

    def strip(self, a: list[int], b: list[int], closed: bool) -> None:
        """Quads between two rows of equal length."""
        num = len(a)
        for i in range(num if closed else num - 1):
            j = (i + 1) % num
            self.quad.append((a[i], a[j], b[j], b[i]))


def _palm(builder: _Builder, path: np.ndarray, half: np.ndarray) -> list[list[int]]:
    """Rings of the palm. path [4, R, 3] mm: centre lines of the four rays, half [4, R] mm their half breadth.

    Returns the rings; ring = 16 on the back (radial to ulnar), ulnar edge, 16 on the palm side (ulnar to radial),
    radial edge.
    """
    rings, lift = [], np.array([0.0, 10.0, 0.0])
    for r in range(path.shape[1]):
        across = [(path[f, r] + [0, 0, -c * half[f, r]], f + 1 + 0.3 * c) for f in range(4) for c in COLUMN]
        back = [builder.add(p + lift, -1, c) for p, c in across]
        ulnar = builder.add(path[3, r] - [0, 0, half[3, r] + 6], -1, 4.3)
        front = [builder.add(p - lift, -1, c) for p, c in reversed(across)]
        radial = builder.add(path[0, r] + [0, 0, half[0, r] + 6], -1, 0.7)
        rings.append([*back, ulnar, *front, radial])
    low, high = THUMB_WINDOW
    for r in range(len(rings) - 1):
        a, b = rings[r], rings[r + 1]
        for i in range(34):
            in_window = low <= r < high and i in (32, 33)
            if not in_window:
                j = (i + 1) % 34
                builder.quad.append((a[i], a[j], b[j], b[i]))
    return rings


def _tube(builder: _Builder, base: list[int], tube: Tube, digit: int, angle: np.ndarray) -> int:
    """Grow a finger from the vertex loop `base` (angles [n] rad around the axis, 0 to the side, pi/2 to the nail).

    Returns the vertex id of the tip.
    """
    cones = tube.cones
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(cones.node, axis=0), axis=1))])
    row = base
    for s in tube.ring:
        k = min(int(np.searchsorted(length, s, side="right")) - 1, len(cones.node) - 2)
        axis = unit(cones.node[k + 1] - cones.node[k])
        centre = cones.node[k] + (s - length[k]) * axis
        up = unit(cones.up - axis * (cones.up @ axis))
        beyond = max(s - length[-1], 0.0)  # within the spherical tip
        radius = np.sqrt(max(np.interp(s, length, cones.radius) ** 2 - beyond**2, 1.0))
        around = np.cos(angle)[:, None] * np.cross(up, axis) + cones.flat * np.sin(angle)[:, None] * up
        ring = [builder.add(centre + radius * p, digit, digit) for p in around]
        builder.strip(row, ring, closed=True)
        row = ring
    tip = builder.add(centre + 0.6 * axis * cones.radius[-1], digit, digit)
    for i, v in enumerate(row):
        builder.quad.append((v, row[(i + 1) % len(row)], tip, tip))
    return tip


def _triangles(quad: list[tuple[int, ...]], vert: np.ndarray) -> np.ndarray:
    """Split each quad along its shorter diagonal; drop the empty half of degenerate quads."""
    faces = []
    for a, b, c, d in quad:
        if c == d:
            faces.append((a, b, c))
        elif np.sum((vert[a] - vert[c]) ** 2) <= np.sum((vert[b] - vert[d]) ** 2):
            faces += [(a, b, c), (a, c, d)]
        else:
            faces += [(a, b, d), (b, c, d)]
    return np.array(faces, np.int64)


def neighbour_mean(face: np.ndarray, num: int) -> np.ndarray:
    """Row-stochastic matrix [V, V] that averages the neighbours of each vertex."""
    mat = np.zeros((num, num))
    for i in range(3):
        mat[face[:, i], face[:, (i + 1) % 3]] = mat[face[:, (i + 1) % 3], face[:, i]] = 1.0
    return mat / mat.sum(1, keepdims=True)


def signed_volume(vert: np.ndarray, face: np.ndarray) -> float:
    """Volume enclosed by a closed mesh, positive when its faces look outwards."""
    a, b, c = vert[face[:, 0]], vert[face[:, 1]], vert[face[:, 2]]
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6.0)


def build_mesh(path: np.ndarray, half: np.ndarray, tubes: list[Tube], field: Field) -> Mesh:
    """Build the topology and project it onto the zero level of `field` ([N, 3] -> [N]).

    path [4, R, 3] and half [4, R] mm describe the palm's rays (index to pinky), tubes the five fingers (thumb first).
    """
    builder = _Builder()
    rings = _palm(builder, path, half)
    first, last = rings[0], rings[-1]
    middle = [builder.halfway(first[i], first[32 - i], builder.column[first[i]]) for i in range(1, 15)]
    cap = [first[33], *middle, first[16]]
    builder.strip(cap, first[:16], closed=False)
    builder.strip(first[32:16:-1], cap, closed=False)

    sides = _webs(builder, last)
    low, high = THUMB_WINDOW
    front = [rings[r][32] for r in range(high, low - 1, -1)]
    back = [rings[r][0] for r in range(low, high + 1)]
    tips = [_tube(builder, [rings[high][33], *front, rings[low][33], *back], tubes[0], 0, THUMB_ANGLE)]
    for f in range(4):
        back, front = last[4 * f : 4 * f + 4], [last[32 - 4 * f - i] for i in range(4)]
        loop = [sides[2 * f], *back, sides[2 * f + 1], *reversed(front)]
        tips.append(_tube(builder, loop, tubes[f + 1], f + 1, FINGER_ANGLE))
    return _finish(builder, np.array(tips), field)


def _webs(builder: _Builder, last: list[int]) -> list[int]:
    """Close the gaps between neighbouring fingers at the palm's last ring.

    Returns the vertex on either side of each finger, radial side of the index first, ulnar side of the pinky last.
    """
    sides = [last[33]]
    for f in range(3):
        left, right = 4 * f + 3, 4 * f + 4
        pair = [builder.halfway(last[i], last[32 - i], f + 1.5) for i in (left, right)]
        builder.strip([last[left], last[right]], pair, closed=False)
        builder.strip(pair, [last[32 - left], last[32 - right]], closed=False)
        sides += pair
    return [*sides, last[16]]


def _finish(builder: _Builder, tip: np.ndarray, field: Field) -> Mesh:
    """Drop unused vertices, relax palm and webs on the surface, triangulate."""
    used = np.unique(np.array(builder.quad))
    new_id = np.full(len(builder.vert), -1)
    new_id[used] = np.arange(len(used))
    vert = np.array(builder.vert)[used]
    quad = [tuple(new_id[list(q)]) for q in builder.quad]
    digit, column = np.array(builder.digit)[used], np.array(builder.column)[used]
    mean = neighbour_mean(_triangles(quad, vert), len(vert))
    loose = (digit < 0).astype(float)  # palm, webs and finger bases move; rings at finger joints stay
    for _ in range(2):
        loose = np.maximum(loose, mean @ loose)
    loose = 0.5 * np.minimum(1.5 * loose, 1.0)[:, None]
    vert = project(vert, field, 2)
    for _ in range(NUM_RELAX):
        vert = project(vert + loose * (mean @ vert - vert), field, 1)
    vert = project(vert, field, 3)
    face = _triangles(quad, vert)
    assert signed_volume(vert, face) > 0, "the faces look inwards"
    return Mesh(vert, face, digit, column, new_id[tip])
