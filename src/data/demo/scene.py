"""Renders demo images: the hands of `src.data.demo.hand` with skin, forearm, sleeve and light on a background.

Hand and forearm are rasterised together at twice the resolution with vertex colours (wrapped Lambert, hemispherical
ambient light, slight gloss, occlusion between fingers), averaged down, and composited over a procedural background. All
randomness comes from the sample's own generator.

Shape legend: N samples, V hand vertices, A arm vertices, F faces of both, S image side.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from src.data.demo.backdrop import background, noise_patch, occlude, sensor
from src.data.demo.hand import HandDraw, rotation_anywhere
from src.data.demo.light import Light, cast_shadow, closeness, draw_light, shade
from src.data.demo.skin import ARM_RING, ARM_SIDE, paint_arm, paint_skin, regions
from src.hand.standin.build import build_standin_hand
from src.utils.mesh_render import incident_faces, render_mesh, vertex_normals

SUPER = 2  # supersampling factor
SECOND_HAND = 0.22  # fraction of images with another hand behind the first
NEAR_MM = 60.0  # faces nearer than this are dropped
MAX_TOWARD_CAMERA = 0.55  # sine of the angle between forearm and image plane


@lru_cache(maxsize=1)
def _faces() -> tuple[np.ndarray, np.ndarray]:
    """Faces of hand and forearm [F, 3], and the incident faces of each vertex [V + A, 10], padded with F."""
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
    """Forearms [N, A, 3] camera mm that leave the wrist along `arm_rot`. sleeve [N] mm: start of the cloth."""
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
    # an arm pointing at the camera would hide the hand: it is shrunk into the wrist, whose end is rounded
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


def paint(draw: HandDraw, rngs: list[np.random.Generator], size: int) -> list[np.ndarray]:
    """The images [S, S, 3] uint8 RGB of all hands of a draw."""
    sleeve = np.array([rng.uniform(28.0, 48.0) if rng.random() < 0.6 else rng.uniform(48.0, 110.0) for rng in rngs])
    girth = np.array([rng.uniform(2.0, 9.0) * (rng.random() > 0.28) for rng in rngs])  # 0: a bare arm
    faces, table = _faces()
    vert = np.concatenate([draw.vert, _arm(draw, sleeve, girth)], axis=1).astype(np.float32)
    normal = vertex_normals(vert, faces, table)
    num_hand = draw.vert.shape[1]
    joint = (draw.joint - draw.joint[:, :1]).astype(np.float32)
    hand = vert[:, :num_hand] - draw.joint[:, :1].astype(np.float32)
    open_sky = np.ones(vert.shape[:2], np.float32)
    open_sky[:, :num_hand] = closeness(hand, normal[:, :num_hand], joint, regions()["own"])
    images = []
    for i, rng in enumerate(rngs):
        skin, base = paint_skin(rng)
        albedo = np.concatenate([skin, paint_arm(rng, base, bare=girth[i] == 0.0)])
        light = draw_light(rng)
        in_lamp = np.ones(len(albedo), np.float32)
        in_lamp[:num_hand] = cast_shadow(hand[i], joint[i], regions()["own"], light)
        image = background(rng, size)
        view = _View(draw.focal[i], draw.princpt[i], size)
        if rng.random() < SECOND_HAND:
            _second_hand(rng, image, vert[i], albedo, open_sky[i], light, view)
        _composite(rng, image, vert[i], faces, shade(albedo, normal[i], open_sky[i], in_lamp, light), view)
        images.append(sensor(rng, occlude(rng, image, view.project(draw.joint[i]))))
    return images


class _View(NamedTuple):
    focal: np.ndarray  # [2] px
    princpt: np.ndarray  # [2] px
    size: int  # S

    def project(self, point: np.ndarray) -> np.ndarray:
        """[N, 3] mm -> [N, 2] px."""
        return point[:, :2] / np.maximum(point[:, 2:], NEAR_MM) * self.focal + self.princpt


def _second_hand(
    rng: np.random.Generator,
    image: np.ndarray,
    vert: np.ndarray,
    albedo: np.ndarray,
    open_sky: np.ndarray,
    light: Light,
    view: _View,
) -> None:
    """Draw the mirror image of a hand with its arm [V + A, 3] mm, rotated at random, beside and behind the position of
    the hand itself, in place."""
    faces, table = _faces()
    centre = vert[: build_standin_hand().num_vertex].mean(0)
    rotation = rotation_anywhere(rng.standard_normal((1, 4)))[0]
    turned = ((vert - centre) * np.array([-1.0, 1.0, 1.0], np.float32)) @ rotation.T.astype(np.float32)
    angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(70.0, 190.0)
    place = centre + np.array([far * np.cos(angle), far * np.sin(angle), rng.uniform(40.0, 160.0)])
    turned = (turned + place).astype(np.float32)
    faces = faces[:, ::-1]
    colour = shade(albedo, vertex_normals(turned[None], faces, table)[0], open_sky, 1.0, light)
    _composite(rng, image, turned, faces, colour, view)


def _composite(
    rng: np.random.Generator, image: np.ndarray, vert: np.ndarray, face: np.ndarray, colour: np.ndarray, view: _View
) -> None:
    """Rasterise a hand and its arm at twice the resolution over `image`, in place. vert, colour [V + A, 3]."""
    size, px = view.size, view.project(vert)
    behind = vert[:, 2] < NEAR_MM
    if behind.any():
        face = face[~behind[face].any(1)]
    low = np.clip(np.floor(px.min(0)), 0, size - 1).astype(int)
    high = np.clip(np.ceil(px.max(0)), 0, size - 1).astype(int) + 1
    width, height = (high - low).tolist()
    point = SUPER * (px - low) + 0.5 * (SUPER - 1)
    layer = render_mesh(point, np.maximum(vert[:, 2], NEAR_MM), face, colour, (SUPER * width, SUPER * height))
    small = cv2.resize(layer, (width, height), interpolation=cv2.INTER_AREA)
    grain = cv2.resize(noise_patch(rng, size // 3, size // 3), (size, size), interpolation=cv2.INTER_LINEAR)
    amount = float(rng.uniform(0.02, 0.14))
    grain = cv2.addWeighted(grain[:height, :width], amount, grain[:height, :width], 0.0, 128.0 * (1.0 - amount))
    hand = cv2.multiply(cv2.cvtColor(small, cv2.COLOR_RGBA2RGB), grain, scale=1.0 / 128.0)
    rest = cv2.cvtColor(255 - small[..., 3], cv2.COLOR_GRAY2RGB)
    window = image[low[1] : high[1], low[0] : high[0]]
    window[:] = cv2.add(hand, cv2.multiply(window, rest, scale=1.0 / 255.0))
