"""Random natural hand poses, shapes, views and cameras for the demo, drawn for many samples at once.

Every sample has its own random generator and does not depend on the samples drawn with it. Right hands only;
`src.data.demo.make` mirrors some of them. Torch is imported inside functions; forward kinematics is the model's own
ManoLayer.

Shape legend: N samples, V vertices, J = 21 joints (OpenPose order).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from src.hand.standin.build import build_standin_hand
from src.hand.standin.design import angles_to_rotmat, chain, joint_limits, rotation_about

if TYPE_CHECKING:
    from src.hand.mano import ManoLayer

NUM_UNIFORM, NUM_NORMAL = 26, 83


class Gesture(NamedTuple):
    """A typical finger pose, from 0 (straight) to 1 (as in a fist); `bend` and `curl` from index to pinky."""

    weight: float
    bend: tuple[float, float, float, float]  # knuckles
    curl: tuple[float, float, float, float]  # the two joints beyond the knuckles
    thumb: tuple[float, float]  # opposition to the fingers, and flexion of its own joints
    spread: float  # of the fingers: 1 wide, 0 parallel, negative: pressed together


OPEN, CURL = 0.04, 0.96
GESTURES = {
    "open": Gesture(4.5, (0.03,) * 4, (0.04,) * 4, (0.0, 0.05), 1.0),
    "flat": Gesture(3.0, (0.05,) * 4, (0.06,) * 4, (0.2, 0.1), -0.1),
    "relaxed": Gesture(1.4, (0.25, 0.28, 0.32, 0.36), (0.25, 0.30, 0.33, 0.33), (0.3, 0.25), 0.3),
    "half closed": Gesture(0.8, (0.42, 0.45, 0.48, 0.5), (0.55, 0.6, 0.6, 0.55), (0.5, 0.3), 0.2),
    "claw": Gesture(0.8, (0.05, 0.05, 0.08, 0.1), (0.75, 0.8, 0.8, 0.75), (0.25, 0.35), 0.4),
    "cup": Gesture(0.6, (0.5, 0.52, 0.54, 0.55), (0.25, 0.28, 0.28, 0.25), (0.45, 0.15), 0.0),
    "fist": Gesture(0.9, (0.9, 0.93, 0.95, 0.97), (CURL,) * 4, (0.85, 0.7), 0.0),
    "fist, thumb beside": Gesture(0.6, (0.85, 0.9, 0.92, 0.95), (CURL,) * 4, (0.25, 0.25), 0.0),
    "point": Gesture(0.9, (OPEN, 0.85, 0.9, 0.92), (OPEN, CURL, CURL, CURL), (0.75, 0.7), 0.2),
    "gun": Gesture(0.5, (OPEN, 0.85, 0.9, 0.92), (OPEN, CURL, CURL, CURL), (0.0, 0.05), 0.2),
    "victory": Gesture(0.8, (OPEN, OPEN, 0.85, 0.9), (OPEN, OPEN, CURL, CURL), (0.85, 0.7), 1.2),
    "three": Gesture(0.5, (OPEN, OPEN, OPEN, 0.85), (OPEN, OPEN, OPEN, 0.9), (0.9, 0.6), 0.8),
    "thumb and two": Gesture(0.4, (OPEN, OPEN, 0.85, 0.88), (OPEN, OPEN, CURL, CURL), (0.0, 0.05), 1.0),
    "four": Gesture(0.6, (OPEN,) * 4, (OPEN,) * 4, (0.95, 0.5), 0.8),
    "thumb up": Gesture(0.8, (0.9, 0.92, 0.93, 0.93), (CURL,) * 4, (-0.1, 0.0), 0.0),
    "horns": Gesture(0.4, (OPEN, 0.85, 0.88, OPEN), (OPEN, CURL, CURL, OPEN), (0.7, 0.6), 0.5),
    "telephone": Gesture(0.4, (0.85, 0.88, 0.88, OPEN), (CURL, CURL, CURL, OPEN), (-0.1, 0.0), 0.5),
    "little finger": Gesture(0.3, (0.8, 0.82, 0.85, OPEN), (0.9, 0.9, 0.9, OPEN), (0.7, 0.6), 0.2),
    "OK": Gesture(0.8, (0.5, 0.15, 0.1, 0.05), (0.52, 0.15, 0.1, 0.08), (0.75, 0.3), 0.6),
    "pinch": Gesture(0.8, (0.5, 0.5, 0.55, 0.6), (0.45, 0.45, 0.5, 0.5), (0.72, 0.25), 0.1),
    "pen": Gesture(0.6, (0.5, 0.55, 0.65, 0.7), (0.4, 0.5, 0.65, 0.7), (0.65, 0.4), 0.0),
    "cylinder": Gesture(0.8, (0.5, 0.52, 0.54, 0.55), (0.45, 0.5, 0.5, 0.45), (0.8, 0.1), 0.2),
    "ball": Gesture(0.7, (0.25, 0.27, 0.3, 0.3), (0.3, 0.33, 0.35, 0.33), (0.6, 0.1), 0.9),
}
FREE = 0.25  # fraction of hands whose fingers bend independently of each other
BLEND = 0.4  # fraction of the remaining hands that are between two gestures
BEND_DEG, CURL_DEG = 85.0, (100.0, 62.0)
THUMB_OPEN_DEG = ((0, 8, 0), (0, 0, 0), (0, 0, 0))
THUMB_OPPOSED_DEG = (34, -26, 10)
THUMB_BENT_DEG = (42, 62)
SPREAD_DEG = (0.0, 11.0, 2.0, -7.0, -17.0)
# Hand axes -> camera: fingers up, back of the hand towards the camera.
UPRIGHT = np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
DEPTH_MM = (250.0, 900.0)
SHAPE_STD = 1.6  # wider than real hands: data sets place wrist and knuckles differently
CUT = 0.1  # fraction of hands that the image edge may cut off


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


def rotation_anywhere(normal: np.ndarray) -> np.ndarray:
    """Rotations [N, 3, 3], uniform on SO(3), from standard normal numbers [N, 4] (a random unit quaternion)."""
    w, x, y, z = (normal / np.linalg.norm(normal, axis=1, keepdims=True)).T
    rows = (
        *(1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        *(2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        *(2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return np.stack(rows, axis=-1).reshape(-1, 3, 3)


def random_orientation(uniform: np.ndarray, normal: np.ndarray, free_rotation: float) -> np.ndarray:
    """Root rotations [N, 3, 3], hand axes -> camera. uniform [N, 5], normal [N, 7].

    A fraction `free_rotation` is uniform on SO(3). The others have views typical of photographs: palm, back or side;
    some reach towards the camera or away from it; half of them are roughly upright, the rest rolled by any angle.
    """
    side = np.select([uniform[:, 2] < 0.42, uniform[:, 2] < 0.78, uniform[:, 2] < 0.89], [180.0, 0.0, 90.0], -90.0)
    yaw = rotation_about(np.array([0.0, 1.0, 0.0]), np.radians(side + 28.0 * normal[:, 4]))
    reach = np.where(uniform[:, 3] < 0.2, np.sign(uniform[:, 3] - 0.1) * 50.0, 0.0)
    pitch = rotation_about(np.array([1.0, 0.0, 0.0]), np.radians(reach + 20.0 * normal[:, 5]))
    roll = np.where(uniform[:, 4] < 0.5, np.radians(25.0) * normal[:, 6], 2 * np.pi * uniform[:, 0])
    posed = rotation_about(np.array([0.0, 0.0, 1.0]), roll) @ pitch @ yaw @ UPRIGHT
    return np.where((uniform[:, 1] < free_rotation)[:, None, None], rotation_anywhere(normal[:, :4]), posed)


def random_angles(uniform: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Anatomical joint angles [N, 15, 3] rad within the natural limits. uniform [N, 16], normal [N, 60]."""
    num = len(uniform)
    bend, curl, thumb, spread = _fingers(uniform)
    bend = np.clip(bend + 0.07 * normal[:, :4], -0.15, 1.05)
    curl = np.clip(curl + 0.07 * normal[:, 4:8], 0.0, 1.05)
    thumb = thumb + 0.12 * normal[:, 8:10]
    jitter = normal[:, 15:60].reshape(num, 15, 3) * (5.0, 4.0, 2.0)
    deg = np.zeros((num, 15, 3))
    root, middle, last = (k - 1 for k in chain(0))
    opposed, low = thumb[:, :1], np.array(THUMB_OPEN_DEG[0], float)
    deg[:, root] = low + opposed * (np.array(THUMB_OPPOSED_DEG) - low)
    deg[:, root, 1] += 3.0 + 11.0 * normal[:, 10]
    deg[:, middle, 0], deg[:, last, 0] = (thumb[:, 1] * most for most in THUMB_BENT_DEG)
    deg[:, last, 0] += 9.0 * normal[:, 11]  # some bend only the last joint, some extend it
    for d in range(1, 5):
        first, second, third = (k - 1 for k in chain(d))
        deg[:, first, 0] = BEND_DEG * bend[:, d - 1]
        deg[:, first, 1] = SPREAD_DEG[d] * spread * (1.0 - 0.75 * np.clip(bend[:, d - 1], 0, 1))
        deg[:, second, 0], deg[:, third, 0] = (most * curl[:, d - 1] for most in CURL_DEG)
    low, high = joint_limits()
    return np.clip(np.radians(deg + jitter), low, high)


def _fingers(uniform: np.ndarray) -> tuple[np.ndarray, ...]:
    """bend [N, 4], curl [N, 4], thumb [N, 2] and spread [N] as in `Gesture`. uniform [N, 16]."""
    edges = np.cumsum([gesture.weight for gesture in GESTURES.values()])
    chosen = np.searchsorted(edges, uniform[:, :2] * edges[-1]).clip(max=len(edges) - 1)  # [N, 2]
    way = np.where(uniform[:, 2] < BLEND, uniform[:, 2] / BLEND, 0.0)[:, None]
    is_free = (uniform[:, 3] < FREE)[:, None]

    def blended(name: str, free: np.ndarray) -> np.ndarray:
        value = np.array([np.atleast_1d(getattr(gesture, name)) for gesture in GESTURES.values()])
        begin, end = value[chosen[:, 0]], value[chosen[:, 1]]
        return np.where(is_free, free, begin + way * (end - begin))

    thumb = uniform[:, 12:14] * (1.05, 0.9) - (0.05, 0.0)
    spread = blended("spread", 1.8 * uniform[:, 14:15] - 0.3)[:, 0] + 1.2 * (uniform[:, 15] - 0.35)
    return (
        blended("bend", uniform[:, 4:8] ** 1.7),
        blended("curl", uniform[:, 8:12] ** 1.7),
        blended("thumb", thumb),
        spread,
    )


def _fk(rotmat: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ManoLayer on float32 axis-angle, as stored in the shard: pose [N, 48], vert and joint [N, ., 3] mm."""
    import torch

    from src.geometry.rotation import matrix_to_axis_angle

    with torch.inference_mode():
        pose = matrix_to_axis_angle(torch.from_numpy(rotmat)).float().flatten(1)
        layer = _layer()
        out = layer(layer.pose_to_rotmat(pose, True), torch.from_numpy(shape))
    return pose.numpy(), out.vert.double().numpy(), out.joint.double().numpy()


def draw_hands(rngs: list[np.random.Generator], img_size: int, free_rotation: float) -> HandDraw:
    """Draw one hand and camera per generator. Most hands are (almost) entirely inside the square image."""
    uniform = np.stack([rng.random(NUM_UNIFORM) for rng in rngs])
    normal = np.stack([rng.standard_normal(NUM_NORMAL) for rng in rngs])
    root = random_orientation(uniform[:, :5], normal[:, :7], free_rotation)
    fingers = angles_to_rotmat(random_angles(uniform[:, 5:21], normal[:, 7:67]))
    rotmat = np.concatenate([root[:, None], fingers], axis=1)
    shape = np.clip(SHAPE_STD * normal[:, 67:77], -3.5, 3.5).astype(np.float32)
    pose, vert, joint = _fk(rotmat, shape)

    fov = np.radians(25.0 * (90.0 / 25.0) ** (uniform[:, 21] ** 1.4))
    focal = (0.5 * img_size / np.tan(0.5 * fov))[:, None] * (1.0 + 0.01 * np.clip(normal[:, 77:79], -2, 2))
    princpt = 0.5 * (img_size - 1) + 0.03 * img_size * np.clip(normal[:, 79:81], -2, 2)
    focal, princpt = focal.astype(np.float32), princpt.astype(np.float32)
    move = _place(vert, focal, princpt, img_size, uniform[:, 22:26])
    bend = rotation_about(np.array([0.0, 0.0, 1.0]), np.radians(28.0) * np.clip(normal[:, 81], -1.8, 1.8))
    bend = bend @ rotation_about(np.array([0.0, 1.0, 0.0]), np.radians(12.0) * np.clip(normal[:, 82], -2, 2))
    return HandDraw(pose, shape, vert + move, joint + move, focal, princpt, root @ bend, root)


def _place(vert: np.ndarray, focal: np.ndarray, princpt: np.ndarray, size: int, uniform: np.ndarray) -> np.ndarray:
    """Translations [N, 1, 3] mm that give the hands a random position and size in the image. uniform [N, 4]."""
    low, high = vert.min(1), vert.max(1)
    centre, extent = 0.5 * (low + high), (high - low)[:, :2].max(1)
    share = 0.38 + 0.44 * uniform[:, 0]  # desired fraction of the image side
    depth = np.clip(focal[:, 0] * extent / (share * size), *DEPTH_MM)
    nearest = focal[:, 0] * extent / (0.85 * size)  # any nearer, the hand would not fit
    depth = np.maximum(depth, nearest) + 0.25 * (high - low)[:, 2]
    half = 0.5 * focal * (high - low)[:, :2] / depth[:, None]
    room = np.maximum(0.5 * size - half - 0.02 * size, 0.0)
    room += np.where(uniform[:, 3:4] < CUT, 0.6 * half, 0.0)
    target = 0.5 * (size - 1) + (2.0 * uniform[:, 1:3] - 1.0) * room
    where = np.concatenate([(target - princpt) / focal * depth[:, None], depth[:, None]], axis=1)
    return (where - centre)[:, None]
