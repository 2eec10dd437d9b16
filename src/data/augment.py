"""Augmentation as a value: parameters are drawn first, as a function of uniform numbers, and applied later.

The geometric part (`roll`, `tilt`, `zoom`, `shift`) is applied by src/geometry/patch.py as a rotation and zoom of a
virtual camera, so image, 2D, 3D and MANO root stay consistent. The photometric part (`PixelAugmentation`) is applied
here to the uint8 patch: occluder, then lens (blur), exposure (colour) and sensor (noise).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np

from src.data.rng import stream

NUM_UNIFORM = 20  # random numbers per draw
_NOISE_SIZE = 3 << 20
_NOISE_UNIT = 32.0  # standard deviation of the noise table, in its own uint8 steps
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_OCCLUDER_SIDE = (0.1, 0.45)  # of the patch side


@dataclass(frozen=True)
class PixelAugmentation:
    """Changes to the pixels of the patch; the defaults change nothing."""

    brightness: float = 1.0  # factor
    contrast: float = 1.0  # factor about mid-grey
    saturation: float = 1.0  # 0: grey, 1: unchanged
    noise_std: float = 0.0  # grey levels
    noise_offset: float = 0.0  # where to start in the noise table, 0..1
    blur_sigma: float = 0.0  # patch px
    # a rectangle: left, top, right, bottom as fractions of the patch side, and its RGB colour
    occluder: tuple[tuple[float, ...], tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Augmentation:
    """One draw of all augmentation parameters; the defaults are the identity (the plain crop of validation)."""

    roll: float = 0.0  # rad, rotation of the camera about its principal axis
    tilt: tuple[float, float] = (0.0, 0.0)  # rad, rotation vector (x, y) of the perspective rotation
    zoom: float = 1.0  # factor on the side of the crop box: above 1 the hand looks smaller
    shift: tuple[float, float] = (0.0, 0.0)  # fraction of the crop box's side
    pixel: PixelAugmentation = PixelAugmentation()


def draw_augmentation(u: Sequence[float], cfg: Any) -> Augmentation:
    """Draw one augmentation from the knobs of the TRAIN section.

    Args:
        u: NUM_UNIFORM numbers in [0, 1) of one position; each is used once, so no knob affects the draw of another.
        cfg: rot_max and persp_rot_max (degrees), scale_z_range and scale_f_range (factors [low, high]), shift_max
            (fraction of the crop's side), brightness, contrast, saturation (largest change of the factor), noise_std
            (grey levels), blur_max (sigma, patch px), occlusion_prob. A knob of 0 (or [1, 1]) disables its part.
    """
    signed = [2.0 * value - 1.0 for value in u]
    tilt, direction = math.radians(cfg.persp_rot_max) * u[1], 2.0 * math.pi * u[2]
    pixel = PixelAugmentation(
        brightness=1.0 + cfg.brightness * signed[7],
        contrast=1.0 + cfg.contrast * signed[8],
        saturation=1.0 + cfg.saturation * signed[9],
        noise_std=cfg.noise_std * u[10],
        noise_offset=u[11],
        blur_sigma=cfg.blur_max * max(0.0, signed[12]),
        occluder=_occluder(u[14:20]) if u[13] < cfg.occlusion_prob else None,
    )
    # scale_z_range and scale_f_range are one zoom under two keys; a single draw would change every augmented batch.
    return Augmentation(
        roll=math.radians(cfg.rot_max) * signed[0],
        tilt=(tilt * math.cos(direction), tilt * math.sin(direction)),
        zoom=_between(cfg.scale_z_range, u[3]) * _between(cfg.scale_f_range, u[4]),
        shift=(cfg.shift_max * signed[5], cfg.shift_max * signed[6]),
        pixel=pixel,
    )


def _between(bounds: Any, fraction: float) -> float:
    low, high = bounds
    return low + (high - low) * fraction


def _occluder(u: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A rectangle inside the patch from six uniform numbers, in a slightly tinted grey."""
    low, high = _OCCLUDER_SIDE
    width, height = low + (high - low) * u[0], low + (high - low) * u[1]
    left, top = (1.0 - width) * u[2], (1.0 - height) * u[3]
    warmth = 40.0 * (u[5] - 0.5)
    color = (255.0 * u[4] + warmth, 255.0 * u[4], 255.0 * u[4] - warmth)
    return (left, top, left + width, top + height), tuple(min(255.0, max(0.0, c)) for c in color)


def augment_pixels(patch: np.ndarray, pixel: PixelAugmentation) -> np.ndarray:
    """The patch [S, S, 3] uint8 RGB after the photometric changes; the input array itself if there are none."""
    if pixel.occluder is not None:
        edges, color = pixel.occluder
        left, top, right, bottom = (round(patch.shape[0] * edge) for edge in edges)
        color = tuple(float(round(value)) for value in color)
        patch = cv2.rectangle(patch.copy(), (left, top), (right - 1, bottom - 1), color, cv2.FILLED)
    if pixel.blur_sigma > 0.25:  # below that, neighbours contribute less than a grey level
        kernel = cv2.getGaussianKernel(2 * math.ceil(2.5 * pixel.blur_sigma) + 1, pixel.blur_sigma)
        patch = cv2.sepFilter2D(patch, -1, kernel, kernel)
    if (pixel.brightness, pixel.contrast, pixel.saturation) != (1.0, 1.0, 1.0):
        patch = cv2.transform(patch, _color_matrix(pixel))
    if pixel.noise_std > 0.0:
        patch = _add_noise(patch, pixel.noise_std, pixel.noise_offset)
    return patch


def _color_matrix(pixel: PixelAugmentation) -> np.ndarray:
    """[3, 4]: brightness x (contrast about mid-grey x (saturation about the luma)) as one affine map of RGB."""
    gain, offset = pixel.brightness * pixel.contrast, pixel.brightness * 127.5 * (1.0 - pixel.contrast)
    keep, (red, green, blue) = gain * pixel.saturation, (gain * (1.0 - pixel.saturation) * luma for luma in _LUMA)
    return np.array(
        [
            [red + keep, green, blue, offset],
            [red, green + keep, blue, offset],
            [red, green, blue + keep, offset],
        ]
    )


@lru_cache(maxsize=1)
def _noise_table() -> np.ndarray:
    """Gaussian noise around 128, [_NOISE_SIZE] uint8; drawing new noise per patch would cost as much as decoding."""
    noise = stream("noise table").standard_normal(_NOISE_SIZE, dtype=np.float32)
    return np.clip(np.rint(128.0 + _NOISE_UNIT * noise), 0, 255).astype(np.uint8)


def _add_noise(patch: np.ndarray, std: float, offset: float) -> np.ndarray:
    table = _noise_table()
    if patch.size > table.size:
        table = np.resize(table, patch.size)
    begin = int(offset * (table.size - patch.size))
    noise = table[begin : begin + patch.size].reshape(patch.shape)
    gain = std / _NOISE_UNIT
    return cv2.addWeighted(patch, 1.0, noise, gain, -128.0 * gain)
