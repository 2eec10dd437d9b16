"""Write the predictions of one image: JSON and npz with the numbers, an OBJ mesh per hand, and an overlay image.

src/predict/outputs.py names the files. Each is written atomically, the JSON last: an image with a JSON is finished.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from src.predict.outputs import JSON, NPZ, OVERLAY, Outputs
from src.predict.predictor import Hands
from src.utils.files import encode_image, write_atomic
from src.utils.mesh_overlay import Mesh, draw_box, draw_meshes, obj_text

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
    """Write the files of one image, replacing those of the same name.

    Args: hands: those of this image; record, each: further entries of the JSON, for the image and for each hand; kinds:
    some of outputs.KINDS.
    """
    for stale in outputs.existing():
        stale.unlink()
    meshes = [Mesh(hands.vert_cam[i], hands.faces_of(i), bool(hands.is_right[i])) for i in range(len(hands))]
    if "mesh" in kinds:
        for index, mesh in enumerate(meshes):
            write_atomic(outputs.mesh(index, mesh.is_right), obj_text(mesh))
    if "npz" in kinds:
        buffer = io.BytesIO()
        arrays = {name: getattr(hands, name) for name in ("is_right", *_ARRAYS)}
        np.savez_compressed(buffer, **arrays, bbox=hands.box, faces=hands.faces)
        write_atomic(outputs.file(NPZ), buffer.getvalue())
    if "overlay" in kinds:
        write_atomic(outputs.file(OVERLAY), encode_image(overlay(image, hands, meshes), jpeg_quality=92))
    if "json" in kinds:
        names = [outputs.mesh(i, mesh.is_right).name if "mesh" in kinds else None for i, mesh in enumerate(meshes)]
        found = [_hand_record(hands, i) | extra | {"mesh": names[i]} for i, extra in enumerate(each)]
        write_atomic(outputs.file(JSON), json.dumps(record | {"units": UNITS, "hands": found}) + "\n")


def overlay(image: np.ndarray, hands: Hands, meshes: Sequence[Mesh]) -> np.ndarray:
    """The image [H, W, 3] with its hands' meshes and boxes; hands that share a camera occlude each other."""
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
