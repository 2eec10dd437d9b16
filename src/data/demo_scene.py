"""Paints demo samples: skin, forearm, sleeve and light for the hands of `src.data.demo_hand`, before a backdrop.

The hand and its forearm are rasterised together at twice the resolution with vertex colours (Lambert with wrapped
light, hemispherical ambient, a little gloss, darkening where fingers come close), then averaged down and laid over a
procedural background. Everything random comes from the sample's own generator.

Shape legend: N samples, V hand vertices, A arm vertices, F faces of both, S image side.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from src.data.demo_backdrop import SKIN_RGB, background, noise_patch, occlude, sensor
from src.data.demo_hand import HandDraw
from src.hand.skeleton import FINGER_NAMES
from src.hand.standin import build_standin_hand
from src.hand.standin_design import chain, design
from src.hand.standin_flesh import RADIUS
from src.utils.mesh_render import incident_faces, render_mesh, vertex_normals

SUPER = 2  # supersampling
ARM_RING, ARM_SIDE = 13, 14
NEAR_MM = 60.0  # faces nearer than this are left out
MAX_TOWARD_CAMERA = 0.55  # sine of the forearm's angle against the image plane


@lru_cache(maxsize=1)
def _regions() -> dict[str, np.ndarray]:
    """Where on the hand's skin colours differ: `palm`, `knuckle`, `nail`, `tip` [V] in 0..1, `own` [V, 21] 1 where a
    joint cannot shade a vertex because both belong to one digit."""
    arrays, des = build_standin_hand(), design()
    vert = arrays.v_template.astype(np.float64) * 1e3
    normal = vertex_normals(vert[None].astype(np.float32), arrays.faces)[0]
    digit = np.stack([arrays.skin_weights[:, list(chain(d))].sum(1) for d in range(5)], axis=1)
    up = digit @ np.array([des.frame[chain(d)[1], 1] for d in range(5)])
    up[:, 1] += 1.0 - digit.sum(1)
    facing = (normal * up).sum(1)
    knuckle, nail, tip = np.zeros(len(vert)), np.zeros(len(vert)), np.zeros(len(vert))
    for d in range(5):
        for level, k in enumerate(chain(d)):
            near = np.exp(-(np.linalg.norm(vert - des.joint[k] - 8.0 * des.frame[k, 1], axis=1) ** 2) / 90.0)
            knuckle = np.maximum(knuckle, near * (0.0 if d == 0 and level == 0 else 1.0))
        last = chain(d)[2]
        centre = des.tip[d] - 8.5 * des.bone[last] + 7.5 * des.frame[last, 1]
        offset = (vert - centre) @ np.stack([des.bone[last], des.frame[last, 1], des.frame[last, 0]]).T
        half = 0.55 * RADIUS[FINGER_NAMES[d]][5]
        nail = np.maximum(nail, (np.abs(offset / np.array([7.0, 5.0, half])).max(1) < 1.0) * (facing > 0.45))
        tip = np.maximum(tip, np.exp(-(np.linalg.norm(vert - des.tip[d], axis=1) ** 2) / 150.0))
    owner = np.where(digit.max(1) > 0.4, digit.argmax(1), -1)
    own = owner[:, None] == np.array([-2, *(j // 4 for j in range(20))])
    own[:, [0, 1]] = True  # the wrist, and the thumb's root deep in the palm, shade nothing
    own[owner < 0] |= np.isin(np.arange(21), [0, 1, 5, 9, 13, 17])
    palm = np.clip(0.5 - 1.1 * facing, 0.0, 1.0)
    region = {"palm": palm, "knuckle": knuckle, "nail": nail, "tip": tip, "own": own}
    return {name: value.astype(np.float32) for name, value in region.items()}


@lru_cache(maxsize=1)
def _faces() -> tuple[np.ndarray, np.ndarray]:
    """Faces of hand and forearm [F, 3], and the incident faces of each vertex [V + A, 10] (padded with F)."""
    arrays = build_standin_hand()
    first, face = arrays.num_vertex, []
    for r in range(ARM_RING - 1):
        for i in range(ARM_SIDE):
            a, b = first + r * ARM_SIDE + i, first + r * ARM_SIDE + (i + 1) % ARM_SIDE
            face += [(a, b + ARM_SIDE, b), (a, a + ARM_SIDE, b + ARM_SIDE)]
    end = first + ARM_RING * ARM_SIDE
    face += [(end - ARM_SIDE + (i + 1) % ARM_SIDE, end - ARM_SIDE + i, end) for i in range(ARM_SIDE)]
    faces = np.concatenate([arrays.faces, np.array(face)])
    return faces, incident_faces(faces, end + 1)


def _arm(draw: HandDraw, sleeve: np.ndarray, girth: np.ndarray) -> np.ndarray:
    """Forearms [N, A, 3] camera mm that leave the wrist along `arm_rot`. sleeve [N] mm: where the cloth begins."""
    num = len(sleeve)
    along = np.empty((num, ARM_RING))
    along[:, :3], along[:, 3] = (6.0, 17.0, 27.0), np.maximum(sleeve - 3.0, 29.0)
    along[:, 4] = along[:, 5] = np.maximum(sleeve, 30.0)
    along[:, 5] -= 2.0
    along[:, 6:] = along[:, 4:5] + np.array([4.0, 16.0, 22.0, 60.0, 110.0, 180.0, 260.0])
    wide = 28.0 + 12.0 * np.clip((along - 40.0) / 160.0, 0.0, 1.0)
    wide[:, 0] -= 1.5  # starts inside the wrist
    high = wide * (0.70 + 0.2 * np.clip((along - 30.0) / 150.0, 0.0, 1.0))
    thick = np.zeros((num, ARM_RING))
    thick[:, 5:] = girth[:, None] * np.array([1.0, 1.35, 1.35, 0.95, 1.0, 1.3, 1.3, 1.6])
    # an arm that comes at the camera would hide the hand: it stays inside the wrist, which has a round end of its own
    hidden = draw.arm_rot[:, 2, 0] < -MAX_TOWARD_CAMERA
    along[hidden], wide[hidden], high[hidden], thick[hidden] = 4.0, 20.0, 12.0, 0.0
    turn = np.linspace(0, 2 * np.pi, ARM_SIDE, endpoint=False)
    local = np.empty((num, ARM_RING * ARM_SIDE + 1, 3))
    ring = local[:, :-1].reshape(num, ARM_RING, ARM_SIDE, 3)
    ring[..., 0] = along[..., None]
    ring[..., 1] = (high + thick)[..., None] * np.sin(turn)
    ring[..., 2] = (wide + thick)[..., None] * np.cos(turn)
    local[:, -1, 0], local[:, -1, 1:] = along[:, -1] + 6.0, 0.0
    blend = np.clip(local[..., :1] / 45.0, 0.0, 1.0)
    bent = (1 - blend) * (local @ draw.root_rot.transpose(0, 2, 1)) + blend * (local @ draw.arm_rot.transpose(0, 2, 1))
    return bent + draw.joint[:, :1]


def _closeness(vert: np.ndarray, normal: np.ndarray, joint: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How much of the light other digits keep from each hand vertex, [N, V] in 0..1 (1 is open)."""
    dist = (vert * vert).sum(-1)[..., None] + (joint * joint).sum(-1)[:, None] - 2.0 * vert @ joint.transpose(0, 2, 1)
    toward = normal @ joint.transpose(0, 2, 1) - (normal * vert).sum(-1)[..., None]
    block = np.exp(dist / -450.0) * np.clip(toward / 14.0 + 0.2, 0.0, 1.2) * (1.0 - own)
    return np.exp(-0.75 * block.sum(-1))


def _skin(rng: np.random.Generator, region: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Skin colour of one person: of each hand vertex [V, 3] and of the arm [3], RGB 0..255."""
    tone = rng.random() ** 1.25 * (len(SKIN_RGB) - 1)
    i = min(int(tone), len(SKIN_RGB) - 2)
    base = SKIN_RGB[i] + (tone - i) * (SKIN_RGB[i + 1] - SKIN_RGB[i])
    base = base * (1.0 + rng.normal(0.0, (0.05, 0.04, 0.05)).astype(np.float32))
    pale = 0.5 * base + 0.5 * np.array([232, 178, 152], np.float32)  # palms are paler, most of all on dark hands
    colour = base + (0.75 * region["palm"])[:, None] * (pale - base)
    red = rng.uniform(0.03, 0.16) * (region["knuckle"] + 0.8 * region["tip"])
    colour = colour * (1.0 - red[:, None] * np.array([0.25, 1.0, 0.9], np.float32))
    nail = 0.6 * base + 0.4 * np.array([250, 214, 205], np.float32)
    if rng.random() < 0.12:
        nail = rng.uniform(20, 240, 3).astype(np.float32)
    return colour + (0.9 * region["nail"])[:, None] * (nail - colour), base


def _cloth(rng: np.random.Generator, skin: np.ndarray, bare: bool) -> np.ndarray:
    """Colours [A, 3] of the forearm: skin, then cloth unless `bare`, sometimes with a cuff or stripes."""
    colour = np.tile(skin, (ARM_RING * ARM_SIDE + 1, 1)).astype(np.float32)
    if bare:
        return colour
    cloth = rng.uniform(15, 240, 3).astype(np.float32)
    colour[5 * ARM_SIDE :] = cloth
    kind = rng.random()
    other = rng.uniform(15, 240, 3).astype(np.float32)
    if kind < 0.3:
        colour[5 * ARM_SIDE : 8 * ARM_SIDE] = other
    elif kind < 0.5:
        stripes = colour[: ARM_RING * ARM_SIDE].reshape(ARM_RING, ARM_SIDE, 3)
        stripes[5:, ::2] = other
    return colour


def _light(rng: np.random.Generator, albedo: np.ndarray, normal: np.ndarray, open_sky: np.ndarray) -> np.ndarray:
    """Lit vertex colours [V, 3]: ambient from above, one lamp on the viewer's side, a little gloss."""
    lamp = rng.normal((0.0, -0.9, -1.1), 1.0)
    lamp[2] = -abs(lamp[2]) - 0.15
    lamp = (lamp / np.linalg.norm(lamp)).astype(np.float32)
    warm = 1.0 + rng.normal(0.0, 0.07, 3).astype(np.float32) * np.array([1.0, 0.3, 1.0], np.float32)
    ambient, key = rng.uniform(0.35, 0.65), rng.uniform(0.45, 0.9)
    dark = rng.uniform(0.75, 1.1) if rng.random() < 0.85 else rng.uniform(0.4, 0.75)
    wrap = np.clip((normal @ lamp + 0.15) / 1.15, 0.0, 1.0)
    sky = 0.85 - 0.25 * normal[:, 1]
    half = lamp + np.array([0.0, 0.0, -1.0], np.float32)
    half /= np.linalg.norm(half)
    gloss = rng.uniform(5.0, 38.0) * np.clip(normal @ half, 0.0, 1.0) ** 18
    light = (ambient * sky * open_sky)[:, None] + (key * wrap * (0.35 + 0.65 * open_sky))[:, None] * warm
    return dark * (albedo * light + (gloss * open_sky)[:, None])


def paint(draw: HandDraw, rngs: list[np.random.Generator], size: int) -> list[np.ndarray]:
    """The pictures [S, S, 3] uint8 RGB of all hands of a draw."""
    num = len(rngs)
    sleeve = np.array([rng.uniform(28.0, 48.0) if rng.random() < 0.6 else rng.uniform(48.0, 110.0) for rng in rngs])
    girth = np.array([rng.uniform(2.0, 9.0) * (rng.random() > 0.28) for rng in rngs])  # 0: a bare arm
    faces, table = _faces()
    region = _regions()
    vert = np.concatenate([draw.vert, _arm(draw, sleeve, girth)], axis=1).astype(np.float32)
    normal = vertex_normals(vert, faces, table)
    num_hand = draw.vert.shape[1]
    open_sky = np.ones(vert.shape[:2], np.float32)
    centred = (draw.joint - draw.joint[:, :1]).astype(np.float32)
    hand = vert[:, :num_hand] - draw.joint[:, :1].astype(np.float32)
    open_sky[:, :num_hand] = _closeness(hand, normal[:, :num_hand], centred, region["own"])
    images = []
    for i, rng in enumerate(rngs):
        skin, base = _skin(rng, region)
        albedo = np.concatenate([skin, _cloth(rng, base, bare=girth[i] == 0.0)])
        colour = _light(rng, albedo, normal[i], open_sky[i])
        px = vert[i, :, :2] / np.maximum(vert[i, :, 2:], NEAR_MM) * draw.focal[i] + draw.princpt[i]
        behind = vert[i, :, 2] < NEAR_MM
        face = faces[~behind[faces].any(1)] if behind.any() else faces
        image = background(rng, size)
        _lay_over(rng, image, px, vert[i, :, 2], face, colour)
        joint_px = draw.joint[i, :, :2] / draw.joint[i, :, 2:] * draw.focal[i] + draw.princpt[i]
        images.append(sensor(rng, occlude(rng, image, joint_px)))
    assert len(images) == num
    return images


def _lay_over(
    rng: np.random.Generator, image: np.ndarray, px: np.ndarray, depth: np.ndarray, face: np.ndarray, colour: np.ndarray
) -> None:
    """Rasterise hand and arm at twice the resolution over `image`, in place. px [V + A, 2], colours [V + A, 3]."""
    size = image.shape[0]
    low = np.clip(np.floor(px.min(0)), 0, size - 1).astype(int)
    high = np.clip(np.ceil(px.max(0)), 0, size - 1).astype(int) + 1
    width, height = (high - low).tolist()
    point = SUPER * (px - low) + 0.5 * (SUPER - 1)
    layer = render_mesh(point, depth, face, colour, (SUPER * width, SUPER * height))
    small = cv2.resize(layer, (width, height), interpolation=cv2.INTER_AREA)
    grain = cv2.resize(noise_patch(rng, size // 3, size // 3), (size, size), interpolation=cv2.INTER_LINEAR)
    amount = float(rng.uniform(0.02, 0.14))
    grain = cv2.addWeighted(grain[:height, :width], amount, grain[:height, :width], 0.0, 128.0 * (1.0 - amount))
    hand = cv2.multiply(cv2.cvtColor(small, cv2.COLOR_RGBA2RGB), grain, scale=1.0 / 128.0)
    rest = cv2.cvtColor(255 - small[..., 3], cv2.COLOR_GRAY2RGB)
    window = image[low[1] : high[1], low[0] : high[0]]
    window[:] = cv2.add(hand, cv2.multiply(window, rest, scale=1.0 / 255.0))
