"""The skin of the stand-in hand: an implicit surface around the designed skeleton and the quad mesh pulled onto it.

Numpy only. Lengths in this file are MILLIMETRES in MANO's axes: the fingers of the right hand point to -x, the back of
the hand to +y, the thumb to +z; the wrist joint is the origin. All of it is our own design, no vertex was taken from
another hand model.

The mesh is planned like a knitted glove: the palm is a flat tube of rings (16 stitches on the back, 16 on the palm
side, one on each edge), each finger continues four columns of the back and four of the palm as a tube of ten, webs of
two quads close the gaps between fingers, and the thumb grows from a window in the radial edge. Every vertex then
moves along the gradient of the implicit surface until it lies on it.

Shape legend: V vertices, F triangles, N query points, S cone segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

THUMB_WINDOW = (2, 6)  # palm rings between which the thumb leaves the radial edge
COLUMN = (-1.0, -0.4, 0.4, 1.0)  # position of a finger's four columns across its breadth
NUM_RELAX = 8


@dataclass(frozen=True)
class Tube:
    """One finger: the polyline of its axis with radii, and its frame.

    node [n, 3] mm from the web (or the thumb's base) to the centre of the last ball, radius [n] mm, up [3] towards the
    nail, ring [m] the axial positions (mm from the first node) of the mesh rings, flat: depth over breadth.
    """

    node: np.ndarray
    radius: np.ndarray
    up: np.ndarray
    ring: np.ndarray
    flat: float


@dataclass(frozen=True)
class Mesh:
    """vert [V, 3] mm, face [F, 3]; `digit` [V] is 0 thumb .. 4 pinky for tubes, -1 elsewhere; `column` [V] is the
    nearest long finger (1..4) of palm and webs as a fraction between fingers; tip [5] vertex ids, thumb to pinky."""

    vert: np.ndarray
    face: np.ndarray
    digit: np.ndarray
    column: np.ndarray
    tip: np.ndarray


def unit(vec: np.ndarray) -> np.ndarray:
    """[..., 3] -> unit vectors."""
    return vec / np.linalg.norm(vec, axis=-1, keepdims=True)


def smooth_min(a: np.ndarray, b: np.ndarray, k: float) -> np.ndarray:
    """Polynomial smooth minimum of two fields, blend width k mm (the usual quadratic form)."""
    h = np.maximum(k - np.abs(a - b), 0.0) / k
    return np.minimum(a, b) - 0.25 * k * h * h


def cone_field(point: np.ndarray, node: np.ndarray, radius: np.ndarray, up: np.ndarray, flat: float) -> np.ndarray:
    """Distance-like field [N] of a chain of cones with spherical joints; `flat` < 1 squashes it along `up`."""
    a, b = node[:-1], node[1:]
    ab = b - a
    t = np.einsum("nsk,sk->ns", point[:, None] - a, ab) / (ab * ab).sum(-1)
    t = np.clip(t, 0.0, 1.0)
    offset = point[:, None] - (a + t[..., None] * ab)
    along = offset @ up
    dist = np.sqrt((offset * offset).sum(-1) + (flat**-2 - 1.0) * along**2 + 1e-9)
    return (dist - (radius[:-1] + t * (radius[1:] - radius[:-1]))).min(1)


def ellipsoid_field(point: np.ndarray, centre: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Distance-like field [N] of an ellipsoid; axes [3, 3] are its half axes as rows."""
    length = np.linalg.norm(axes, axis=1)
    local = (point - centre) @ (axes / length[:, None]).T
    k0 = np.linalg.norm(local / length, axis=1)
    k1 = np.linalg.norm(local / length**2, axis=1) + 1e-9
    return k0 * (k0 - 1.0) / k1


def project(vert: np.ndarray, field, num_step: int) -> np.ndarray:
    """Move [V, 3] along the field's gradient (forward differences) onto its zero level."""
    eps = 0.05 * np.eye(3)
    for _ in range(num_step):
        value = field(np.concatenate([vert, *(vert + e for e in eps)])).reshape(4, -1)
        grad = (value[1:] - value[0]).T / 0.05
        step = -value[0][:, None] * grad / np.maximum((grad * grad).sum(1, keepdims=True), 0.2)
        vert = vert + np.clip(step, -6.0, 6.0)
    return vert


class _Builder:
    """Collects vertices and quads."""

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
    rings = []
    for r in range(path.shape[1]):
        across = [(path[f, r] + [0, 0, -c * half[f, r]], f + 1 + 0.3 * c) for f in range(4) for c in COLUMN]
        back = [builder.add(p + [0, 10, 0], -1, c) for p, c in across]
        ulnar = builder.add(path[3, r] - [0, 0, half[3, r] + 6], -1, 4.3)
        front = [builder.add(p - [0, 10, 0], -1, c) for p, c in reversed(across)]
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
    length = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(tube.node, axis=0), axis=1))])
    row = base
    for s in tube.ring:
        centre = np.array([np.interp(s, length, tube.node[:, k]) for k in range(3)])
        k = min(int(np.searchsorted(length, s, side="right")) - 1, len(tube.node) - 2)
        axis = unit(tube.node[k + 1] - tube.node[k])
        if s > length[-1]:
            centre = centre + (s - length[-1]) * axis
        up = unit(tube.up - axis * (tube.up @ axis))
        side = np.cross(up, axis)
        beyond = max(s - length[-1], 0.0)
        radius = np.sqrt(max(np.interp(s, length, tube.radius) ** 2 - beyond**2, 1.0))
        around = centre + radius * (np.cos(angle)[:, None] * side + tube.flat * np.sin(angle)[:, None] * up)
        new = [builder.add(p, digit, digit) for p in around]
        builder.strip(row, new, closed=True)
        row = new
    tip = builder.add(centre + 0.6 * axis * tube.radius[-1], digit, digit)
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


def build_mesh(path: np.ndarray, half: np.ndarray, tubes: list[Tube], field) -> Mesh:
    """Knit the glove and pull it onto the zero level of `field` ([N, 3] -> [N]).

    path [4, R, 3] and half [4, R] mm describe the palm's rays (index to pinky), tubes the five fingers (thumb first).
    """
    builder = _Builder()
    rings = _palm(builder, path, half)
    end, last = rings[0], rings[-1]
    cap = [end[33], *(builder.add(0.5 * (builder.vert[end[i]] + builder.vert[end[32 - i]]), -1, builder.column[end[i]])
                      for i in range(1, 15)), end[16]]  # fmt: skip
    builder.strip(cap, end[:16], closed=False)
    builder.strip(end[32:16:-1], cap, closed=False)

    mids = [last[33]]  # one per finger side: index radial, then both sides of each web, pinky ulnar
    for f in range(3):
        left, right = 4 * f + 3, 4 * f + 4
        pair = [
            builder.add(0.5 * (builder.vert[last[i]] + builder.vert[last[32 - i]]), -1, f + 1.5) for i in (left, right)
        ]
        builder.strip([last[left], last[right]], pair, closed=False)
        builder.strip(pair, [last[32 - left], last[32 - right]], closed=False)
        mids += pair
    mids.append(last[16])

    tips = [0] * 5
    deg = np.radians([0, 48, 76, 104, 132, 180, 228, 256, 284, 312])
    for f in range(4):
        back, front = last[4 * f : 4 * f + 4], [last[32 - 4 * f - i] for i in range(4)]
        loop = [mids[2 * f], *back, mids[2 * f + 1], *reversed(front)]
        tips[f + 1] = _tube(builder, loop, tubes[f + 1], f + 1, deg)
    low, high = THUMB_WINDOW
    window = [rings[high][33], *(rings[r][32] for r in range(high, low - 1, -1)), rings[low][33]]
    window += [rings[r][0] for r in range(low, high + 1)]
    deg = np.radians([180, 216, 243, 270, 297, 324, 0, 36, 63, 90, 117, 144])
    tips[0] = _tube(builder, window, tubes[0], 0, deg)
    return _finish(builder, np.array(tips), field)


def _finish(builder: _Builder, tip: np.ndarray, field) -> Mesh:
    """Drop unused vertices, relax palm and webs, project, triangulate, orient outwards."""
    used = np.unique(np.array(builder.quad))
    new_id = np.full(len(builder.vert), -1)
    new_id[used] = np.arange(len(used))
    vert = np.array(builder.vert)[used]
    quad = [tuple(new_id[list(q)]) for q in builder.quad]
    digit, column = np.array(builder.digit)[used], np.array(builder.column)[used]
    rough = _triangles(quad, vert)
    mean = neighbour_mean(rough, len(vert))
    vert = project(vert, field, 2)
    near_tube = (digit < 0).astype(float)
    for _ in range(2):
        near_tube = np.maximum(near_tube, mean @ near_tube)
    amount = 0.5 * np.minimum(near_tube * 1.5, 1.0)[:, None]
    for _ in range(NUM_RELAX):
        vert = project(vert + amount * (mean @ vert - vert), field, 1)
    vert = project(vert, field, 3)
    face = _triangles(quad, vert)
    if signed_volume(vert, face) < 0:
        face = face[:, ::-1].copy()
    return Mesh(vert, face, digit, column, new_id[tip])
