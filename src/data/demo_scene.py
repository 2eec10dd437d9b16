"""Paints demo samples: skin, sleeve, light, background, occluder and sensor around the hands of `src.data.demo_hand`.

The hand and its forearm are rasterised together at twice the resolution with vertex colours (Lambert with wrapped
light, hemispherical ambient, a little gloss, darkening where fingers come close), then averaged down and laid over a
procedural background. Everything random comes from the sample's own generator.

Shape legend: N samples, V hand vertices, A arm vertices, F faces of both, S image side.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from src.data.demo_hand import HandDraw
from src.data.rng import stream
from src.hand.standin import build_standin_hand
from src.hand.standin_design import chain, design
from src.utils.mesh_render import render_mesh

SUPER = 2  # supersampling
SKIN_RGB = np.array(
    [[255, 219, 196], [248, 199, 168], [236, 178, 140], [214, 150, 108], [178, 118, 80], [132, 84, 57], [92, 58, 42]],
    np.float32,
)
ARM_RING, ARM_SIDE = 13, 14
NEAR_MM = 60.0


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
        nail = np.maximum(nail, (np.abs(offset / np.array([7.0, 5.0, 5.5])).max(1) < 1.0) * (facing > 0.45))
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


def incident_faces(face: np.ndarray, num: int) -> np.ndarray:
    """[V, K] ids of the faces around each vertex, padded with F."""
    order = np.argsort(face.ravel(), kind="stable")
    owner = face.ravel()[order]
    rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
    table = np.full((num, rank.max() + 1), len(face))
    table[owner, rank] = order // 3
    return table


def vertex_normals(vert: np.ndarray, face: np.ndarray, table: np.ndarray | None = None) -> np.ndarray:
    """Area-weighted unit normals [N, V, 3] of meshes that share their faces."""
    table = incident_faces(face, vert.shape[1]) if table is None else table
    a, b, c = vert[:, face[:, 0]], vert[:, face[:, 1]], vert[:, face[:, 2]]
    u, v = b - a, c - a
    normal = np.zeros((len(vert), len(face) + 1, 3), np.float32)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        normal[:, :-1, i] = u[..., j] * v[..., k] - u[..., k] * v[..., j]
    total = normal[:, table[:, 0]]
    for column in table.T[1:]:
        total += normal[:, column]
    return total / np.maximum(np.sqrt((total * total).sum(-1, keepdims=True)), 1e-9)


def _arm(draw: HandDraw, sleeve: np.ndarray, girth: np.ndarray) -> np.ndarray:
    """Forearms [N, A, 3] camera mm that leave the wrist along `arm_rot`. sleeve [N] mm: where the cloth begins."""
    num = len(sleeve)
    along = np.empty((num, ARM_RING))
    along[:, :3], along[:, 3] = (6.0, 17.0, 27.0), np.maximum(sleeve - 3.0, 29.0)
    along[:, 4] = along[:, 5] = np.maximum(sleeve, 30.0)
    along[:, 5] -= 2.0
    along[:, 6:] = along[:, 4:5] + np.array([4.0, 16.0, 22.0, 60.0, 110.0, 180.0, 260.0])
    toward_viewer = np.maximum(-draw.arm_rot[:, 2, 0], 1e-3)  # end before the arm reaches the camera
    along = np.minimum(along, (draw.joint[:, :1, 2] - NEAR_MM - 60.0) / toward_viewer[:, None])
    wide = 28.0 + 12.0 * np.clip((along - 40.0) / 160.0, 0.0, 1.0)
    wide[:, 0] -= 1.5  # starts inside the wrist
    high = wide * (0.70 + 0.2 * np.clip((along - 30.0) / 150.0, 0.0, 1.0))
    thick = np.zeros((num, ARM_RING))
    thick[:, 5:] = girth[:, None] * np.array([1.0, 1.35, 1.35, 0.95, 1.0, 1.3, 1.3, 1.6])
    turn = np.linspace(0, 2 * np.pi, ARM_SIDE, endpoint=False)
    local = np.empty((num, ARM_RING * ARM_SIDE + 1, 3))
    ring = local[:, :-1].reshape(num, ARM_RING, ARM_SIDE, 3)
    ring[..., 0] = along[..., None]
    ring[..., 1] = (high + thick)[..., None] * np.sin(turn)
    ring[..., 2] = (wide + thick)[..., None] * np.cos(turn)
    local[:, -1, 0], local[:, -1, 1:] = along[:, -1] + 10.0, 0.0
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


@lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    """[512, 512, 3] uint8 normal noise around 128 with sigma 40, the same in every process."""
    return np.clip(stream("demo noise").normal(128.0, 40.0, (512, 512, 3)), 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    y, x = int(rng.integers(0, 513 - height)), int(rng.integers(0, 513 - width))
    return _noise_bank()[y : y + height, x : x + width]


def _colour(rng: np.random.Generator) -> tuple[float, ...]:
    """A random colour; one in four looks like skin, so that colour alone does not find the hand."""
    if rng.random() < 0.25:
        return tuple(float(c) for c in SKIN_RGB[rng.integers(0, len(SKIN_RGB))] * rng.uniform(0.5, 1.1))
    vivid = rng.random() ** 2
    return tuple(float(c) for c in vivid * rng.uniform(5, 250, 3) + (1.0 - vivid) * rng.uniform(20, 240))


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A procedural picture [S, S, 3] uint8: a colour field, a pattern, some shapes, blur and grain."""
    corners = np.array([[_colour(rng), _colour(rng)], [_colour(rng), _colour(rng)]], np.float32)
    corners += rng.uniform(0.3, 1.0) * (corners.mean((0, 1)) - corners)
    image = cv2.resize(corners, (size, size), interpolation=cv2.INTER_LINEAR).clip(0, 255).astype(np.uint8)
    for cells in (3, 9, 40)[: int(rng.integers(0, 4))]:
        small, amount = _noise(rng, cells, cells), float(rng.uniform(0.1, 0.6))
        if rng.random() < 0.75:
            small = np.repeat(small[..., :1], 3, axis=2)
        field = cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC if cells < 10 else cv2.INTER_LINEAR)
        image = cv2.addWeighted(image, 1.0, field, amount, -128.0 * amount)
    if rng.random() < 0.3:
        _pattern(rng, image)
    for _ in range(int(rng.integers(0, 9))):
        draw_shape(rng, image, rng.uniform(0, size, 2), rng.uniform(0.04, 0.35) * size)
    if rng.random() < 0.6:
        side = 2 * int(rng.integers(1, 5)) + 1
        image = cv2.blur(cv2.blur(image, (side, side)), (side, side))
    return image


def _pattern(rng: np.random.Generator, image: np.ndarray) -> None:
    """Stripes, a grid or a chequerboard over the whole image, in place."""
    size, step = image.shape[0], int(rng.integers(8, 48))
    angle, width = rng.uniform(0, np.pi), int(rng.integers(1, 14))
    colour = _colour(rng)
    if rng.random() < 0.4:
        cells = np.indices((size // step + 1, size // step + 1)).sum(0) % 2
        tile = np.where(cells[..., None] > 0, np.array(colour), np.array(_colour(rng))).astype(np.uint8)
        tile = cv2.resize(tile, (step * len(cells),) * 2, interpolation=cv2.INTER_NEAREST)[:size, :size]
        cv2.addWeighted(image, 0.5, tile, 0.5, 0.0, dst=image)
        return
    way = np.array([np.cos(angle), np.sin(angle)])
    side = np.array([-way[1], way[0]])
    for offset in range(-size, size, step + width):
        a = 0.5 * size + offset * side - size * way
        b = a + 2 * size * way
        cv2.line(image, tuple(int(v) for v in a), tuple(int(v) for v in b), colour, width, cv2.LINE_AA)


def draw_shape(rng: np.random.Generator, image: np.ndarray, centre: np.ndarray, radius: float) -> None:
    """One filled ellipse, polygon or rod of about `radius` px around `centre`, in place."""
    colour, kind = _colour(rng), rng.random()
    turn = rng.uniform(0, 360)
    if kind < 0.35:
        axes = (max(int(radius * rng.uniform(0.5, 1.2)), 1), max(int(radius * rng.uniform(0.3, 1.0)), 1))
        cv2.ellipse(image, tuple(int(v) for v in centre), axes, turn, 0, 360, colour, -1, cv2.LINE_AA)
        return
    if kind < 0.7:
        angle = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
        point = centre + radius * rng.uniform(0.6, 1.2, (len(angle), 1)) * np.stack([np.cos(angle), np.sin(angle)], 1)
    else:
        way = np.array([np.cos(np.radians(turn)), np.sin(np.radians(turn))])
        side = np.array([-way[1], way[0]]) * radius * rng.uniform(0.12, 0.4)
        way *= radius * rng.uniform(1.5, 4.0)
        point = np.stack([centre - way - side, centre + way - side, centre + way + side, centre - way + side])
    cv2.fillPoly(image, [np.round(point * 16).astype(np.int32)], colour, cv2.LINE_AA, 4)


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
        images.append(_sensor(rng, _occlude(rng, image, joint_px)))
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
    grain = cv2.resize(_noise(rng, size // 3, size // 3), (size, size), interpolation=cv2.INTER_LINEAR)
    amount = float(rng.uniform(0.02, 0.14))
    grain = cv2.addWeighted(grain[:height, :width], amount, grain[:height, :width], 0.0, 128.0 * (1.0 - amount))
    hand = cv2.multiply(cv2.cvtColor(small, cv2.COLOR_RGBA2RGB), grain, scale=1.0 / 128.0)
    rest = cv2.cvtColor(255 - small[..., 3], cv2.COLOR_GRAY2RGB)
    window = image[low[1] : high[1], low[0] : high[0]]
    window[:] = cv2.add(hand, cv2.multiply(window, rest, scale=1.0 / 255.0))


def _occlude(rng: np.random.Generator, image: np.ndarray, joint_px: np.ndarray) -> np.ndarray:
    """Sometimes put an object before the hand; never over more than six of its joints."""
    if rng.random() > 0.35:
        return image
    low, high = joint_px.min(0), joint_px.max(0)
    at = np.clip(np.round(joint_px), 0, image.shape[0] - 1).astype(int)
    for _ in range(3):
        covered = image.copy()
        draw_shape(rng, covered, rng.uniform(low, high), rng.uniform(0.12, 0.4) * float((high - low).max()))
        changed = (covered[at[:, 1], at[:, 0]] != image[at[:, 1], at[:, 0]]).any(1)
        if changed.sum() <= 6:
            return covered
    return image


def _sensor(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Motion or defocus blur now and then, and noise."""
    kind = rng.random()
    if kind < 0.12:
        length, angle = int(rng.integers(3, 8)), rng.uniform(0, np.pi)
        kernel = np.zeros((9, 9), np.float32)
        tip = 0.5 * length * np.array([np.cos(angle), np.sin(angle)])
        cv2.line(
            kernel, tuple(np.round(4 - tip).astype(int).tolist()), tuple(np.round(4 + tip).astype(int).tolist()), 1.0
        )
        image = cv2.filter2D(image, -1, kernel / kernel.sum())
    elif kind < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 1.2)))
    amount = float(rng.uniform(0.0, 0.16))
    noise = _noise(rng, image.shape[0], image.shape[1])
    return cv2.addWeighted(image, 1.0, noise, amount, -128.0 * amount)
