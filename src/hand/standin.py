"""The stand-in hand: a right hand of our own making in MANO's parameter space, for runs without the MANO file.

Numpy only. Nothing here comes from MANO's data; only its parameter space is shared (16 joints in its order, pose 48,
shape 10, rest pose flat), so that a network, a loss or a shard need not know which hand is loaded.

Axes, as in MANO's right hand: fingers point to -x, the back of the hand to +y, the thumb to +z; the wrist joint is the
origin here. Positive rotation about +z bends a finger towards the palm.

Proportions
  * Bone lengths and the soft tissue beyond the last bone: Buryanov & Kotiuk, "Proportions of hand segments",
    Int. J. Morphol. 28(3), 2010, table of 66 adults: metacarpals, proximal, middle, distal phalanges, tip tissue.
  * Size: the palm is laid out so that hand length is about 185 mm and breadth across the metacarpal heads about
    82 mm, between the means of men and women in ANSUR II (Gordon et al., "2012 Anthropometric Survey of U.S. Army
    Personnel", NATICK/TR-15/007), whose standard deviations of 5 to 6 % scale the shape directions.
  * Flexion limits: active ranges of adults, about 90 degrees at the knuckle, 100 and 80 at the finger joints.

Shape legend: V vertices, K = 16 joints in MANO order, D = 5 digits (thumb, index, middle, ring, pinky).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from src.hand.skeleton import FINGER_NAMES, MANO_JOINT_NAMES, MANO_PARENTS, HandArrays
from src.hand.standin_mesh import Mesh, Tube, build_mesh, cone_field, ellipsoid_field, neighbour_mean, smooth_min, unit

# mm: metacarpal, proximal, (middle,) distal bone, tissue beyond the tip; thumb to pinky (Buryanov & Kotiuk 2010).
BONE_MM = {
    "thumb": (46.22, 31.57, 21.67, 5.67),
    "index": (68.12, 39.78, 22.38, 15.82 + 3.84),
    "middle": (64.60, 44.63, 26.33, 17.40 + 3.95),
    "ring": (58.00, 41.37, 25.65, 17.30 + 3.95),
    "pinky": (53.69, 32.74, 18.11, 15.96 + 3.73),
}
# Our layout, mm in (distal, dorsal, radial): where each metacarpal begins, and the directions of ray and finger.
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
THUMB_UP = (-0.15, 0.72, 0.68)  # the nail faces half upwards, half away from the hand
# Half breadth in mm at web or base, mid bone, joint, ... , pad, tip.
RADIUS = {
    "thumb": (15.0, 13.0, 12.2, 10.9, 11.2, 11.0, 7.8),
    "index": (10.8, 10.0, 10.2, 9.3, 9.0, 9.0, 6.8),
    "middle": (11.0, 10.2, 10.5, 9.5, 9.2, 9.2, 6.9),
    "ring": (10.5, 9.6, 9.9, 8.9, 8.7, 8.7, 6.5),
    "pinky": (9.3, 8.5, 8.7, 7.8, 7.6, 7.6, 5.8),
}
FLAT = 0.9  # depth over breadth of a finger
WEB_MM = 15.0  # the fingers part this far beyond the knuckle joint


def _axes(point: tuple) -> np.ndarray:
    """(distal, dorsal, radial) -> xyz."""
    d, y, z = point
    return np.array([-d, y, z], float)


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
    """Lay the bones out."""
    joint, bone, up = np.zeros((16, 3)), np.zeros((16, 3)), np.tile([0.0, 1.0, 0.0], (16, 1))
    tip = np.zeros((5, 3))
    bone[0] = [-1, 0, 0]
    for d, name in enumerate(FINGER_NAMES):
        ids, length = chain(d), BONE_MM[name]
        if name == "thumb":
            where, dirs, length = (
                _axes(BASE[name]),
                [unit(_axes(v)) for v in THUMB],
                (*length[:2], length[2] + length[3]),
            )
            up[list(ids)] = _axes(THUMB_UP)
        else:
            where = _axes(BASE[name]) + length[0] * unit(_axes(RAY[name]))
            dirs, length = [unit(_axes(FINGER[name]))] * 3, length[1:]
        for k, direction, size in zip(ids, dirs, length, strict=True):
            joint[k], bone[k] = where, direction
            where = where + size * direction
        tip[d] = where
    up = unit(up - bone * (up * bone).sum(1, keepdims=True))
    flex = np.cross(up, bone)
    return Design(joint, tip, bone, np.stack([flex, up, bone], axis=1))


def _tubes(des: Design) -> list[Tube]:
    """The five fingers as tubes with mesh rings at and around their joints."""
    tubes = []
    for d, name in enumerate(FINGER_NAMES):
        a, b, c = (des.joint[k] for k in chain(d))
        end, radius, up = des.tip[d], np.array(RADIUS[name]), des.frame[chain(d)[1], 1]
        start = a + 0.5 * (b - a) if d == 0 else a + WEB_MM * des.bone[chain(d)[0]]
        stop = end - radius[-1] * des.bone[chain(d)[2]]
        node = np.stack([start, 0.5 * (start + b), b, 0.5 * (b + c), c, c + 0.5 * (stop - c), stop])
        s = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(node, axis=0), axis=1))])
        r1, r2, r3 = 0.55 * radius[2], 0.55 * radius[4], radius[6]
        ring = [
            0.6 * s[1],
            s[2] - r1,
            s[2],
            s[2] + r1,
            s[4] - r2,
            s[4],
            s[4] + r2,
            s[5],
            s[6] + 0.2 * r3,
            s[6] + 0.75 * r3,
        ]
        if d:
            ring.insert(4, s[3])
        tubes.append(Tube(node, radius, up, np.array(ring), FLAT))
    return tubes


def _rays(des: Design) -> tuple[np.ndarray, np.ndarray]:
    """Centre lines [4, R, 3] and half breadths [4, R] of the palm's four rays from the wrist's end to the webs."""
    wrist_z = (21.0, 7.0, -7.0, -21.0)
    path, half = [], []
    for f, name in enumerate(FINGER_NAMES[1:]):
        knuckle = des.joint[chain(f + 1)[0]]
        base = _axes(BASE[name])
        web = knuckle + WEB_MM * des.bone[chain(f + 1)[0]]
        nodes = np.stack(
            [[26, 0, wrist_z[f]], [6, 0, wrist_z[f]], base + [0, 0, 0.35 * (wrist_z[f] - base[2])], knuckle, web]
        )
        sizes = np.array([6.0, 6.0, 6.0, 8.0, 7.0 if f < 3 else 6.2])
        where = np.array([0.0, 0.8, 1.45, 1.75, 2.0, 2.18, 2.36, 2.6, 2.85, 3.25, 4.0])
        path.append(np.stack([np.interp(where, range(5), nodes[:, k]) for k in range(3)], axis=1))
        half.append(np.interp(where, range(5), sizes))
    return np.array(path), np.array(half)


def _field(des: Design, tubes: list[Tube]):
    """The implicit surface of the hand at rest: [N, 3] mm -> [N], negative inside."""
    up = np.array([0.0, 1.0, 0.0])
    knuckles = np.array([des.joint[chain(d)[0]] for d in range(1, 5)])
    along = np.array([des.bone[chain(d)[0]] for d in range(1, 5)])
    bases = np.array([_axes(BASE[name]) for name in FINGER_NAMES[1:]])
    depth, front = np.array([12.6, 12.9, 12.0, 10.6]), np.array([0, -1.5, 0])
    web = knuckles + 11.5 * along + [0, -1.5, 0]

    def palm(p: np.ndarray) -> np.ndarray:
        value = cone_field(p, np.array([[60.0, 1, 0], [5, 1, 0], [-14, 0, 0]]), np.array([27.0, 28.5, 29]), up, 0.69)
        for f in range(4):
            ray = np.array([bases[f] + front, 0.5 * (bases[f] + knuckles[f]) + front, knuckles[f]])
            value = smooth_min(value, cone_field(p, ray, np.array([13.5, 13.0, depth[f]]), up, 0.95), 9.0)
            finger = np.array([knuckles[f], knuckles[f] + WEB_MM * along[f]])
            value = smooth_min(
                value, cone_field(p, finger, np.array([depth[f], tubes[f + 1].radius[0]]), up, 0.95), 5.0
            )
        value = smooth_min(value, cone_field(p, web, np.full(4, 6.6), up, 0.95), 6.0)
        hypothenar = np.array([[-14.0, -9, -17], [-36, -10, -24], [-60, -7, -28]])
        return smooth_min(value, cone_field(p, hypothenar, np.array([11.0, 13.0, 10]), up, 1.0), 9.0)

    thumb_bone = np.stack([des.joint[chain(0)[0]], tubes[0].node[0]])
    thenar_axes = np.array([27.0, 14.5, 13.0])[:, None] * np.stack(
        [unit(_axes((0.85, -0.3, 0.35))), [0, 1, 0], [0, 0, 1]]
    )
    thenar_axes[1:] -= thenar_axes[0] * (thenar_axes[1:] @ thenar_axes[0] / (thenar_axes[0] @ thenar_axes[0]))[:, None]
    commissure = np.array([[-40.0, -8, 25], [-52, -8, 26]])

    def thumb(p: np.ndarray) -> np.ndarray:
        value = cone_field(p, thumb_bone, np.array([13.5, 14.5]), tubes[0].up, 0.95)
        value = smooth_min(value, ellipsoid_field(p, np.array([-35.0, -13, 22]), thenar_axes), 8.0)
        value = smooth_min(value, cone_field(p, commissure, np.array([8.0, 6.0]), up, 1.0), 12.0)
        return smooth_min(value, cone_field(p, tubes[0].node, tubes[0].radius, tubes[0].up, FLAT), 4.0)

    def field(p: np.ndarray) -> np.ndarray:
        body = palm(p)
        fingers = [cone_field(p, t.node, t.radius, t.up, t.flat) for t in tubes[1:]]
        value = np.min([smooth_min(body, f, 5.0) for f in fingers], axis=0)
        value = smooth_min(value, thumb(p), 12.0)
        return -smooth_min(-value, 27.0 - p[:, 0], 14.0)

    return field


def _smoothstep(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def _skin_weights(mesh: Mesh, des: Design) -> np.ndarray:
    """Linear-blend weights [V, K]: smooth steps along each digit, bleeding into the palm only through the webs."""
    num = len(mesh.vert)
    weight = np.zeros((num, 16))
    weight[:, 0] = 1.0
    for d in range(5):
        ids = chain(d)
        near = np.clip(1.0 - np.abs(mesh.column - d), 0.0, 1.0) if d else (mesh.digit == 0).astype(float)
        near = np.where(mesh.digit >= 0, mesh.digit == d, np.clip(1.6 * near, 0, 1) if d else 1.0)
        for level, k in enumerate(ids):
            offset = mesh.vert - des.joint[k]
            axial = offset @ des.bone[k]
            width = 0.9 * RADIUS[FINGER_NAMES[d]][min(2 * level, 6)]
            step = _smoothstep((axial + width) / (2.0 * width))
            if d and level == 0:
                step = _smoothstep((axial + 9.0) / 22.0) * near
            elif d == 0 and level == 0:
                side = np.linalg.norm(offset - np.outer(np.clip(axial, 0, 46), des.bone[k]), axis=1)
                reach = _smoothstep((30.0 - side) / 20.0) * _smoothstep((mesh.vert[:, 2] - 2.0) / 22.0)
                step = np.where(mesh.digit == 0, np.maximum(reach, _smoothstep((axial - 4.0) / 26.0)), reach)
                step *= _smoothstep((axial + 8.0) / 26.0) * np.where(mesh.digit > 0, 0.0, 1.0)
            else:
                step = step * (mesh.digit == d)
            parent = ids[level - 1] if level else 0
            moved = weight[:, parent] * step
            weight[:, k] += moved
            weight[:, parent] -= moved
    smooth = neighbour_mean(mesh.face, num)
    for _ in range(2):
        weight = 0.5 * weight + 0.5 * smooth @ weight
    weight[weight < 0.01] = 0.0
    return weight / weight.sum(1, keepdims=True)


def _shapedirs(vert: np.ndarray, weight: np.ndarray, mesh: Mesh, des: Design) -> np.ndarray:
    """Ten directions [V, 3, 10] mm per standard deviation: size, finger length, palm breadth, hand depth, finger
    thickness, finger taper, thumb length, index against ring, pinky length, fleshiness of the palm."""
    digit_weight = np.stack([weight[:, list(chain(d))].sum(1) for d in range(5)], axis=1)  # [V, D]
    palm_weight = 1.0 - digit_weight.sum(1)

    def palm_scale(strain: tuple[float, float, float]) -> np.ndarray:
        """Stretch the palm; digits ride on their first joint."""
        first = des.joint[[chain(d)[0] for d in range(5)]]
        return palm_weight[:, None] * vert * strain + digit_weight @ (first * strain)

    def length(strain: dict[int, float]) -> np.ndarray:
        """Stretch digits along their bones, each point moving with all the bone behind it."""
        out = np.zeros_like(vert)
        for d, amount in strain.items():
            ends = [*des.joint[list(chain(d))], des.tip[d]]
            for k, a, b in zip(chain(d), ends[:-1], ends[1:], strict=True):
                axial = np.clip((vert - a) @ des.bone[k], 0.0, np.linalg.norm(b - a))
                out += amount * (digit_weight[:, d] * axial)[:, None] * des.bone[k]
        return out

    def thick(digits: tuple[int, ...], strain: float, bones: slice = slice(None)) -> np.ndarray:
        """Move digits away from their bones."""
        out = np.zeros_like(vert)
        for d in digits:
            for k in chain(d)[bones]:
                offset = vert - des.joint[k]
                offset -= np.outer(offset @ des.bone[k], des.bone[k])
                out += strain * weight[:, k, None] * offset
        return out

    fingers = (1, 2, 3, 4)
    flesh = np.clip(-vert[:, 1] - 2.0, 0.0, 12.0) / 12.0 * palm_weight * _smoothstep((-vert[:, 0] + 5.0) / 25.0)
    dirs = [
        0.045 * vert,
        length({0: 0.03, **dict.fromkeys(fingers, 0.045)}),
        palm_scale((0.0, 0.0, 0.045)) + thick(fingers, 0.015),
        palm_scale((0.0, 0.05, 0.0)) + thick((0, *fingers), 0.03),
        thick((0, *fingers), 0.06),
        thick(fingers, 0.05, slice(0, 1)) + thick(fingers, -0.05, slice(2, 3)),
        length({0: 0.06}),
        length({1: 0.035, 3: -0.035}),
        length({4: 0.06}),
        1.6 * np.outer(flesh, [0.0, -1.0, 0.0]) + thick((0,), 0.04),
    ]
    return np.stack(dirs, axis=-1)


def _posedirs(vert: np.ndarray, weight: np.ndarray, des: Design) -> np.ndarray:
    """Corrections [V, 3, 135] mm that are linear in R - I: a bent knuckle keeps its height, the flesh of its palm side
    swells beside the crease. 1 - cos(angle) = -trace(R - I) / 2 is the amount of bending about any axis."""
    dirs = np.zeros((len(vert), 3, 15, 9))
    for k in range(1, 16):
        offset, parent = vert - des.joint[k], MANO_PARENTS[k]
        axial, height = offset @ des.bone[k], offset @ des.frame[k, 1]
        near = (weight[:, k] + weight[:, parent]) * (0.0 if k == 13 else 1.0)
        size = max(float(np.abs(height[(np.abs(axial) < 8) & (near > 0.5)]).max(initial=8.0)), 8.0)
        bump = np.exp(-((axial / (0.6 * size)) ** 2)) * near
        swell = (axial / (0.6 * size)) ** 2 * bump
        back, front = np.clip(height / size, 0.0, 1.0), np.clip(-height / size, 0.0, 1.0)
        amount = 0.22 * size * (back * bump + front * (0.5 * bump - 0.6 * swell))
        shift = amount[:, None] * des.frame[k, 1]
        dirs[:, :, k - 1, [0, 4, 8]] = -0.5 * shift[:, :, None]
    return dirs.reshape(len(vert), 3, 135)


def _regressor(vert: np.ndarray, weight: np.ndarray, des: Design) -> np.ndarray:
    """[K, V]: each joint as a convex mean of the vertices around it (non-negative, rows sum to 1).

    The nearest vertices that both the joint and its parent move, weighted as evenly as hitting the joint allows.
    """
    out = np.zeros((16, len(vert)))
    for k in range(16):
        axial = np.abs((vert - des.joint[k]) @ des.bone[k])
        share = weight[:, k] + (weight[:, MANO_PARENTS[k]] if k else 0.0)
        far = np.linalg.norm(vert - des.joint[k], axis=1)
        order = np.argsort(far + 1.5 * axial + 100.0 * (share < 0.6), kind="stable")
        for count in range(24, 120, 8):
            ids = np.sort(order[:count])
            row = _even_convex(vert[ids], des.joint[k])
            if row is not None:
                out[k, ids] = row
                break
        else:
            raise AssertionError(f"no vertices surround joint {MANO_JOINT_NAMES[k]}")
    return out


def _even_convex(point: np.ndarray, target: np.ndarray) -> np.ndarray | None:
    """Non-negative weights [N] with sum 1 and weights @ point = target, near to even; None where there are none."""
    system = np.concatenate([point.T, np.ones((1, len(point)))])
    goal = np.concatenate([target, [1.0]])
    active = np.ones(len(point), bool)
    while active.sum() >= 8:
        even = np.full(int(active.sum()), 1.0 / active.sum())
        part = system[:, active]
        found = even + np.linalg.lstsq(part, goal - part @ even, rcond=None)[0]
        if found.min() >= 0.0:
            row = np.zeros(len(point))
            row[active] = found
            return row if np.abs(system @ row - goal).max() < 1e-6 else None
        active[np.flatnonzero(active)[found < 0.0]] = False
    return None


# Degrees of flexion of a hand at rest, knuckle to last joint.
RELAXED_DEG = {
    "thumb": (8, 12, 18),
    "index": (22, 30, 14),
    "middle": (26, 34, 16),
    "ring": (28, 36, 18),
    "pinky": (30, 34, 18),
}


@lru_cache(maxsize=1)
def build_standin_hand() -> HandArrays:
    """The stand-in hand's arrays in metres; the same arrays to the bit on every call and in every process."""
    des = design()
    tubes = _tubes(des)
    mesh = build_mesh(*_rays(des), tubes, _field(des, tubes))
    weight = _skin_weights(mesh, des)
    vert = mesh.vert
    mean_pose = np.zeros((15, 3))
    for d, name in enumerate(FINGER_NAMES):
        for k, deg in zip(chain(d), RELAXED_DEG[name], strict=True):
            mean_pose[k - 1] = np.radians(deg) * des.frame[k, 0]
    return HandArrays(
        name="standin",
        v_template=(vert * 1e-3).astype(np.float32),
        shapedirs=(_shapedirs(vert, weight, mesh, des) * 1e-3).astype(np.float32),
        posedirs=(_posedirs(vert, weight, des) * 1e-3).astype(np.float32),
        joint_regressor=_regressor(vert, weight, des).astype(np.float32),
        skin_weights=weight.astype(np.float32),
        faces=mesh.face,
        parents=MANO_PARENTS,
        mean_pose=mean_pose.reshape(45).astype(np.float32),
        tip_vertex_ids=tuple(int(i) for i in mesh.tip),
    )


# Degrees (flexion, abduction towards the thumb, twist), low and high, of the three joints of each digit.
LIMIT_DEG = {
    "thumb": (((-12, 42), (-32, 22), (-12, 18)), ((-10, 50), (-6, 6), (-4, 4)), ((-18, 72), (0, 0), (0, 0))),
    "index": (((-20, 90), (-14, 20), (-5, 5)), ((-3, 105), (0, 0), (0, 0)), ((-8, 78), (0, 0), (0, 0))),
    "middle": (((-20, 90), (-12, 12), (-5, 5)), ((-3, 105), (0, 0), (0, 0)), ((-8, 78), (0, 0), (0, 0))),
    "ring": (((-20, 92), (-14, 12), (-5, 5)), ((-3, 105), (0, 0), (0, 0)), ((-8, 78), (0, 0), (0, 0))),
    "pinky": (((-25, 94), (-24, 14), (-8, 8)), ((-3, 105), (0, 0), (0, 0)), ((-8, 78), (0, 0), (0, 0))),
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
