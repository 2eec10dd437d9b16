"""Random natural hands before a random camera: the numbers behind a demo sample, drawn for many samples at once.

Every sample owns a random generator, so a sample is the same whatever it is drawn together with. Right hands only;
`src.data.demo` mirrors the left ones. Torch is imported inside functions: one FK (ManoLayer) serves data and model.

Shape legend: N samples, V vertices, J = 21 joints (OpenPose order).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from src.hand.standin import build_standin_hand
from src.hand.standin_design import angles_to_rotmat, chain, joint_limits, rotation_about

if TYPE_CHECKING:
    from src.hand.mano import ManoLayer

NUM_UNIFORM, NUM_NORMAL = 32, 96
# How far thumb, index, middle, ring, pinky are bent in typical gestures (0 straight, 1 a fist), and how often.
GESTURES = (
    ("open", 0.16, (0.05, 0.05, 0.05, 0.05, 0.05)),
    ("relaxed", 0.18, (0.30, 0.28, 0.34, 0.38, 0.40)),
    ("fist", 0.11, (0.85, 0.95, 0.97, 0.97, 0.95)),
    ("point", 0.10, (0.75, 0.05, 0.88, 0.92, 0.92)),
    ("victory", 0.07, (0.80, 0.05, 0.05, 0.90, 0.90)),
    ("thumb up", 0.06, (0.00, 0.92, 0.95, 0.95, 0.92)),
    ("pinch", 0.10, (0.62, 0.52, 0.45, 0.30, 0.25)),
    ("grasp", 0.12, (0.45, 0.50, 0.52, 0.54, 0.55)),
    ("free", 0.10, (0.45, 0.45, 0.45, 0.45, 0.45)),
)
FULL_BEND_DEG = (85.0, 100.0, 62.0)
THUMB_OPEN_DEG = ((0, 8, 0), (0, 0, 0), (0, 0, 0))
THUMB_FIST_DEG = ((32, -24, 8), (38, 0, 0), (52, 0, 0))
SPREAD_DEG = (0.0, 11.0, 2.0, -7.0, -17.0)
# Hand axes -> camera: fingers up, back of the hand towards the viewer.
UPRIGHT = np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
DEPTH_MM = (250.0, 900.0)


@dataclass
class HandDraw:
    """N right hands in camera space; mm, px, rad."""

    pose: np.ndarray  # [N, 48] axis-angle, root first
    shape: np.ndarray  # [N, 10]
    vert: np.ndarray  # [N, V, 3] camera mm
    joint: np.ndarray  # [N, J, 3] camera mm
    focal: np.ndarray  # [N, 2]
    princpt: np.ndarray  # [N, 2]
    arm_rot: np.ndarray  # [N, 3, 3] hand axes -> camera, of the forearm
    root_rot: np.ndarray  # [N, 3, 3] hand axes -> camera


@lru_cache(maxsize=1)
def _layer() -> ManoLayer:
    from src.hand.mano import ManoLayer

    return ManoLayer(build_standin_hand()).eval()


def random_orientation(uniform: np.ndarray, normal: np.ndarray, free_rotation: float) -> np.ndarray:
    """Root rotations [N, 3, 3]: a share `free_rotation` anywhere on SO(3); the others reach into the picture from any
    direction and show rather the back of the hand. uniform [N, 2], normal [N, 6]."""
    quat = normal[:, :4] / np.linalg.norm(normal[:, :4], axis=1, keepdims=True)
    w, x, y, z = quat.T
    anywhere = np.stack(
        (
            *(1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
            *(2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
            *(2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
        ),
        axis=-1,
    ).reshape(-1, 3, 3)
    yaw = rotation_about(np.array([0.0, 1.0, 0.0]), np.radians(35.0) * normal[:, 5])
    pitch = rotation_about(np.array([1.0, 0.0, 0.0]), np.radians(20.0) * normal[:, 4])
    roll = rotation_about(np.array([0.0, 0.0, 1.0]), 2 * np.pi * uniform[:, 0])
    reaching = roll @ pitch @ yaw @ UPRIGHT
    return np.where((uniform[:, 1] < free_rotation)[:, None, None], anywhere, reaching)


def random_angles(uniform: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Anatomical joint angles [N, 15, 3] rad within the natural limits. uniform [N, 8], normal [N, 56]."""
    num = len(uniform)
    edges = np.cumsum([g[1] for g in GESTURES])
    kind = np.minimum(np.searchsorted(edges, uniform[:, 0] * edges[-1]), len(GESTURES) - 1)
    sigma = np.where(kind == len(GESTURES) - 1, 0.35, 0.09)[:, None]
    bend = np.clip(np.array([g[2] for g in GESTURES])[kind] + sigma * normal[:, :5], 0.0, 1.05)  # [N, 5]
    spread = uniform[:, 1:2] * 1.4 - 0.35
    hook = 0.22 * normal[:, 5:6]  # > 0: bent at the finger joints rather than at the knuckle
    jitter = normal[:, 11:56].reshape(num, 15, 3) * (5.0, 2.5, 2.0)
    deg = np.zeros((num, 15, 3))
    for d in range(5):
        for level, k in enumerate(chain(d)):
            if d == 0:
                low, high = np.array(THUMB_OPEN_DEG[level], float), np.array(THUMB_FIST_DEG[level], float)
                deg[:, k - 1] = low + bend[:, :1] * (high - low)
            else:
                lean = np.clip(1.0 + (-hook if level == 0 else hook), 0.3, 1.5)[:, 0]
                deg[:, k - 1, 0] = bend[:, d] * FULL_BEND_DEG[level] * lean
                if level == 0:
                    deg[:, k - 1, 1] = SPREAD_DEG[d] * spread[:, 0] * (1.0 - 0.75 * np.clip(bend[:, d], 0, 1))
    deg[:, chain(0)[0] - 1, 1] += 12.0 * (uniform[:, 2] - 0.5)
    low, high = joint_limits()
    return np.clip(np.radians(deg + jitter), low, high)


def _fk(rotmat: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ManoLayer on float32 axis-angle, as a reader of the shard would do: pose [N, 48], vert, joint [N, ., 3] mm."""
    import torch

    from src.geometry.rotation import matrix_to_axis_angle

    with torch.inference_mode():
        pose = matrix_to_axis_angle(torch.from_numpy(rotmat)).float().flatten(1)
        layer = _layer()
        out = layer(layer.pose_to_rotmat(pose, True), torch.from_numpy(shape))
    return pose.numpy(), out.vert.double().numpy(), out.joint.double().numpy()


def draw_hands(rngs: list[np.random.Generator], img_size: int, free_rotation: float) -> HandDraw:
    """Draw one hand and camera per generator. The hand lies (almost) whole in a square image of `img_size` px."""
    uniform = np.stack([rng.random(NUM_UNIFORM) for rng in rngs])
    normal = np.stack([rng.standard_normal(NUM_NORMAL) for rng in rngs])
    root = random_orientation(uniform[:, :2], normal[:, :6], free_rotation)
    rotmat = np.concatenate([root[:, None], angles_to_rotmat(random_angles(uniform[:, 2:10], normal[:, 6:62]))], axis=1)
    shape = np.clip(normal[:, 62:72], -2.5, 2.5).astype(np.float32)
    pose, vert, joint = _fk(rotmat, shape)

    fov = np.radians(25.0 * (90.0 / 25.0) ** (uniform[:, 10] ** 1.4))
    focal = (0.5 * img_size / np.tan(0.5 * fov))[:, None] * (1.0 + 0.01 * np.clip(normal[:, 72:74], -2, 2))
    princpt = 0.5 * (img_size - 1) + 0.03 * img_size * np.clip(normal[:, 74:76], -2, 2)
    focal, princpt = focal.astype(np.float32), princpt.astype(np.float32)
    move = _place(vert, focal, princpt, img_size, uniform[:, 11:15])
    bend = rotation_about(np.array([0.0, 0.0, 1.0]), np.radians(28.0) * np.clip(normal[:, 76], -1.8, 1.8))
    bend = bend @ rotation_about(np.array([0.0, 1.0, 0.0]), np.radians(9.0) * np.clip(normal[:, 77], -2, 2))
    return HandDraw(pose, shape, vert + move, joint + move, focal, princpt, root @ bend, root)


def _place(vert: np.ndarray, focal: np.ndarray, princpt: np.ndarray, size: int, uniform: np.ndarray) -> np.ndarray:
    """Wrist positions [N, 1, 3] mm that put the hands at a random place and size in the image. uniform [N, 4]."""
    low, high = vert.min(1), vert.max(1)
    centre, extent = 0.5 * (low + high), (high - low)[:, :2].max(1)
    share = 0.38 + 0.44 * uniform[:, 0]  # wanted share of the image's side
    depth = np.clip(focal[:, 0] * extent / (share * size), *DEPTH_MM)
    nearest = focal[:, 0] * extent / (0.85 * size)  # nearer, it would not fit
    depth = np.maximum(depth, nearest) + 0.25 * (high - low)[:, 2]
    half = 0.5 * focal * (high - low)[:, :2] / depth[:, None]
    room = np.maximum(0.5 * size - half - 0.02 * size, 0.0)
    target = 0.5 * (size - 1) + (2.0 * uniform[:, 1:3] - 1.0) * room
    where = np.concatenate([(target - princpt) / focal * depth[:, None], depth[:, None]], axis=1)
    return (where - centre)[:, None]
