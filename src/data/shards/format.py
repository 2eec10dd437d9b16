"""Parses the members of one tar sample into a Clip: the native format and two generations of the labs' format.

The labs' format is that of existing shards that other groups wrote with their public scripts. A tar sample is a clip of
T frames (T may be 1) of one hand. Both formats hold `.npy` arrays with a leading T; images and metadata differ:

    native   `jpg|jpeg|png|webp` (T = 1) or `0000.jpg`, `0001.jpg`, ...; one `json` with everything that is not an array
    labs     `img_bytes.pickle` (parsed, never unpickled), `imgs_path.json`, `handedness.json`, `data_source.json`, ...

Layouts that writers use instead are converted here (`_with_frame_axis`, `_split_confidence`);
src/data/shards/annotation.py fills in values that are missing or flagged as unknown. Shape legend: T frames.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from src.batch import NUM_JOINT, NUM_POSE
from src.data.shards.annotation import FIELDS, FLAGS, INTR_TYPES, Clip, Meta, complete_clip, constant
from src.data.shards.errors import SampleError
from src.data.shards.safe_parse import parse_npy, pickled_image_spans
from src.utils.restricted_pickle import TextSpan
from src.utils.text import printable

LAB_IMAGES = "img_bytes.pickle"
LAB_HAND_MODEL = "mano"
_IMAGE = re.compile(r"^(?:(\d+)\.)?(jpg|jpeg|png|webp)$")
_LAB_WORDS = {f"{name}.json": name for name in ("handedness", "data_source", "intr_type")}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")

_MEMBERS = {f"{name}.npy": name for name in FIELDS}
# joints that may have a confidence as last column -> their flag, columns without it
_CONFIDENCE = {"joint_img": ("joint_2d_valid", 2), "joint_cam": ("joint_3d_valid", 3)}
# another shape of a frame that can be read in one way only
_ALSO: dict[str, tuple[int, ...]] = {
    "mano_pose": (NUM_POSE // 3, 3),
    **{name: (*FIELDS[name], 1) for name in FLAGS},
    **{name: (NUM_JOINT, size + 1) for name, (_, size) in _CONFIDENCE.items()},
}
_SHAPE_HINT = {
    "mano_pose": ": 16 axis-angle rotations, the root first, neither matrices nor PCA coefficients",
    "hand_bbox": ": x and y of the top left and bottom right corner",
    "focal": ": fx and fy of each frame",
}


@dataclass(frozen=True)
class ImageSpan:
    """The bytes of one frame's encoded image: which member, first byte in it, number of bytes."""

    suffix: str
    begin: int
    size: int
    is_text: bool = False  # stored as text, see safe_parse.stored_image


def is_image(suffix: str) -> bool:
    """Whether a member with this suffix holds image bytes (one image, or the labs' list of images)."""
    return suffix == LAB_IMAGES or _IMAGE.match(suffix) is not None


def find_images(members: Mapping[str, memoryview | bytes]) -> list[ImageSpan]:
    """The encoded images of a sample, in frame order.

    Raises:
        SampleError: missing_member, bad_value, bad_pickle, unsafe_pickle or wrong_shape.
    """
    if LAB_IMAGES in members:
        located = pickled_image_spans(bytes(members[LAB_IMAGES]))
        spans = [ImageSpan(LAB_IMAGES, *span, isinstance(span, TextSpan)) for span in located]
    else:
        names = sorted((_number(m.group(1)), suffix) for suffix in members if (m := _IMAGE.match(suffix)))
        spans = [ImageSpan(suffix, 0, len(members[suffix])) for _, suffix in names]
    if not spans:
        raise SampleError("missing_member", f"neither an image nor {LAB_IMAGES}")
    return spans


def is_known_format(image: memoryview | bytes) -> bool:
    """Whether encoded bytes begin as a jpeg, png or webp does."""
    return bytes(image[:8]).startswith(_MAGIC)


def _number(digits: str | None) -> int:
    """The frame number in an image's name; 0 if it has none."""
    try:
        return int(digits or 0)
    except ValueError:  # Python converts at most 4,300 digits
        raise SampleError("bad_value", f"a frame number of {len(digits or '')} digits") from None


def parse_clip(members: Mapping[str, memoryview | bytes], check: bool = True) -> Clip:
    """Every annotation of a sample, checked.

    Args:
        members: bytes by suffix ("json", "joint_img.npy", ...); images are not needed.
        check: whether to find frames with unusable values (`Clip.bad_frame`). Not needed for bytes that match the
            checksum in an index, which only lists frames that passed.

    Raises:
        SampleError: missing_member, bad_json, bad_value, wrong_shape, wrong_dtype, object_array or bad_npy.
    """
    if "json" in members:
        fields, meta = _native_meta(bytes(members["json"]))
    elif "handedness.json" in members:
        fields, meta = _lab_meta(*(bytes(members[m]) if m in members else None for m in _LAB_WORDS))
    else:
        raise SampleError("missing_member", "neither json nor handedness.json")
    arrays = {name: _array(members[member], name) for member, name in _MEMBERS.items() if member in members}
    for name in ("has_mano", "has_intr"):
        if name in fields and name not in arrays:
            arrays[name] = _flags(fields[name], name)
    if "hand_bbox" not in arrays and "joint_img" not in arrays:
        raise SampleError("missing_member", "neither hand_bbox.npy nor joint_img.npy")
    num_frame = {len(a) for a in arrays.values()}
    if len(num_frame) != 1:
        lengths = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
        raise SampleError("wrong_shape", f"arrays differ in their number of frames: {lengths}")
    _split_confidence(arrays)
    if "mano_pose" in arrays and meta.flat_hand_mean is None:
        raise SampleError("bad_value", "flat_hand_mean must be true or false in a sample with mano_pose")
    return complete_clip(meta, arrays, num_frame.pop(), check)


def _json(text: bytes, suffix: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise SampleError("bad_json", f"{suffix} is not valid JSON") from None


@lru_cache(maxsize=64)  # samples of one frame mostly share the same few texts
def _native_meta(text: bytes) -> tuple[Mapping[str, Any], Meta]:
    """(all fields, the metadata among them) of the native json member."""
    fields = _json(text, "json")
    if not isinstance(fields, dict):
        raise SampleError("bad_json", "json is not an object")
    return fields, _meta(fields)


@lru_cache(maxsize=64)
def _lab_meta(*texts: bytes | None) -> tuple[Mapping[str, Any], Meta]:
    """The same from the labs' json members (_LAB_WORDS), under the native names. Their MANO poses are offsets from the
    mean pose."""
    words = {name: _word(text, member) for (member, name), text in zip(_LAB_WORDS.items(), texts) if text is not None}
    fields = {"hand_model": LAB_HAND_MODEL, "flat_hand_mean": False, **words}
    return fields, _meta(fields)


def _word(data: bytes, suffix: str) -> str:
    """The text in a json member: a JSON string, or text without quotes, as webdataset's writer stores a str."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, str):
        return value
    if isinstance(value, (list, dict)):
        raise SampleError("bad_value", f"{suffix} holds a {type(value).__name__}, not a string")
    try:
        text = data.decode("utf-8-sig").strip(" \t\n\r")
    except UnicodeDecodeError:
        text = "\0"
    if text.startswith(('"', "[", "{")) or _CONTROL.search(text):
        raise SampleError("bad_json", f"{suffix} is neither a JSON string nor a line of text")
    return text


def _meta(fields: Mapping[str, Any]) -> Meta:
    side, mean = fields.get("handedness"), fields.get("flat_hand_mean")
    if side not in ("left", "right"):
        raise SampleError("bad_value", f"handedness must be 'left' or 'right', not {side!r:.99}")
    intr_type = _text(fields, "intr_type")
    if intr_type is not None and intr_type not in INTR_TYPES:
        known = ", ".join(map(repr, sorted(INTR_TYPES)))
        raise SampleError("bad_value", f"intr_type must be one of {known}, not {intr_type!r:.99}")
    return Meta(
        is_right=side == "right",
        source=printable(_text(fields, "data_source") or "unknown"),
        hand_model=_text(fields, "hand_model") or "unknown",
        flat_hand_mean=mean if isinstance(mean, bool) else None,
        intr_type=intr_type,
    )


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    """A string among a sample's fields; None if it is missing."""
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise SampleError("bad_value", f"{name} must be a string, not {type(value).__name__}")
    return value


def _flags(value: Any, name: str) -> np.ndarray:
    """[T] flags, 0 or 1."""
    values = value if isinstance(value, list) else [value]
    try:
        flags = [float(float(v) > 0) for v in values if isinstance(v, (bool, int, float))]
    except OverflowError:  # an integer too large for a float
        flags = []
    if len(flags) != len(values):
        raise SampleError("bad_value", f"{name} must be a list of 0 and 1")
    return constant(flags[0], 1) if len(flags) == 1 else np.array(flags, np.float32)


def _array(data: memoryview | bytes, name: str) -> np.ndarray:
    """One annotation array as float32; flags become exactly 0 or 1 (NaN becomes 0).

    `joint_img` and `joint_cam` may have one more column, see `_split_confidence`.
    """
    try:
        array = parse_npy(data)
    except SampleError as error:
        raise SampleError(error.reason, f"{name}.npy: {error.detail}") from None
    if array.ndim == 0 or array.shape[1:] != FIELDS[name]:
        array = _with_frame_axis(array, name)
    if array.dtype == np.float32 and name not in FLAGS:
        return array
    if name in FLAGS:
        return (array > 0).astype(np.float32)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is detected later
        return array.astype(np.float32)


def _with_frame_axis(array: np.ndarray, name: str) -> np.ndarray:
    """[T, ...] from the other layouts that writers use, where there is one way to read them."""
    for shape in (FIELDS[name], _ALSO.get(name)):
        if shape in (array.shape, array.shape[1:]):  # without the frame axis: a clip of one frame
            return array.reshape(-1, *(shape if name in _CONFIDENCE else FIELDS[name]))
    expected = ", ".join(["T", *map(str, FIELDS[name])])
    raise SampleError("wrong_shape", f"{name}.npy is {array.shape}, not ({expected}){_SHAPE_HINT.get(name, '')}")


def _split_confidence(arrays: dict[str, np.ndarray]) -> None:
    """Replace a confidence in the last column of the joints by flags: known where it and the joint's flag are above 0.

    Raises:
        SampleError: wrong_shape if the column holds other numbers, such as depths.
    """
    for name, (flag, size) in _CONFIDENCE.items():
        array = arrays.get(name)
        if array is None or array.shape[2] == size:
            continue
        confidence = array[..., size]
        if not ((confidence >= 0) & (confidence <= 1) | np.isnan(confidence)).all():
            stated = f"{name}.npy is {array.shape}, and its last column is not a confidence from 0 to 1"
            raise SampleError("wrong_shape", f"{stated}; store {size} columns, and what is known in {flag}.npy")
        arrays[flag] = (confidence > 0) * arrays.get(flag, arrays.get("joint_valid", np.float32(1)))
        arrays[name] = array[..., :size]
