"""Colours of the demo's hands: skin, creases, nails, rings, watches, sleeves. light.py shades them.

Shape legend: V hand vertices, A arm vertices, D = 5 digits.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np

from src.data.demo.backdrop import SKIN_RGB
from src.hand.skeleton import FINGER_NAMES
from src.hand.standin.build import build_standin_hand
from src.hand.standin.design import chain, design
from src.hand.standin.flesh import RADIUS
from src.utils.mesh_render import vertex_normals

ARM_RING, ARM_SIDE = 13, 14
# Palm creases at rest, mm in (distal, radial): head line, heart line, and the one around the ball of the thumb.
PALM_LINES = (
    ((72, 26), (62, 10), (52, -8), (48, -24)),
    ((88, 14), (80, 2), (72, -12), (70, -28)),
    ((74, 28), (58, 14), (40, 6), (18, 4)),
)


@lru_cache(maxsize=1)
def regions() -> dict[str, np.ndarray]:
    """Regions of the skin with their own colours, [V] in 0..1: `palm`, `knuckle`, `nail`, `tip`, `crease`.

    Also `ring` [D, V], a band around the first bone of each finger; `rest` [V, 3], the scaled position at rest; and
    `own` [V, 21], 1 for a joint that cannot shade a vertex because both belong to one digit.
    """
    arrays, des = build_standin_hand(), design()
    vert = arrays.v_template.astype(np.float64) * 1e3
    normal = vertex_normals(vert[None].astype(np.float32), arrays.faces)[0]
    digit = np.stack([arrays.skin_weights[:, list(chain(d))].sum(1) for d in range(5)], axis=1)
    up = digit @ np.array([des.frame[chain(d)[1], 1] for d in range(5)])
    up[:, 1] += 1.0 - digit.sum(1)
    facing = (normal * up).sum(1)
    knuckle, nail, tip, crease = (np.zeros(len(vert)) for _ in range(4))
    ring = np.zeros((5, len(vert)))
    for d in range(5):
        for level, k in enumerate(chain(d)):
            offset = vert - des.joint[k]
            near = np.exp(-(np.linalg.norm(offset - 8.0 * des.frame[k, 1], axis=1) ** 2) / 90.0)
            knuckle = np.maximum(knuckle, near * (0.0 if d == 0 and level == 0 else 1.0))
            if level:
                line = np.exp(-((offset @ des.bone[k]) ** 2) / 6.0) * (digit[:, d] > 0.7)
                crease = np.maximum(crease, line * np.clip(0.3 - 1.2 * facing, 0.0, 1.0))
        first, last = chain(d)[0], chain(d)[2]
        along = (vert - des.joint[first]) @ des.bone[first]
        ring[d] = (np.abs(along - (20.0 if d == 0 else 24.0)) < 3.6) * (digit[:, d] > 0.7)
        centre = des.tip[d] - 8.5 * des.bone[last] + 7.5 * des.frame[last, 1]
        offset = (vert - centre) @ np.stack([des.bone[last], des.frame[last, 1], des.frame[last, 0]]).T
        half = 0.55 * RADIUS[FINGER_NAMES[d]][5]
        nail = np.maximum(nail, (np.abs(offset / np.array([7.0, 5.0, half])).max(1) < 1.0) * (facing > 0.45))
        tip = np.maximum(tip, np.exp(-(np.linalg.norm(vert - des.tip[d], axis=1) ** 2) / 150.0))
    owner = np.where(digit.max(1) > 0.4, digit.argmax(1), -1)
    own = owner[:, None] == np.array([-2, *(j // 4 for j in range(20))])
    own[:, [0, 1]] = True  # the wrist and the thumb's root, deep in the palm, cast no shadow
    own[owner < 0] |= np.isin(np.arange(21), [0, 1, 5, 9, 13, 17])
    palm = np.clip(0.5 - 1.1 * facing, 0.0, 1.0)
    crease = np.maximum(crease, _palm_lines(vert) * (facing < -0.3))
    region = {"palm": palm, "knuckle": knuckle, "nail": nail, "tip": tip, "crease": crease}
    region |= {"ring": ring, "rest": vert / 40.0, "own": own}
    return {name: value.astype(np.float32) for name, value in region.items()}


def _palm_lines(vert: np.ndarray) -> np.ndarray:
    """Closeness [V] to a palm crease; vert [V, 3] mm at rest."""
    near = np.zeros(len(vert))
    flat = np.stack([-vert[:, 0], vert[:, 2]], axis=1)
    for line in np.array(PALM_LINES, float):
        for begin, end in pairwise(line):
            way = end - begin
            share = np.clip((flat - begin) @ way / (way @ way), 0.0, 1.0)
            off = np.linalg.norm(flat - begin - share[:, None] * way, axis=1)
            near = np.maximum(near, np.exp(-(off**2) / 8.0))
    return near


def paint_skin(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Skin of one random person: colour of each hand vertex [V, 3] and of the arm [3], RGB 0..255."""
    region = regions()
    tone = rng.random() ** 1.4 * (len(SKIN_RGB) - 1)
    i = min(int(tone), len(SKIN_RGB) - 2)
    base = SKIN_RGB[i] + (tone - i) * (SKIN_RGB[i + 1] - SKIN_RGB[i])
    base = base * (1.0 + rng.normal(0.0, (0.05, 0.05, 0.07)).astype(np.float32))
    pale = 0.5 * base + 0.5 * np.array([226, 160, 140], np.float32)  # palms are paler, especially on dark skin
    colour = base + (rng.uniform(0.3, 0.9) * region["palm"])[:, None] * (pale - base)
    red = rng.uniform(0.03, 0.2) * (region["knuckle"] + 0.8 * region["tip"])
    red = red + rng.uniform(0.0, 0.09) * _mottle(rng, 4.0) + rng.uniform(0.0, 0.12) * _mottle(rng, 1.3)
    colour = colour * (1.0 - red[:, None] * np.array([0.25, 1.0, 0.9], np.float32))
    colour = colour * (1.0 - rng.uniform(0.05, 0.3) * region["crease"][:, None] * np.array([0.7, 1.0, 1.0], np.float32))
    nail = 0.6 * base + 0.4 * np.array([250, 214, 205], np.float32)
    if rng.random() < 0.1:
        nail = rng.uniform(20, 240, 3).astype(np.float32)
    colour = colour + (0.9 * region["nail"])[:, None] * (nail - colour)
    for digit in np.flatnonzero(rng.random(5) < (0.01, 0.03, 0.05, 0.08, 0.02)):
        metal = np.array([[225, 185, 95], [205, 208, 212]], np.float32)[int(rng.integers(0, 2))]
        colour = np.where(region["ring"][digit][:, None] > 0, metal * float(rng.uniform(0.7, 1.1)), colour)
    return colour, base


def _mottle(rng: np.random.Generator, frequency: float) -> np.ndarray:
    """A smooth random field [V] of about -1..1 on the skin: three waves across the hand at rest."""
    wave = rng.normal(0.0, frequency, (3, 3)).astype(np.float32)
    return np.sin(regions()["rest"] @ wave + rng.uniform(0, 6.3, 3).astype(np.float32)).mean(1)


def paint_arm(rng: np.random.Generator, skin: np.ndarray, bare: bool) -> np.ndarray:
    """Colours [A, 3] of the forearm: skin, then a (often patterned) sleeve unless `bare`; sometimes a watch."""
    colour = np.tile(skin, (ARM_RING * ARM_SIDE + 1, 1)).astype(np.float32)
    rings = colour[: ARM_RING * ARM_SIDE].reshape(ARM_RING, ARM_SIDE, 3)
    if not bare:
        kind, cloth, other = rng.random(), _cloth_colour(rng), _cloth_colour(rng)
        rings[5:], colour[-1] = cloth, cloth
        if kind < 0.25:
            rings[5:8] = other
        elif kind < 0.4:
            rings[5:, ::2] = other
        elif kind < 0.55:
            rings[5:, ::3], rings[5::2] = other, 0.5 * (cloth + other)
    if rng.random() < 0.12:
        rings[2:4] = rng.uniform(10, 230) * (1.0 + rng.normal(0.0, 0.08, 3))
    return colour


def _cloth_colour(rng: np.random.Generator) -> np.ndarray:
    """Mostly muted (black, grey, blue, white), sometimes any colour."""
    if rng.random() < 0.35:
        return rng.uniform(15, 240, 3).astype(np.float32)
    grey = rng.uniform(18, 235) * (1.0 + rng.normal(0.0, 0.1, 3) + np.array([-0.05, 0.0, 0.08]) * rng.random())
    return np.clip(grey, 5, 250).astype(np.float32)
