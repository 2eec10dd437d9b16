"""From the members of one tar sample to a Clip: our native format, and both generations of the labs' format.

A tar sample is a clip of T frames (T may be 1) of one hand. Both formats hold `.npy` arrays with a leading T; they
differ in how images and meta data are kept:

    native   `jpg|jpeg|png|webp` (T = 1) or `0000.jpg`, `0001.jpg`, ...; one `json` with everything that is no array
    labs     `img_bytes.pickle` (walked, never unpickled), `imgs_path.json`, `handedness.json`, `data_source.json`, ...

What is absent, or flagged as unknown, src/data/shards/annotation.py fills in. Shape legend: T frames.
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
    """Where one frame's encoded image lies: in which member, from which byte of it, how many bytes."""

    suffix: str
    begin: int
    size: int


def is_image(suffix: str) -> bool:
    """Whether a member of that suffix holds image bytes (one image, or the labs' list of them)."""
    return suffix == LAB_IMAGES or _IMAGE.match(suffix) is not None


def find_images(members: Mapping[str, memoryview | bytes]) -> list[ImageSpan]:
    """The encoded images of a sample, in frame order.

    Raises:
        SampleError: missing_member, bad_value, bad_pickle, unsafe_pickle, or undecodable_image for bytes of no known
            image format.
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
            raise SampleError("undecodable_image", f"{span.suffix} holds no jpeg, png or webp")
    return spans


def _number(digits: str | None) -> int:
    """A frame's number in the name of its image; 0 where there is none."""
    try:
        return int(digits or 0)
    except ValueError:  # Python reads no more than 4,300 digits
        raise SampleError("bad_value", f"a frame number of {len(digits or '')} digits") from None


def parse_clip(members: Mapping[str, memoryview | bytes], check: bool = True) -> Clip:
    """Every annotation of a sample, checked.

    Args:
        members: bytes by suffix ("json", "joint_img.npy", ...); images may be missing here.
        check: whether to look for frames with values that cannot be used (`Clip.bad_frame`). Not needed for bytes that
            an index has a checksum of: its rows have passed.

    Raises:
        SampleError: missing_member, bad_json, bad_value, wrong_shape, wrong_dtype, object_array or bad_npy.
    """
    if "json" in members:
        said, meta = _native_words(bytes(members["json"]))
    elif "handedness.json" in members:
        said, meta = _lab_words(*(bytes(members[m]) if m in members else None for m in _LAB_WORDS))
    else:
        raise SampleError("missing_member", "neither json nor handedness.json")
    arrays = {name: _array(members[member], name) for member, name in _MEMBERS.items() if member in members}
    for name in ("has_mano", "has_intr"):
        if name in said and name not in arrays:
            arrays[name] = _flags(said[name], name)
    if "hand_bbox" not in arrays and "joint_img" not in arrays:
        raise SampleError("missing_member", "neither hand_bbox.npy nor joint_img.npy")
    num_frame = {len(a) for a in arrays.values()}
    if len(num_frame) != 1:
        raise SampleError("wrong_shape", "numbers of frames differ: " + _lengths(arrays))
    if "mano_pose" in arrays and meta.flat_hand_mean is None:
        raise SampleError("bad_value", "flat_hand_mean: a sample with mano_pose must state true or false")
    return complete_clip(meta, arrays, num_frame.pop(), check)


def _lengths(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {len(a)}" for name, a in arrays.items())


def _json(text: bytes, suffix: str) -> Any:
    """What a json member says."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise SampleError("bad_json", f"{suffix} does not parse") from None


@lru_cache(maxsize=64)  # what single frames of a set say is mostly the same
def _native_words(text: bytes) -> tuple[Mapping[str, Any], Meta]:
    """What the native json says, as it stands there and understood."""
    said = _json(text, "json")
    if not isinstance(said, dict):
        raise SampleError("bad_json", "the meta data is no object")
    return said, _meta(said)


@lru_cache(maxsize=64)
def _lab_words(*texts: bytes | None) -> tuple[Mapping[str, Any], Meta]:
    """The same of the labs' single json members (`_LAB_WORDS`), under the native names. Their MANO angles lack the mean
    pose."""
    words = {name: _word(text, member) for (member, name), text in zip(_LAB_WORDS.items(), texts) if text is not None}
    said = {"hand_model": LAB_HAND_MODEL, "flat_hand_mean": False, **words}
    return said, _meta(said)


def _word(text: bytes, suffix: str) -> str:
    """A text in a json member. webdataset's writer stores a str as it is, so it may stand there without quotes."""
    if _PLAIN_WORD.fullmatch(text):
        return text.decode()
    word = _json(text, suffix)
    if not isinstance(word, str):
        raise SampleError("bad_value", f"{suffix} holds {word!r}, not a text")
    return word


def _meta(said: Mapping[str, Any]) -> Meta:
    """What a sample says besides its arrays, understood."""
    side, mean = said.get("handedness"), said.get("flat_hand_mean")
    if side not in ("left", "right"):
        raise SampleError("bad_value", f"handedness {side!r} is neither 'left' nor 'right'")
    return Meta(
        is_right=side == "right",
        source=printable(_text(said, "data_source") or "unknown"),
        hand_model=_text(said, "hand_model") or "unknown",
        flat_hand_mean=mean if isinstance(mean, bool) else None,
        intr_type=_text(said, "intr_type"),
    )


def _text(said: Mapping[str, Any], name: str) -> str | None:
    """A text among what a sample says; None where it is absent."""
    value = said.get(name)
    if value is not None and not isinstance(value, str):
        raise SampleError("bad_value", f"{name} is no text but of type {type(value).__name__}")
    return value


def _flags(value: Any, name: str) -> np.ndarray:
    """[T] one flag of 0 or 1 a frame."""
    values = value if isinstance(value, list) else [value]
    try:
        flags = [float(float(v) > 0) for v in values if isinstance(v, (bool, int, float))]
    except OverflowError:  # an integer beyond all floats
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
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is found as such
        return array.astype(np.float32)
