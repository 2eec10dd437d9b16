"""Everything in a demo image but the hand: background, occluding objects, blur and sensor noise.

Images are [S, S, 3] uint8 RGB. All randomness comes from the sample's own generator.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from src.data.rng import stream

SKIN_RGB = np.array(
    [[250, 206, 184], [240, 188, 160], [226, 168, 134], [206, 144, 106], [172, 114, 80], [128, 82, 58], [88, 56, 42]],
    np.float32,
)
MAX_HIDDEN_JOINT = 6


@lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    """[512, 512, 3] uint8 normal noise around 128 with sigma 40, the same in every process."""
    return np.clip(stream("demo noise").normal(128.0, 40.0, (512, 512, 3)), 0, 255).astype(np.uint8)


def noise_patch(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A random crop [height, width, 3] of the noise bank, at most 512 px high and wide."""
    y, x = int(rng.integers(0, 513 - height)), int(rng.integers(0, 513 - width))
    return _noise_bank()[y : y + height, x : x + width]


def _colour(rng: np.random.Generator) -> tuple[float, ...]:
    """A random colour; one in four is skin-like, so that colour alone does not reveal the hand."""
    if rng.random() < 0.25:
        return tuple(float(c) for c in SKIN_RGB[rng.integers(0, len(SKIN_RGB))] * rng.uniform(0.5, 1.1))
    vivid = rng.random() ** 2
    return tuple(float(c) for c in vivid * rng.uniform(5, 250, 3) + (1.0 - vivid) * rng.uniform(20, 240))


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A procedural image [S, S, 3] uint8: colour gradient, noise at several scales, patterns, clutter, people, blur."""
    corners = np.array([[_colour(rng), _colour(rng)], [_colour(rng), _colour(rng)]], np.float32)
    corners += rng.uniform(0.3, 1.0) * (corners.mean((0, 1)) - corners)
    image = cv2.resize(corners, (size, size), interpolation=cv2.INTER_LINEAR).clip(0, 255).astype(np.uint8)
    for cells in (3, 9, 25, 80)[: int(rng.integers(0, 5))]:
        small, amount = noise_patch(rng, cells, cells), float(rng.uniform(0.1, 0.6))
        if rng.random() < 0.75:
            small = np.repeat(small[..., :1], 3, axis=2)
        field = cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC if cells < 10 else cv2.INTER_LINEAR)
        image = cv2.addWeighted(image, 1.0, field, amount, -128.0 * amount)
    if rng.random() < 0.2:
        _pattern(rng, image)
    if rng.random() < 0.35:
        _shelf(rng, image)
    for _ in range(int(rng.integers(0, 9))):
        _draw_shape(rng, image, rng.uniform(0, size, 2), rng.uniform(0.04, 0.35) * size)
    if rng.random() < 0.25:
        _person(rng, image)
    if rng.random() < 0.5:
        side = 2 * int(rng.integers(1, 5)) + 1
        image = cv2.blur(cv2.blur(image, (side, side)), (side, side))
    return image


def _shelf(rng: np.random.Generator, image: np.ndarray) -> None:
    """Rows of small upright objects, like shelves, windows or keyboards, in place."""
    size = image.shape[0]
    row, step = rng.uniform(0.06, 0.25) * size, rng.uniform(0.02, 0.09) * size
    shades = np.array([_colour(rng) for _ in range(4)]) * rng.uniform(0.4, 1.0)
    top = rng.uniform(-0.3, 0.4) * size
    for level in range(int(rng.integers(1, 6))):
        low = top + (level + 1) * row
        cv2.rectangle(image, (0, int(low)), (size, int(low + 0.15 * row)), shades[0].tolist(), -1)
        tall = rng.uniform(0.3, 0.95, 24) * row
        for k, high in enumerate(tall[: int(size / step) + 1]):
            begin = (int(k * step), int(low - high))
            cv2.rectangle(image, begin, (int((k + 0.8) * step), int(low)), shades[1 + (k * k + level) % 3].tolist(), -1)
            if k % 3 == 0:
                middle = (int((k + 0.4) * step), int(low - 0.5 * high))
                cv2.circle(image, middle, max(int(0.2 * step), 1), shades[(k + 1) % 4].tolist(), -1)


def _person(rng: np.random.Generator, image: np.ndarray) -> None:
    """A person behind the hand: a body in plain clothes and a face, in place."""
    size = image.shape[0]
    x, y, head = rng.uniform(0, size), rng.uniform(0.0, 0.7) * size, rng.uniform(0.12, 0.35) * size
    skin = SKIN_RGB[rng.integers(0, len(SKIN_RGB))] * rng.uniform(0.6, 1.05)
    hair, cloth = tuple(rng.uniform(10, 110) * np.array([1.0, 0.85, 0.7])), _colour(rng)

    def ellipse(cx: float, cy: float, wide: float, high: float, colour: tuple[float, ...]) -> None:
        axes = (max(int(wide), 1), max(int(high), 1))
        cv2.ellipse(image, (int(cx), int(cy)), axes, 0, 0, 360, tuple(float(c) for c in colour), -1, cv2.LINE_AA)

    ellipse(x, y + 3.3 * head, 2.0 * head, 2.4 * head, cloth)
    cv2.rectangle(
        image, (int(x - 0.4 * head), int(y)), (int(x + 0.4 * head), int(y + 1.4 * head)), (0.8 * skin).tolist(), -1
    )
    ellipse(x, y - 0.25 * head, 0.92 * head, 1.1 * head, hair)
    ellipse(x, y, 0.75 * head, head, tuple(skin))
    for side in (-1, 1):
        ellipse(x + 0.3 * side * head, y - 0.15 * head, 0.13 * head, 0.06 * head, hair)
    ellipse(x, y + 0.5 * head, 0.25 * head, 0.08 * head, (0.75 * skin[0], 0.5 * skin[1], 0.5 * skin[2]))


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


def _draw_shape(rng: np.random.Generator, image: np.ndarray, centre: np.ndarray, radius: float) -> None:
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


def occlude(rng: np.random.Generator, image: np.ndarray, joint_px: np.ndarray) -> np.ndarray:
    """Sometimes put an object in front of the hand (joint_px [J, 2]), covering at most MAX_HIDDEN_JOINT joints."""
    if rng.random() > 0.22:
        return image
    low, high = joint_px.min(0), joint_px.max(0)
    at = np.clip(np.round(joint_px), 0, image.shape[0] - 1).astype(int)
    for _ in range(3):
        covered = image.copy()
        _draw_shape(rng, covered, rng.uniform(low, high), rng.uniform(0.08, 0.3) * float((high - low).max()))
        changed = (covered[at[:, 1], at[:, 0]] != image[at[:, 1], at[:, 0]]).any(1)
        if changed.sum() <= MAX_HIDDEN_JOINT:
            return covered
    return image


def sensor(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Camera effects: tone and tint, motion or defocus blur, low resolution, noise."""
    image = _tone(rng, image)
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
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 1.6)))
    elif kind < 0.4:
        size = image.shape[0]
        few = int(size * rng.uniform(0.3, 0.7))
        image = cv2.resize(cv2.resize(image, (few, few), interpolation=cv2.INTER_AREA), (size, size))
    amount = float(rng.uniform(0.0, 0.16))
    noise = noise_patch(rng, image.shape[0], image.shape[1])
    return cv2.addWeighted(image, 1.0, noise, amount, -128.0 * amount)


def _tone(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Exposure curve, contrast and white balance; one in twelve is tinted or (nearly) grey."""
    odd = rng.random() < 0.08
    balance = 1.0 + rng.normal(0.0, 0.2 if odd else 0.05, 3)
    gamma, contrast = float(np.exp(rng.normal(0.0, 0.2))), rng.uniform(0.75, 1.25)
    level = np.arange(256, dtype=np.float64) / 255.0
    curve = 0.5 + contrast * (level[:, None] ** gamma * balance - 0.5)
    table = np.clip(255.0 * curve, 0, 255).astype(np.uint8).reshape(1, 256, 3)
    image = cv2.LUT(image, table)
    keep = rng.uniform(0.0, 0.4) if odd else rng.uniform(0.7, 1.3)
    luma = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, keep, luma, 1.0 - keep, 0.0)
