"""Hand meshes rendered over an image, right hands in a warm and left hands in a cool colour, and as OBJ text.

Shape legend: V vertices, F faces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from src.geometry.camera import project
from src.utils.mesh_render import render_mesh, vertex_normals

SIDE_RGB = {True: (238, 150, 92), False: (96, 160, 238)}  # right, left
_INSIDE_RGB = (92, 84, 88)  # the mesh is open at the wrist, so its inside can be visible
_OPACITY = 0.85
_NEAR_MM = 10.0  # faces nearer to the camera are skipped
_SUPER = 2  # supersampling factor
_MAX_PIXEL = 16_000_000  # of the supersampled rendering; larger images are not supersampled


@dataclass(frozen=True)
class Mesh:
    """One hand in the camera of the image."""

    vert: np.ndarray  # [V, 3] mm, x right, y down, z forward
    face: np.ndarray  # [F, 3], outward by the right-hand rule
    is_right: bool


def draw_meshes(image: np.ndarray, meshes: Sequence[Mesh], focal: np.ndarray, princpt: np.ndarray) -> np.ndarray:
    """A copy of the image with all hands rendered over it; nearer hands occlude farther ones.

    Args: image [H, W, 3] uint8 RGB; focal, princpt [2] px. Returns: [H, W, 3] uint8 RGB.
    """
    out = np.ascontiguousarray(image).copy()
    vert, face, colour = _joined(meshes)
    face = face[(vert[face, 2] > _NEAR_MM).all(axis=1)]
    if not len(face):
        return out
    point = project(vert, focal, princpt)
    used, size = point[face].reshape(-1, 2), np.array(image.shape[1::-1])
    low = np.clip(np.floor(used.min(axis=0)) - 1, 0, size).astype(int)
    high = np.clip(np.ceil(used.max(axis=0)) + 2, 0, size).astype(int)
    width, height = (high - low).tolist()
    if width < 1 or height < 1:
        return out
    fold = _SUPER if width * height * _SUPER**2 <= _MAX_PIXEL else 1
    inside = fold * (point - low) + 0.5 * (fold - 1)
    layer = render_mesh(inside, np.maximum(vert[:, 2], _NEAR_MM), face, colour, (fold * width, fold * height))
    layer = cv2.resize(layer, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    window = out[low[1] : high[1], low[0] : high[0]]
    # the averaged colours are premultiplied: uncovered pixels count as zero
    blend = window * (1.0 - _OPACITY * layer[..., 3:] / 255.0) + _OPACITY * layer[..., :3]
    window[:] = np.clip(np.rint(blend), 0, 255).astype(np.uint8)
    return out


def _joined(meshes: Sequence[Mesh]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices, faces and shaded colours of all hands, each with its inside as a second, dark surface."""
    vert, face, colour, count = [np.zeros((0, 3))], [np.zeros((0, 3), int)], [np.zeros((0, 3))], 0
    for mesh in meshes:
        num = len(mesh.vert)
        normal = vertex_normals(mesh.vert[None].astype(np.float32), mesh.face)[0]
        lit = _light(normal, mesh.vert)[:, None] * np.array(SIDE_RGB[mesh.is_right])
        vert += [mesh.vert, mesh.vert]
        face += [mesh.face + count, mesh.face[:, ::-1] + count + num]
        colour += [lit, np.tile(_INSIDE_RGB, (num, 1))]
        count += 2 * num
    return np.concatenate(vert), np.concatenate(face), np.concatenate(colour)


def _light(normal: np.ndarray, vert: np.ndarray) -> np.ndarray:
    """[V] brightness: lit from the upper left behind the camera, dimmer where the surface turns away from the view."""
    lamp = np.array([-0.35, -0.55, -0.75]) / np.linalg.norm([0.35, 0.55, 0.75])
    to_eye = -vert / np.maximum(np.linalg.norm(vert, axis=1, keepdims=True), 1e-6)
    facing = np.clip((normal * to_eye).sum(axis=1), 0.0, 1.0)
    return 0.30 + 0.25 * facing + 0.55 * np.clip(normal @ lamp, 0.0, 1.0)


def draw_box(image: np.ndarray, box: np.ndarray, is_right: bool, label: str) -> None:
    """Draw a hand's box [4] xyxy px and a label above it, in place, in the colour of its side."""
    scale = max(image.shape[:2]) / 640
    thick, font = max(1, round(1.5 * scale)), (cv2.FONT_HERSHEY_SIMPLEX, max(0.3, 0.5 * scale))
    limit = np.array([*image.shape[1::-1], *image.shape[1::-1]]) - 1
    x0, y0, x1, y1 = np.clip(np.rint(box), 0, limit).astype(int).tolist()
    colour = SIDE_RGB[bool(is_right)]
    cv2.rectangle(image, (x0, y0), (x1, y1), colour, thick, cv2.LINE_AA)
    (_, high), _ = cv2.getTextSize(label, *font, thick)
    place = (x0 + thick, y0 - 2 * thick if y0 - 2 * thick - high > 0 else y0 + high + 3 * thick)
    for shade, extra in (((20, 20, 20), thick), (colour, 0)):
        cv2.putText(image, label, place, *font, shade, thick + extra, cv2.LINE_AA)


def obj_text(mesh: Mesh) -> str:
    """A Wavefront OBJ of one hand in mm, rotated by 180 degrees about the x axis: y up, viewed from the camera."""
    lines = ["# millimetres; x right, y up, z towards the camera; the camera is the origin"]
    lines += [f"v {x:.3f} {y:.3f} {z:.3f}" for x, y, z in (mesh.vert * (1.0, -1.0, -1.0)).tolist()]
    lines += [f"f {a} {b} {c}" for a, b, c in (mesh.face + 1).tolist()]
    return "\n".join(lines) + "\n"
