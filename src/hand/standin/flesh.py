"""The flesh of the stand-in hand (see build.py): an implicit surface of smoothly joined cones and ellipsoids.

Numpy only, millimetres, axes of `src.hand.standin.design`. The surface is the zero level of `Flesh.field`; the palm
rays and finger tubes define the layout of the mesh in `src.hand.standin.mesh`.

Shape legend: N query points, S cone segments, R rings of the palm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from src.hand.skeleton import FINGER_NAMES
from src.hand.standin.design import BASE, Design, chain, to_xyz, unit

# Half breadth in mm at web or base, mid bone, joint, ... , pad, tip.
RADIUS = {
    "thumb": (15.0, 13.0, 12.2, 10.9, 11.4, 11.4, 8.8),
    "index": (10.8, 10.0, 10.2, 9.3, 9.0, 9.0, 7.5),
    "middle": (11.0, 10.2, 10.5, 9.5, 9.2, 9.2, 7.6),
    "ring": (10.5, 9.6, 9.9, 8.9, 8.7, 8.7, 7.2),
    "pinky": (9.3, 8.5, 8.7, 7.8, 7.6, 7.6, 6.4),
}
FLAT = 0.9  # depth over breadth of a finger
WEB_MM = 15.0  # distance from the knuckle joint to the web between fingers
WRIST_END_MM = 27.0  # distance from the wrist joint to the end of the hand
UP = np.array([0.0, 1.0, 0.0])


@dataclass(frozen=True)
class Cones:
    """A chain of cones with spherical joints: node [S + 1, 3] mm, radius [S + 1] mm, flattened by `flat`
    along the unit vector `up` [3]."""

    node: np.ndarray
    radius: np.ndarray
    up: np.ndarray
    flat: float

    def field(self, point: np.ndarray) -> np.ndarray:
        """Distance-like value [N] at points [N, 3], negative inside."""
        begin, along = self.node[:-1], np.diff(self.node, axis=0)
        square = (along * along).sum(1)
        reach = point @ along.T - (begin * along).sum(1)  # [N, S] along . (point - begin)
        t = np.clip(reach / square, 0.0, 1.0)
        from_begin = (point * point).sum(1)[:, None] - 2.0 * point @ begin.T + (begin * begin).sum(1)
        height = (point @ self.up)[:, None] - begin @ self.up - t * (along @ self.up)
        dist = from_begin + t * (t * square - 2.0 * reach) + (self.flat**-2 - 1.0) * height**2
        return (np.sqrt(np.maximum(dist, 1e-9)) - (self.radius[:-1] + t * np.diff(self.radius))).min(1)


@dataclass(frozen=True)
class Tube:
    """One finger: its cones from the web (or mid thumb bone) to the tip, and the axial positions ring [M] mm of the
    mesh's rings."""

    cones: Cones
    ring: np.ndarray


def smooth_min(a: np.ndarray, b: np.ndarray, k: float) -> np.ndarray:
    """Polynomial smooth minimum of two fields, blend width k mm (the usual quadratic form)."""
    h = np.maximum(k - np.abs(a - b), 0.0) / k
    return np.minimum(a, b) - 0.25 * k * h * h


def _ellipsoid_field(point: np.ndarray, centre: np.ndarray, half: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Distance-like value [N] of an ellipsoid with half axes `half` [3] mm along the orthonormal rows of `axes`."""
    local = (point - centre) @ axes.T
    k0 = np.linalg.norm(local / half, axis=1)
    k1 = np.linalg.norm(local / half**2, axis=1) + 1e-9
    return k0 * (k0 - 1.0) / k1


def finger_tubes(des: Design) -> list[Tube]:
    """The five fingers, thumb first, with mesh rings at and around their joints."""
    tubes = []
    for d, name in enumerate(FINGER_NAMES):
        ids = chain(d)
        a, b, c = des.joint[list(ids)]
        radius = np.array(RADIUS[name])
        start = a + 0.5 * (b - a) if d == 0 else a + WEB_MM * des.bone[ids[0]]
        stop = des.tip[d] - radius[-1] * des.bone[ids[2]]
        node = np.stack([start, 0.5 * (start + b), b, 0.5 * (b + c), c, 0.5 * (c + stop), stop])
        s = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(node, axis=0), axis=1))])
        r1, r2, r3 = 0.55 * radius[2], 0.55 * radius[4], radius[6]
        ring = [0.6 * s[1], s[2] - r1, s[2], s[2] + r1]
        ring += [s[3]] if d else []
        ring += [s[4] - r2, s[4], s[4] + r2, s[5], s[6] + 0.2 * r3, s[6] + 0.75 * r3]
        tubes.append(Tube(Cones(node, radius, des.frame[ids[1], 1], FLAT), np.array(ring)))
    return tubes


def palm_rays(des: Design) -> tuple[np.ndarray, np.ndarray]:
    """Centre lines [4, R, 3] and half breadths [4, R] mm of the palm's four rays from the wrist's end to the webs."""
    # rings along wrist's end (0), wrist (1), metacarpal base (2), knuckle (3), web (4)
    where = np.array([0.0, 0.8, 1.45, 1.75, 2.0, 2.18, 2.36, 2.6, 2.85, 3.25, 4.0])
    path, half = [], []
    for f, (name, wrist_z) in enumerate(zip(FINGER_NAMES[1:], (21.0, 7.0, -7.0, -21.0), strict=True)):
        first = chain(f + 1)[0]
        base = to_xyz(BASE[name])
        base[2] += 0.35 * (wrist_z - base[2])
        web = des.joint[first] + WEB_MM * des.bone[first]
        nodes = np.stack([[26.0, 0.0, wrist_z], [6.0, 0.0, wrist_z], base, des.joint[first], web])
        sizes = np.array([6.0, 6.0, 6.0, 8.0, 7.0 if f < 3 else 6.2])
        path.append(np.stack([np.interp(where, range(5), nodes[:, k]) for k in range(3)], axis=1))
        half.append(np.interp(where, range(5), sizes))
    return np.array(path), np.array(half)


class Flesh:
    """The implicit surface of the whole hand at rest."""

    def __init__(self, des: Design, tubes: list[Tube]) -> None:
        self.fingers = [tube.cones for tube in tubes[1:]]
        self.palm = _palm_parts(des, self.fingers)
        thumb_bone = np.stack([des.joint[chain(0)[0]], tubes[0].cones.node[0]])
        commissure = np.array([[-40.0, -8.0, 25.0], [-52.0, -8.0, 26.0]])
        self.thumb_bone = Cones(thumb_bone, np.array([13.5, 14.5]), tubes[0].cones.up, 0.95)
        self.commissure = Cones(commissure, np.array([8.0, 6.0]), UP, 1.0)
        self.thumb = tubes[0].cones
        first = unit(to_xyz((0.85, -0.3, 0.35)))
        second = unit(UP - first * (UP @ first))
        self.thenar_axes = np.stack([first, second, np.cross(first, second)])

    def field(self, point: np.ndarray) -> np.ndarray:
        """Distance-like value [N] at points [N, 3] mm, negative inside. Fingers blend with the palm, never with each
        other."""
        body = self.palm[0][0].field(point)
        for cones, blend in self.palm[1:]:
            body = smooth_min(body, cones.field(point), blend)
        value = np.min([smooth_min(body, finger.field(point), 5.0) for finger in self.fingers], axis=0)
        value = smooth_min(value, self._thumb_field(point), 12.0)
        return -smooth_min(-value, WRIST_END_MM - point[:, 0], 14.0)

    def _thumb_field(self, point: np.ndarray) -> np.ndarray:
        value = self.thumb_bone.field(point)
        thenar = _ellipsoid_field(point, np.array([-35.0, -13.0, 22.0]), np.array([27.0, 13.5, 13.0]), self.thenar_axes)
        value = smooth_min(value, thenar, 8.0)
        value = smooth_min(value, self.commissure.field(point), 12.0)
        return smooth_min(value, self.thumb.field(point), 4.0)


def _palm_parts(des: Design, fingers: list[Cones]) -> list[tuple[Cones, float]]:
    """Wrist, metacarpals, knuckles, webs and the hypothenar, each with the blend width mm that joins it to the rest."""
    parts = [(Cones(np.array([[60.0, 1, 0], [5, 1, 0], [-14, 0, 0]]), np.array([27.0, 28.5, 29]), UP, 0.69), 0.0)]
    web = []
    for d, (finger, depth) in enumerate(zip(fingers, (12.6, 12.9, 12.0, 10.6), strict=True), start=1):
        first = chain(d)[0]
        knuckle, base = des.joint[first], to_xyz(BASE[FINGER_NAMES[d]])
        sunk = np.array([0.0, -1.5, 0.0])
        ray = np.stack([base + sunk, 0.5 * (base + knuckle) + sunk, knuckle])
        parts.append((Cones(ray, np.array([13.5, 13.0, depth]), UP, 0.95), 9.0))
        root = np.stack([knuckle, knuckle + WEB_MM * des.bone[first]])
        parts.append((Cones(root, np.array([depth, finger.radius[0]]), UP, 0.95), 5.0))
        web.append(knuckle + 11.5 * des.bone[first] + sunk)
    parts.append((Cones(np.array(web), np.full(4, 6.6), UP, 0.95), 6.0))
    hypothenar = np.array([[-14.0, -9, -17], [-36, -10, -24], [-60, -7, -28]])
    parts.append((Cones(hypothenar, np.array([11.0, 13.0, 10.0]), UP, 1.0), 9.0))
    return parts
