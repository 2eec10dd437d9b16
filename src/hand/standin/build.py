"""The stand-in hand: a hand mesh of our own design that can replace MANO where its licensed file is not available.

It has MANO's parameter space (16 joints in the same order, 48 pose and 10 shape parameters, flat rest pose, the same
axes) but our own mesh, so a network, a loss or a shard works the same way with either hand. Nothing here was derived
from MANO's data. Numpy only.

`design` has the skeleton and the sources of its proportions, `flesh` the implicit surface around it, `mesh` the mesh on
that surface; this module adds skinning weights, shape and pose directions and the joint regressor.

Shape legend: V vertices, K = 16 joints in MANO order, D = 5 digits (thumb, index, middle, ring, pinky). Lengths are in
mm; only the finished HandArrays are in metres.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from src.hand.skeleton import FINGER_NAMES, MANO_JOINT_NAMES, MANO_PARENTS, HandArrays
from src.hand.standin.design import Design, chain, design
from src.hand.standin.flesh import RADIUS, Flesh, finger_tubes, palm_rays
from src.hand.standin.mesh import Mesh, build_mesh, neighbour_mean

# Degrees of flexion of a hand at rest, knuckle to last joint.
RELAXED_DEG = {
    "thumb": (8, 12, 18),
    "index": (22, 30, 14),
    "middle": (26, 34, 16),
    "ring": (28, 36, 18),
    "pinky": (30, 34, 18),
}


def _smoothstep(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def _thumb_root_share(vert: np.ndarray, mesh: Mesh, des: Design) -> np.ndarray:
    """Weight [V] of the thumb's root joint: the ball of the thumb follows it, the rest of the palm does not."""
    root = chain(0)[0]
    offset = vert - des.joint[root]
    axial = offset @ des.bone[root]
    side = np.linalg.norm(offset - np.outer(np.clip(axial, 0, 46), des.bone[root]), axis=1)
    share = _smoothstep((30.0 - side) / 20.0) * _smoothstep((vert[:, 2] - 2.0) / 22.0)
    share = np.where(mesh.digit == 0, np.maximum(share, _smoothstep((axial - 4.0) / 26.0)), share)
    return share * _smoothstep((axial + 8.0) / 26.0) * (mesh.digit <= 0)


def _knuckle_share(vert: np.ndarray, mesh: Mesh, des: Design, digit: int) -> np.ndarray:
    """Weight [V] of a knuckle: a smooth step along the finger; in the palm on its own ray only."""
    root = chain(digit)[0]
    on_ray = np.clip(1.6 * (1.0 - np.abs(mesh.column - digit)), 0.0, 1.0)
    on_ray = np.where(mesh.digit >= 0, mesh.digit == digit, on_ray)
    axial = (vert - des.joint[root]) @ des.bone[root]
    return on_ray * _smoothstep((axial + 9.0) / 22.0)


def _skin_weights(mesh: Mesh, des: Design) -> np.ndarray:
    """Linear blend skinning weights [V, K]: smooth steps along each digit; fingers share vertices only in the webs."""
    num = len(mesh.vert)
    weight = np.zeros((num, 16))
    weight[:, 0] = 1.0
    for d, name in enumerate(FINGER_NAMES):
        for level, k in enumerate(chain(d)):
            if level:
                axial = (mesh.vert - des.joint[k]) @ des.bone[k]
                width = 0.9 * RADIUS[name][2 * level]
                share = _smoothstep((axial + width) / (2.0 * width)) * (mesh.digit == d)
            else:
                share = _knuckle_share(mesh.vert, mesh, des, d) if d else _thumb_root_share(mesh.vert, mesh, des)
            parent = k - 1 if level else 0
            moved = weight[:, parent] * share
            weight[:, k] += moved
            weight[:, parent] -= moved
    smooth = neighbour_mean(mesh.face, num)
    for _ in range(2):
        weight = 0.5 * weight + 0.5 * smooth @ weight
    weight[weight < 0.01] = 0.0
    return weight / weight.sum(1, keepdims=True)


def _shapedirs(vert: np.ndarray, weight: np.ndarray, des: Design) -> np.ndarray:
    """Ten directions [V, 3, 10] mm per standard deviation: size, finger length, palm breadth, hand depth, finger
    thickness, finger taper, thumb length, index against ring, pinky length, fleshiness of the palm."""
    digit_weight = np.stack([weight[:, list(chain(d))].sum(1) for d in range(5)], axis=1)  # [V, D]
    palm_weight = 1.0 - digit_weight.sum(1)

    def palm_scale(strain: tuple[float, float, float]) -> np.ndarray:
        """Stretch the palm; digits move with their first joint."""
        first = des.joint[[chain(d)[0] for d in range(5)]]
        return palm_weight[:, None] * vert * strain + digit_weight @ (first * strain)

    def length(strain: dict[int, float]) -> np.ndarray:
        """Stretch digits along their bones."""
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
    """Pose corrections [V, 3, 135] mm, linear in R - I: a bent knuckle keeps its height, the flesh on its palm side
    bulges beside the crease. 1 - cos(angle) = -trace(R - I) / 2 measures bending about any axis."""
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
    """[K, V]: each joint as a convex combination of the vertices around it (non-negative, rows sum to 1).

    Uses the nearest vertices that both the joint and its parent move, with weights as even as possible.
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
    """Non-negative, nearly even weights [N] with sum 1 and weights @ point = target; None if there are none."""
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


@lru_cache(maxsize=1)
def build_standin_hand() -> HandArrays:
    """The stand-in hand's arrays in metres, identical to the bit on every call and in every process."""
    des = design()
    tubes = finger_tubes(des)
    mesh = build_mesh(*palm_rays(des), tubes, Flesh(des, tubes).field)
    weight = _skin_weights(mesh, des)
    vert = mesh.vert
    mean_pose = np.zeros((15, 3))
    for d, name in enumerate(FINGER_NAMES):
        for k, deg in zip(chain(d), RELAXED_DEG[name], strict=True):
            mean_pose[k - 1] = np.radians(deg) * des.frame[k, 0]
    return HandArrays(
        name="standin",
        v_template=(vert * 1e-3).astype(np.float32),
        shapedirs=(_shapedirs(vert, weight, des) * 1e-3).astype(np.float32),
        posedirs=(_posedirs(vert, weight, des) * 1e-3).astype(np.float32),
        joint_regressor=_regressor(vert, weight, des).astype(np.float32),
        skin_weights=weight.astype(np.float32),
        faces=mesh.face,
        mean_pose=mean_pose.reshape(45).astype(np.float32),
        tip_vertex_ids=tuple(int(i) for i in mesh.tip),
    )
