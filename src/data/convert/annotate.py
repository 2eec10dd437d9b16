"""Shared by all converters: image files, projection, joint validity, boxes, MANO fields, sample keys.

Numpy and OpenCV only. Shape legend: J = 21 joints (OpenPose order). Pixel centres are at integer coordinates.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from src.data.image import image_info
from src.data.shards.annotation import joint_extent, refuse_outside
from src.data.shards.errors import SampleError
from src.geometry.patch import turn_roots
from src.hand.skeleton import MANO_TO_OPENPOSE

MM_PER_M = 1000.0
MIN_BOX_PX = 1.0  # a hand whose valid joints span less than this cannot be cropped
OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0])  # x right, y up, z backward -> x right, y down, z forward
MANO_21 = np.array(MANO_TO_OPENPOSE)  # 16 MANO joints and 5 tips (thumb to pinky) -> OpenPose order


def read_image(path: Path) -> tuple[bytes, str, tuple[int, int]]:
    """(encoded bytes, jpg or png, (width, height)) of an image file.

    Raises:
        SampleError: missing_image, or undecodable_image.
    """
    try:
        data = path.read_bytes()
    except OSError:
        raise SampleError("missing_image", str(path)) from None
    kind, size = image_info(data)
    return data, kind, size


def load_list(path: Path) -> list[Any]:
    """The list in a json file.

    Raises:
        ValueError: it does not parse, or is not a list.
    """
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: does not parse ({error}); unpack or download it again") from None
    if not isinstance(values, list):
        raise ValueError(f"{path}: is not a list; pass the folder of the data set itself")
    return values


def project_mm(joint_cam: np.ndarray, focal: np.ndarray, princpt: np.ndarray) -> np.ndarray:
    """[J, 2] px of camera-space points [J, 3]; points at or behind the camera project far outside any image."""
    depth = joint_cam[:, 2:]
    pixel = joint_cam[:, :2] / np.where(depth > 0, depth, 1.0) * focal + princpt
    return np.where(depth > 0, pixel, -1e6)


def visible_joints(joint_img: np.ndarray, size: tuple[int, int], annotated: np.ndarray | None = None) -> np.ndarray:
    """[J] 1 where a joint is annotated, finite and inside the image (width, height), else 0."""
    with np.errstate(invalid="ignore"):
        inside = ((joint_img > -0.5) & (joint_img < np.array(size) - 0.5)).all(axis=-1)
    return (inside if annotated is None else inside & (np.asarray(annotated) > 0)).astype(np.float32)


def tight_box(joint_img: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[4] xyxy px, the extent of the valid joints, without margin.

    Raises:
        SampleError: no_valid_joint, or small_box for an extent below MIN_BOX_PX.
    """
    if not (valid > 0).any():
        raise SampleError("no_valid_joint")
    return _not_small(joint_extent(joint_img, valid))


def given_box(box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The set's own box [4] xyxy px.

    Raises:
        SampleError: small_box, or bad_bbox if it is outside the image (width, height).
    """
    refuse_outside(_not_small(box), size)
    return box


def _not_small(box: np.ndarray) -> np.ndarray:
    if ((box[2:] - box[:2]) < MIN_BOX_PX).any():
        raise SampleError("small_box", f"{box.round(3).tolist()}")
    return box


def known_only(value: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[J, D] float32 with zeros where `valid` [J] is 0."""
    return np.where(valid[:, None] > 0, value, 0).astype(np.float32)


def fields_2d(joint_img: np.ndarray, valid: np.ndarray) -> dict[str, Any]:
    """The 2D fields of a HandRecord: the valid joints and their box. Raises as `tight_box`."""
    box = tight_box(joint_img, valid)
    return {"hand_bbox": box, "joint_img": known_only(joint_img, valid), "joint_2d_valid": valid}


def fields_seen(
    joint_cam: np.ndarray,
    focal: np.ndarray,
    princpt: np.ndarray,
    size: tuple[int, int],
    known: np.ndarray | None = None,
) -> dict[str, Any]:
    """The joint and camera fields of a HandRecord. Joints `known` [J] (None: all) are known in 3D, and in 2D where they
    project into the image (width, height). Raises as `tight_box`."""
    joint_img = project_mm(joint_cam, focal, princpt)
    known = np.ones(21, np.float32) if known is None else np.asarray(known, np.float32)
    fields = {"joint_cam": known_only(joint_cam, known), "joint_3d_valid": known, "focal": focal, "princpt": princpt}
    return {**fields_2d(joint_img, visible_joints(joint_img, size, known)), **fields}


def fields_mano(pose: np.ndarray | None, shape: np.ndarray | None, flat_hand_mean: bool) -> dict[str, Any]:
    """The MANO fields of a HandRecord; empty without a pose."""
    if pose is None:
        return {}
    return {"mano_pose": pose, "mano_shape": shape, "hand_model": "mano", "flat_hand_mean": flat_hand_mean}


def turn_root(pose: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """MANO pose [48] axis-angle with its root rotated into another frame by `rotation` [3, 3]: R_root' = R R_root."""
    return turn_roots(pose[None], rotation)[0]


def plain_key(*parts: object) -> str:
    """A sample key from parts: letters, digits, `-` and `_` only, because a dot ends a key and a slash is a folder."""
    return "_".join(re.sub(r"[^A-Za-z0-9_\-]+", "-", str(part)) for part in parts)


def finite(name: str, value: object, shape: tuple[int, ...]) -> np.ndarray:
    """`value` as a float64 array of `shape`.

    Raises:
        SampleError: missing_annotation for None, wrong_shape, or not_finite.
    """
    if value is None:
        raise SampleError("missing_annotation", name)
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise SampleError("wrong_shape", f"{name} is not an array of numbers") from None
    if array.size != int(np.prod(shape)):
        raise SampleError("wrong_shape", f"{name} is {array.shape}, not {shape}")
    if not np.isfinite(array).all():
        raise SampleError("not_finite", name)
    return array.reshape(shape)
