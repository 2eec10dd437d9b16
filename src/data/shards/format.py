"""Parses the members of one tar sample into a Clip: the native format and two generations of the labs' format.

The labs' format is that of existing shards that other groups wrote with their public scripts. A tar sample is a clip of
T frames (T may be 1) of one hand. Both formats hold `.npy` arrays with a leading T; images and metadata differ:

    native   `jpg|jpeg|png|webp` (T = 1) or `0000.jpg`, `0001.jpg`, ...; one `json` with everything that is not an array
    labs     `img_bytes.pickle` (parsed, never unpickled), `imgs_path.json`, `handedness.json`, `data_source.json`, ...

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

from src.data.shards.annotation import FIELDS, FLAGS, Clip, Meta, complete_clip, constant
from src.data.shards.errors import SampleError
from src.data.shards.safe_parse import parse_npy, pickled_image_spans
from src.utils.text import printable

LAB_IMAGES = "img_bytes.pickle"
LAB_HAND_MODEL = "mano"
_IMAGE = re.compile(r"^(?:(\d+)\.)?(jpg|jpeg|png|webp)$")
_LAB_WORDS = {f"{name}.json": name for name in ("handedness", "data_source", "intr_type")}
_PLAIN_WORD = re.compile(rb"[A-Za-z][\w.\-]*")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")

_MEMBERS = {f"{name}.npy": name for name in FIELDS}


@dataclass(frozen=True)
class ImageSpan:
    """The bytes of one frame's encoded image: which member, first byte in it, number of bytes."""

    suffix: str
    begin: int
    size: int


def is_image(suffix: str) -> bool:
    """Whether a member with this suffix holds image bytes (one image, or the labs' list of images)."""
    return suffix == LAB_IMAGES or _IMAGE.match(suffix) is not None


def find_images(members: Mapping[str, memoryview | bytes]) -> list[ImageSpan]:
    """The encoded images of a sample, in frame order.

    Raises:
        SampleError: missing_member, bad_value, bad_pickle, unsafe_pickle, or undecodable_image for an unknown image
            format.
    """
    if LAB_IMAGES in members:
        spans = [ImageSpan(LAB_IMAGES, *span) for span in pickled_image_spans(bytes(members[LAB_IMAGES]))]
    else:
        names = sorted((_number(m.group(1)), suffix) for suffix in members if (m := _IMAGE.match(suffix)))
        spans = [ImageSpan(suffix, 0, len(members[suffix])) for _, suffix in names]
    if not spans:
        raise SampleError("missing_member", f"neither an image nor {LAB_IMAGES}")
    for span in spans:
        if not bytes(members[span.suffix][span.begin : span.begin + 8]).startswith(_MAGIC):
            raise SampleError("undecodable_image", f"{span.suffix} is not a jpeg, png or webp")
    return spans


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


def _word(text: bytes, suffix: str) -> str:
    """The text in a json member, with or without quotes (webdataset's writer stores a str without)."""
    if _PLAIN_WORD.fullmatch(text):
        return text.decode()
    word = _json(text, suffix)
    if not isinstance(word, str):
        raise SampleError("bad_value", f"{suffix} holds {word!r}, not a string")
    return word


def _meta(fields: Mapping[str, Any]) -> Meta:
    side, mean = fields.get("handedness"), fields.get("flat_hand_mean")
    if side not in ("left", "right"):
        raise SampleError("bad_value", f"handedness must be 'left' or 'right', not {side!r}")
    return Meta(
        is_right=side == "right",
        source=printable(_text(fields, "data_source") or "unknown"),
        hand_model=_text(fields, "hand_model") or "unknown",
        flat_hand_mean=mean if isinstance(mean, bool) else None,
        intr_type=_text(fields, "intr_type"),
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
    """One annotation array as float32; flags become exactly 0 or 1 (NaN becomes 0)."""
    try:
        array = parse_npy(data)
    except SampleError as error:
        raise SampleError(error.reason, f"{name}.npy: {error.detail}") from None
    if array.ndim == 0 or array.shape[1:] != FIELDS[name]:
        raise SampleError("wrong_shape", f"{name}.npy is {array.shape}, not (T, {str(FIELDS[name])[1:]}")
    if array.dtype == np.float32 and name not in FLAGS:
        return array
    if name in FLAGS:
        return (array > 0).astype(np.float32)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is detected later
        return array.astype(np.float32)
