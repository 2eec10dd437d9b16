"""The light of the demo's images: sky, a lamp with shadows, a weaker second lamp, slight gloss.

Shape legend: N samples, V vertices, J = 21 joints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VIEWER = np.array([0.0, 0.0, -1.0], np.float32)
SHADOW_MM = 9.0  # radius of the shadow that a joint casts


@dataclass(frozen=True)
class Light:
    """One light setup: unit vectors towards sky, lamp and second lamp [3], their colours [3], strengths."""

    sky: np.ndarray
    lamp: np.ndarray
    second: np.ndarray
    ambient: np.ndarray
    key: np.ndarray
    fill: np.ndarray
    shadow: float
    gloss: float
    exposure: float


def draw_light(rng: np.random.Generator) -> Light:
    """A random light setup, mostly from above and the camera's side, sometimes from behind the hand."""
    lamp, second, sky = rng.normal((0.0, -0.8, -0.8), 1.0), rng.normal((0.0, -0.2, -0.6), 1.0), rng.normal(0.0, 0.5, 3)
    if rng.random() < 0.85:
        lamp[2] = -abs(lamp[2]) - 0.1
    sky[1] -= 1.2
    warm = rng.normal(0.0, 0.09)
    tint = np.array([1.0 + warm, 1.0, 1.0 - warm], np.float32)
    cold = np.array([1.0 - 0.6 * warm, 1.0, 1.0 + 0.6 * warm], np.float32)
    return Light(
        sky=_unit(sky),
        lamp=_unit(lamp),
        second=_unit(second),
        ambient=rng.uniform(0.35, 0.8) * cold,
        key=rng.uniform(0.1, 0.85) * tint,
        fill=rng.uniform(0.0, 0.3) * (1.0 + rng.normal(0.0, 0.08, 3)).astype(np.float32),
        shadow=rng.uniform(0.3, 1.6),
        gloss=rng.uniform(2.0, 34.0),
        exposure=rng.uniform(0.8, 1.15) if rng.random() < 0.8 else rng.uniform(0.4, 1.5),
    )


def _unit(vec: np.ndarray) -> np.ndarray:
    return (vec / np.linalg.norm(vec)).astype(np.float32)


def closeness(vert: np.ndarray, normal: np.ndarray, joint: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Ambient visibility of each hand vertex past the digits, [N, V] in 0..1 (1 is open). Wrist at the origin, mm."""
    dist = (vert * vert).sum(-1)[..., None] + (joint * joint).sum(-1)[:, None] - 2.0 * vert @ joint.transpose(0, 2, 1)
    toward = normal @ joint.transpose(0, 2, 1) - (normal * vert).sum(-1)[..., None]
    block = np.exp(dist / -450.0) * np.clip(toward / 14.0 + 0.2, 0.0, 1.2) * (1.0 - own)
    return np.exp(-0.75 * block.sum(-1))


def cast_shadow(vert: np.ndarray, joint: np.ndarray, own: np.ndarray, light: Light) -> np.ndarray:
    """Fraction of the lamp's light that reaches each hand vertex [V] past the joints [J, 3]. Wrist at origin, mm."""
    toward = (joint @ light.lamp) - (vert @ light.lamp)[:, None]  # [V, J] mm along the ray to the lamp
    dist = (vert * vert).sum(-1)[:, None] + (joint * joint).sum(-1) - 2.0 * vert @ joint.T
    beside = dist - toward * toward  # squared distance of the joint from that ray
    block = np.exp(beside / (-2.0 * SHADOW_MM**2)) * np.clip((toward - 6.0) / 10.0, 0.0, 1.0) * (1.0 - own)
    return np.exp(-light.shadow * block.sum(-1))


def shade(
    albedo: np.ndarray, normal: np.ndarray, open_sky: np.ndarray, in_lamp: np.ndarray | float, light: Light
) -> np.ndarray:
    """Lit vertex colours [V, 3]: wrapped Lambert, hemispherical ambient light, Blinn's specular term."""
    wrap = np.clip((normal @ light.lamp + 0.15) / 1.15, 0.0, 1.0) * in_lamp
    second = np.clip((normal @ light.second + 0.3) / 1.3, 0.0, 1.0) * open_sky
    sky = (0.78 + 0.3 * (normal @ light.sky)) * open_sky
    half = _unit(light.lamp + VIEWER + 1e-3)
    gloss = light.gloss * np.clip(normal @ half, 0.0, 1.0) ** 18 * in_lamp
    received = sky[:, None] * light.ambient + wrap[:, None] * light.key + second[:, None] * light.fill
    return light.exposure * (albedo * received + gloss[:, None])
