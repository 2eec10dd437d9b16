"""What is written of one photograph: JSON and npz with the numbers, an OBJ for each hand, and an overlay picture.

Their names are those of src/predict/outputs.py. Each file is written beside and renamed; the JSON comes last, so
that a picture with a JSON is a finished one.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from src.predict.mesh_overlay import Mesh, draw_box, draw_meshes, obj_text
from src.predict.outputs import Outputs
from src.predict.predictor import Hands

UNITS = "mm in the camera frame (x right, y down, z forward), px of the upright picture, axis-angle in rad"
_ARRAYS = ("focal", "princpt", "joint_cam", "joint_img", "root_cam", "mano_pose", "mano_shape", "vert_cam")


def write_prediction(
    outputs: Outputs,
    image: np.ndarray,
    hands: Hands,
    record: dict[str, Any],
    each: Sequence[dict[str, Any]],
    kinds: Collection[str],
) -> None:
    """Write the files of one photograph, replacing those of the same name.

    Args: hands: those of this photograph; record, each: what JSON says beyond, of the photograph and of each hand;
    kinds: some of outputs.KINDS.
    """
    for stale in outputs.existing():
        stale.unlink()
    meshes = [Mesh(hands.vert_cam[i], hands.faces_of(i), bool(hands.is_right[i])) for i in range(len(hands))]
    if "mesh" in kinds:
        for index, mesh in enumerate(meshes):
            _put(outputs.mesh(index, mesh.is_right), obj_text(mesh).encode())
    if "npz" in kinds:
        buffer = io.BytesIO()
        arrays = {name: getattr(hands, name) for name in ("is_right", *_ARRAYS)}
        np.savez_compressed(buffer, **arrays, bbox=hands.box, faces=hands.faces)
        _put(outputs.npz, buffer.getvalue())
    if "overlay" in kinds:
        picture = cv2.cvtColor(overlay(image, hands, meshes), cv2.COLOR_RGB2BGR)
        ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 92])
        assert ok
        _put(outputs.overlay, data.tobytes())
    if "json" in kinds:
        names = [outputs.mesh(i, mesh.is_right).name if "mesh" in kinds else None for i, mesh in enumerate(meshes)]
        found = [_hand_record(hands, i) | extra | {"mesh": names[i]} for i, extra in enumerate(each)]
        _put(outputs.json, (json.dumps(record | {"units": UNITS, "hands": found}) + "\n").encode())


def overlay(image: np.ndarray, hands: Hands, meshes: Sequence[Mesh]) -> np.ndarray:
    """The photograph [H, W, 3] with its hands' meshes and boxes; hands that share a camera also hide each other."""
    out = image
    cameras = np.concatenate([hands.focal, hands.princpt], axis=1)
    for camera in np.unique(cameras, axis=0):
        same = [meshes[i] for i in np.flatnonzero((cameras == camera).all(axis=1))]
        out = draw_meshes(out, same, camera[:2], camera[2:])
    out = np.array(out)
    for box, mesh in zip(hands.box, meshes, strict=True):
        draw_box(out, box, mesh.is_right, "right" if mesh.is_right else "left")
    return out


def _hand_record(hands: Hands, index: int) -> dict[str, Any]:
    """The numbers of one hand, to a thousandth of a mm or px and a millionth of a radian."""
    digits = {"mano_pose": 6, "mano_shape": 6}
    record: dict[str, Any] = {"handedness": "right" if hands.is_right[index] else "left"}
    record["bbox"] = hands.box[index].astype(float).round(3).tolist()
    for name in _ARRAYS:
        record[name] = getattr(hands, name)[index].astype(float).round(digits.get(name, 3)).tolist()
    return record


def _put(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
