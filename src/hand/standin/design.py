"""The skeleton of the stand-in hand (see build.py): bone lengths, rest positions, joint limits. Numpy only.

Axes, as in MANO's right hand: fingers point to -x, the back of the hand to +y, the thumb to +z; the wrist joint is the
origin. Positive rotation about +z bends a finger towards the palm. Lengths here are in MILLIMETRES.

Proportions
  * Bone lengths and the soft tissue beyond the last bone: Buryanov & Kotiuk, "Proportions of hand segments",
    Int. J. Morphol. 28(3), 2010, means of 66 adults: metacarpals, proximal, middle, distal phalanges, tip tissue.
  * Size: the palm is laid out so that hand length is about 185 mm and breadth across the metacarpal heads about
    82 mm, between the means of men and women in ANSUR II (Gordon et al., "2012 Anthropometric Survey of U.S. Army
    Personnel", NATICK/TR-15/007); a standard deviation of hand size is about 5 %.
  * Joint limits: active ranges of adults, about 90 degrees at the knuckle, 100 and 80 at the finger joints.

Shape legend: K = 16 joints in MANO order, D = 5 digits (thumb, index, middle, ring, pinky).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from src.hand.skeleton import FINGER_NAMES, MANO_JOINT_NAMES

# mm: metacarpal, proximal, (middle,) distal bone, tissue beyond the tip; thumb to pinky (Buryanov & Kotiuk 2010).
BONE_MM = {
    "thumb": (46.22, 31.57, 21.67 + 5.67),
    "index": (68.12, 39.78, 22.38, 15.82 + 3.84),
    "middle": (64.60, 44.63, 26.33, 17.40 + 3.95),
    "ring": (58.00, 41.37, 25.65, 17.30 + 3.95),
    "pinky": (53.69, 32.74, 18.11, 15.96 + 3.73),
}
# Our layout, mm in (distal, dorsal, radial): the base of each metacarpal, and the directions of ray and finger.
BASE = {
    "thumb": (14, -8, 20),
    "index": (21, 0, 11),
    "middle": (25, 1.5, 2.5),
    "ring": (24, 1, -6),
    "pinky": (21, -1, -13),
}
RAY = {"index": (1, 0.01, 0.19), "middle": (1, 0.01, 0.015), "ring": (1, 0.0, -0.19), "pinky": (1, -0.03, -0.40)}
FINGER = {"index": (1, 0, 0.13), "middle": (1, 0, 0.015), "ring": (1, 0, -0.11), "pinky": (1, -0.01, -0.27)}
THUMB = ((0.76, -0.33, 0.56), (0.83, -0.24, 0.50), (0.87, -0.20, 0.45))  # its three bones
THUMB_UP = (-0.15, 0.72, 0.68)  # the nail faces upwards and away from the hand


def to_xyz(point: tuple[float, float, float]) -> np.ndarray:
    """(distal, dorsal, radial) -> xyz."""
    distal, dorsal, radial = point
    return np.array([-distal, dorsal, radial], float)


def unit(vec: np.ndarray) -> np.ndarray:
    """[..., 3] -> unit vectors."""
    return vec / np.linalg.norm(vec, axis=-1, keepdims=True)


@dataclass(frozen=True)
class Design:
    """The skeleton at rest, mm. joint [K, 3]; tip [D, 3]; bone [K, 3] unit vector from each joint to the next (the
    wrist's points to the middle finger); frame [K, 3, 3] rows flexion, abduction (towards the thumb), twist axis."""

    joint: np.ndarray
    tip: np.ndarray
    bone: np.ndarray
    frame: np.ndarray


def chain(digit: int) -> tuple[int, int, int]:
    """MANO ids of the three joints of a digit (0 thumb .. 4 pinky)."""
    first = MANO_JOINT_NAMES.index(f"{FINGER_NAMES[digit]}1")
    return first, first + 1, first + 2


@lru_cache(maxsize=1)
def design() -> Design:
    """Compute joints, bones and frames from the constants above."""
    joint, bone, up = np.zeros((16, 3)), np.zeros((16, 3)), np.tile([0.0, 1.0, 0.0], (16, 1))
    tip = np.zeros((5, 3))
    bone[0] = [-1, 0, 0]
    for d, name in enumerate(FINGER_NAMES):
        ids, length = chain(d), BONE_MM[name]
        if name == "thumb":
            where, dirs = to_xyz(BASE[name]), [unit(to_xyz(v)) for v in THUMB]
            up[list(ids)] = to_xyz(THUMB_UP)
        else:
            where = to_xyz(BASE[name]) + length[0] * unit(to_xyz(RAY[name]))
            dirs, length = [unit(to_xyz(FINGER[name]))] * 3, length[1:]
        for k, direction, size in zip(ids, dirs, length, strict=True):
            joint[k], bone[k] = where, direction
            where = where + size * direction
        tip[d] = where
    up = unit(up - bone * (up * bone).sum(1, keepdims=True))
    flex = np.cross(up, bone)
    return Design(joint, tip, bone, np.stack([flex, up, bone], axis=1))


# Degrees (flexion, abduction towards the thumb, twist), low and high, of the three joints of each digit.
LIMIT_DEG = {
    "thumb": (((-12, 42), (-32, 34), (-12, 18)), ((-10, 50), (-6, 6), (-4, 4)), ((-18, 72), (0, 0), (0, 0))),
    "index": (((-20, 90), (-16, 26), (-5, 5)), ((-3, 105), (0, 0), (0, 0)), ((-8, 78), (0, 0), (0, 0))),
    "middle": (((-20, 90), (-12, 12), (-5, 5)), ((-3, 105), (0, 0), (0, 0)), ((-8, 78), (0, 0), (0, 0))),
    "ring": (((-20, 92), (-20, 14), (-5, 5)), ((-3, 105), (0, 0), (0, 0)), ((-8, 78), (0, 0), (0, 0))),
    "pinky": (((-25, 94), (-36, 16), (-8, 8)), ((-3, 105), (0, 0), (0, 0)), ((-8, 78), (0, 0), (0, 0))),
}


def joint_limits() -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest natural angle [15, 3] rad about the flexion, abduction and twist axis of `design().frame`,
    for the 15 joints below the wrist in MANO order."""
    limit = np.zeros((15, 3, 2))
    for d, name in enumerate(FINGER_NAMES):
        for k, rows in zip(chain(d), LIMIT_DEG[name], strict=True):
            limit[k - 1] = np.radians(rows)
    return limit[..., 0], limit[..., 1]


def rotation_about(axis: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Rodrigues' formula: unit axis [..., 3] and angle [...] rad -> rotation matrices [..., 3, 3]."""
    axis, angle = np.broadcast_arrays(axis, np.asarray(angle)[..., None])
    x, y, z = np.moveaxis(axis, -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*x.shape, 3, 3)
    sin, cos = np.sin(angle[..., :1, None]), np.cos(angle[..., :1, None])
    return np.eye(3) + sin * cross + (1.0 - cos) * (cross @ cross)


def angles_to_rotmat(angles: np.ndarray) -> np.ndarray:
    """Anatomical angles [..., 15, 3] rad (flexion, abduction, twist) -> joint rotations [..., 15, 3, 3].

    A joint first twists, then bends, then abducts: the axis of abduction stays with the parent bone.
    """
    frame = design().frame[1:]
    flex, abduct, twist = (rotation_about(frame[:, i], angles[..., i]) for i in range(3))
    return abduct @ flex @ twist
