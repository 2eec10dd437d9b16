"""A Clip: the annotations of one tar sample, checked, with defaults for everything the sample omits.

A missing array is unknown: its values and its flags are 0. Missing flags fall back to older ones.
Shape legend: T frames, J = 21 joints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from src.batch import NUM_JOINT, NUM_POSE, NUM_SHAPE
from src.data.shards.errors import SampleError

# name -> shape after T of every array that is read; other arrays are ignored
FIELDS: dict[str, tuple[int, ...]] = {
    "hand_bbox": (4,),
    "joint_img": (NUM_JOINT, 2),
    "joint_cam": (NUM_JOINT, 3),
    "joint_valid": (NUM_JOINT,),
    "joint_2d_valid": (NUM_JOINT,),
    "joint_3d_valid": (NUM_JOINT,),
    "mano_pose": (NUM_POSE,),
    "mano_shape": (NUM_SHAPE,),
    "mano_valid": (),
    "has_mano": (),
    "focal": (2,),
    "princpt": (2,),
    "has_intr": (),
}
FLAGS = frozenset({"joint_valid", "joint_2d_valid", "joint_3d_valid", "mano_valid", "has_mano", "has_intr"})
_INVENTED = frozenset({"fixed_virtual", "pseudo"})  # cameras that a set's labels refer to, but that took no image
INTR_TYPES = frozenset({"real", "none"}) | _INVENTED  # values of intr_type
VALUE_LIMIT = 1e7  # px, mm, rad or coefficient: not a hand beyond that, and its square would lose float32 precision
MIN_FOCAL = 1.0  # px: a field of view of almost 180 degrees
_BEYOND = {"hand_bbox": "bad_bbox", "focal": "bad_intrinsics", "princpt": "bad_intrinsics"}  # other fields: bad_value


class Meta(NamedTuple):
    """The annotations that are not arrays."""

    is_right: bool
    source: str
    hand_model: str
    flat_hand_mean: bool | None
    intr_type: str | None


@dataclass(frozen=True)
class Clip:
    """The annotations of one tar sample, float32; unknown values and their flags are 0."""

    num_frame: int
    is_right: bool
    source: str
    hand_model: str
    flat_hand_mean: bool
    hand_bbox: np.ndarray  # [T, 4] xyxy px
    joint_img: np.ndarray  # [T, J, 2] px
    joint_2d_valid: np.ndarray  # [T, J]
    joint_cam: np.ndarray  # [T, J, 3] mm
    joint_3d_valid: np.ndarray  # [T, J]
    mano_pose: np.ndarray  # [T, 48]
    mano_shape: np.ndarray  # [T, 10]
    has_mano: np.ndarray  # [T]
    focal: np.ndarray  # [T, 2] px; 0 where unknown
    princpt: np.ndarray  # [T, 2] px
    has_intr: np.ndarray  # [T] 1 where focal and princpt are the real camera's; stated but 0: an invented camera
    bad_frame: dict[int, tuple[str, str]] = field(default_factory=dict)  # frame -> why it cannot be used, which value


@lru_cache(maxsize=256)
def constant(value: float, *shape: int) -> np.ndarray:
    """A read-only array of one value, shared by all clips of the same length."""
    array = np.full(shape, value, np.float32)
    array.flags.writeable = False
    return array


def _flag(num_frame: int, arrays: Mapping[str, np.ndarray], needs: set[str], names: tuple[str, ...]) -> np.ndarray:
    """[T, ...] the first flag of `names` that is present, else 1; all 0 if one of the arrays `needs` is missing."""
    is_known = needs <= arrays.keys()
    for name in names:
        if is_known and name in arrays:
            return arrays[name]
    return constant(float(is_known), num_frame, *FIELDS[names[0]])


def _known(arrays: Mapping[str, np.ndarray], name: str, flag: np.ndarray) -> np.ndarray:
    """The array with 0 wherever its flag is 0; all 0 if it is missing."""
    if name not in arrays:
        return constant(0.0, len(flag), *FIELDS[name])
    if flag is constant(1.0, *flag.shape) or flag.all():
        return arrays[name]
    return np.where(flag[..., None] > 0, arrays[name], np.float32(0))


def complete_clip(meta: Meta, arrays: Mapping[str, np.ndarray], num_frame: int, check: bool) -> Clip:
    """Fill in what is missing, zero what is flagged as unknown, and (`check`) find the frames that cannot be used.

    Args:
        arrays: float32 by name, shaped as in FIELDS, each with `num_frame` frames; flags are 0 or 1.
    """
    valid_2d = _flag(num_frame, arrays, {"joint_img"}, ("joint_2d_valid", "joint_valid"))
    valid_3d = _flag(num_frame, arrays, {"joint_cam"}, ("joint_3d_valid", "joint_valid"))
    has_mano = _flag(num_frame, arrays, {"mano_pose", "mano_shape"}, ("has_mano", "mano_valid"))
    has_camera = _has_camera(meta, arrays, num_frame)
    joint_img = _known(arrays, "joint_img", valid_2d)
    values = {
        "joint_img": joint_img,
        "hand_bbox": arrays["hand_bbox"] if "hand_bbox" in arrays else _box_of_joints(joint_img, valid_2d),
        "joint_cam": _known(arrays, "joint_cam", valid_3d),
        "mano_pose": _known(arrays, "mano_pose", has_mano),
        "mano_shape": _known(arrays, "mano_shape", has_mano),
        "focal": _known(arrays, "focal", has_camera),
        "princpt": _known(arrays, "princpt", has_camera),
    }
    return Clip(
        num_frame=num_frame,
        is_right=meta.is_right,
        source=meta.source,
        hand_model=meta.hand_model,
        flat_hand_mean=bool(meta.flat_hand_mean),
        joint_2d_valid=valid_2d,
        joint_3d_valid=valid_3d,
        has_mano=has_mano,
        has_intr=constant(0.0, num_frame) if meta.intr_type in _INVENTED else has_camera,
        bad_frame=_bad_frames(values, has_camera) if check else {},
        **values,
    )


def _has_camera(meta: Meta, arrays: Mapping[str, np.ndarray], num_frame: int) -> np.ndarray:
    """[T] 1 where focal and princpt state a camera, real or invented.

    Of an invented camera, has_intr 0 may say only that it is not real: it is stated where its values can be used.
    """
    if meta.intr_type == "none":
        return constant(0.0, num_frame)
    stated = _flag(num_frame, arrays, {"focal", "princpt"}, ("has_intr",))
    if ("has_intr" in arrays and meta.intr_type not in _INVENTED) or "focal" not in arrays or "princpt" not in arrays:
        return stated
    focal, princpt = arrays["focal"], arrays["princpt"]
    if "has_intr" not in arrays:
        return (focal != 0).all(axis=-1).astype(np.float32)
    usable = (focal >= MIN_FOCAL) & (focal <= VALUE_LIMIT) & (np.abs(princpt) <= VALUE_LIMIT)  # [T, 2]
    return np.maximum(stated, usable.all(axis=-1))


def refuse_outside(box: np.ndarray, size: tuple[int, int]) -> None:
    """Raises SampleError bad_bbox for a box [4] xyxy px that is outside the image (width, height)."""
    width, height = size
    if box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
        raise SampleError("bad_bbox", f"{box.tolist()} is outside the {width}x{height} image")


def joint_extent(joint_img: np.ndarray, valid: np.ndarray | float = 1.0) -> np.ndarray:
    """[..., 4] xyxy px, the tight box of the valid joints ([..., J, 2], [..., J]); infinite if no joint is valid."""
    known = np.broadcast_to(valid, joint_img.shape[:-1])[..., None] > 0
    low = np.where(known, joint_img, np.inf).min(axis=-2)
    high = np.where(known, joint_img, -np.inf).max(axis=-2)
    return np.concatenate([low, high], axis=-1)


def _box_of_joints(joint_img: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[T, 4] `joint_extent`; 0 in frames without valid joints, which makes them bad_bbox."""
    box = joint_extent(joint_img, valid)
    return np.where(np.isinf(box), np.float32(0), box)


def _bad_frames(values: Mapping[str, np.ndarray], has_camera: np.ndarray) -> dict[int, tuple[str, str]]:
    """Frame -> (reason, detail): known values that are not finite or beyond VALUE_LIMIT, invalid boxes and focal
    lengths."""
    bad: dict[int, tuple[str, str]] = {}
    for name, array in values.items():
        size = np.abs(array)
        if not (size <= VALUE_LIMIT).all():  # written so that NaN fails too
            largest = size.reshape(len(size), -1).max(axis=1)  # [T]
            for t in np.flatnonzero(~(largest <= VALUE_LIMIT)).tolist():
                reason = _BEYOND.get(name, "bad_value") if np.isfinite(largest[t]) else "not_finite"
                bad.setdefault(t, (reason, f"{name} is or contains {largest[t]:g}"))
    box = values["hand_bbox"]
    for t in np.flatnonzero(~((box[:, 2:] - box[:, :2]) >= 1.0).all(axis=1)).tolist():
        bad.setdefault(t, ("bad_bbox", f"hand_bbox is {[float(f'{edge:.6g}') for edge in box[t]]}"))
    for t in np.flatnonzero((has_camera > 0) & ~(values["focal"] >= MIN_FOCAL).all(axis=1)).tolist():
        bad.setdefault(t, ("bad_intrinsics", f"focal is {values['focal'][t].tolist()}"))
    return bad
