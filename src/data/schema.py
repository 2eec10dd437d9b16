"""From the members of one tar sample to a Clip: our native format, and both generations of the labs' format.

A tar sample is a clip of T frames (T may be 1) of one hand. Both formats hold `.npy` arrays with a leading T; they
differ in how images and meta data are kept:

    native   `jpg|jpeg|png|webp` (T = 1) or `0000.jpg`, `0001.jpg`, ...; one `json` with everything that is no array
    labs     `img_bytes.pickle` (walked, never unpickled), `imgs_path.json`, `handedness.json`, `data_source.json`, ...

An array that is absent is not known: its values are 0 and its flags 0. Flags that are absent fall back to older ones.
Shape legend: T frames, J = 21 joints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from src.batch import NUM_JOINT, NUM_POSE, NUM_SHAPE
from src.data.blob import SampleError, parse_npy, pickled_image_spans

LAB_IMAGES = "img_bytes.pickle"
LAB_HAND_MODEL = "mano"
_IMAGE = re.compile(r"^(?:(\d+)\.)?(jpg|jpeg|png|webp)$")
_PLAIN_WORD = re.compile(rb"[A-Za-z][\w.\-]*")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")

# name -> shape behind T of every array that is read; others are passed over
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
_FLAGS = frozenset({"joint_valid", "joint_2d_valid", "joint_3d_valid", "mano_valid", "has_mano", "has_intr"})
_NOT_REAL = frozenset({"fixed_virtual", "none"})  # values of intr_type
_MEMBERS = {f"{name}.npy": name for name in FIELDS}


@dataclass(frozen=True)
class ImageSpan:
    """Where one frame's encoded image lies: in which member, from which byte of it, how many bytes."""

    suffix: str
    begin: int
    size: int


@dataclass(frozen=True)
class Clip:
    """The annotations of one tar sample, float32 and complete: unknown values are 0 with their flag 0."""

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
    focal: np.ndarray  # [T, 2] px; 0 where nothing is stated
    princpt: np.ndarray  # [T, 2] px
    has_intr: np.ndarray  # [T] 1 where these are those of the real camera
    bad_frame: dict[int, str] = field(default_factory=dict)  # frame -> reason it cannot be used


def is_image(suffix: str) -> bool:
    """Whether a member of that suffix holds image bytes (one image, or the labs' list of them)."""
    return suffix == LAB_IMAGES or _IMAGE.match(suffix) is not None


def find_images(members: Mapping[str, memoryview | bytes]) -> list[ImageSpan]:
    """The encoded images of a sample, in frame order.

    Raises:
        SampleError: missing_member, bad_pickle, unsafe_pickle, or undecodable_image for bytes of no known image format.
    """
    if LAB_IMAGES in members:
        spans = [ImageSpan(LAB_IMAGES, *span) for span in pickled_image_spans(bytes(members[LAB_IMAGES]))]
    else:
        names = sorted((int(m.group(1) or 0), suffix) for suffix in members if (m := _IMAGE.match(suffix)))
        spans = [ImageSpan(suffix, 0, len(members[suffix])) for _, suffix in names]
    if not spans:
        raise SampleError("missing_member", f"neither an image nor {LAB_IMAGES}")
    for span in spans:
        if not bytes(members[span.suffix][span.begin : span.begin + 8]).startswith(_MAGIC):
            raise SampleError("undecodable_image", f"{span.suffix} holds no jpeg, png or webp")
    return spans


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
        meta, default_mean = _object(_json(members, "json")), None
    elif "handedness.json" in members:
        meta, default_mean = _lab_meta(members), False
    else:
        raise SampleError("missing_member", "neither json nor handedness.json")
    arrays = {name: _array(members[member], name) for member, name in _MEMBERS.items() if member in members}
    for name in ("has_mano", "has_intr"):
        if name in meta and name not in arrays:
            arrays[name] = _meta_flags(meta[name], name)
    if "hand_bbox" not in arrays and "joint_img" not in arrays:
        raise SampleError("missing_member", "neither hand_bbox.npy nor joint_img.npy")
    num_frame = {len(a) for a in arrays.values()}
    if len(num_frame) != 1:
        raise SampleError("wrong_shape", "numbers of frames differ: " + _lengths(arrays))
    if meta.get("handedness") not in ("left", "right"):
        raise SampleError("bad_value", f"handedness {meta.get('handedness')!r} is neither 'left' nor 'right'")
    if "mano_pose" in arrays and not isinstance(mean := meta.get("flat_hand_mean", default_mean), bool):
        raise SampleError("bad_value", f"flat_hand_mean {mean!r}: a sample with mano_pose must state true or false")
    return _complete(meta, default_mean, arrays, num_frame.pop(), check)


def _lengths(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {len(a)}" for name, a in arrays.items())


def _json(members: Mapping[str, memoryview | bytes], suffix: str) -> Any:
    """What a json member says; shared with other samples, so not to be changed."""
    try:
        return _parsed(bytes(members[suffix]))
    except (ValueError, RecursionError):
        raise SampleError("bad_json", f"{suffix} does not parse") from None


@lru_cache(maxsize=64)
def _parsed(text: bytes) -> Any:
    """Cached: the meta data of a set's single frames are mostly the same."""
    return json.loads(text)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SampleError("bad_json", "the meta data is no object")
    return value


def _lab_meta(members: Mapping[str, memoryview | bytes]) -> dict[str, Any]:
    """What the labs' single json members say, under the native names. Their MANO angles lack the mean pose."""
    meta = {"hand_model": LAB_HAND_MODEL}
    for name in ("handedness", "data_source", "intr_type"):
        if f"{name}.json" in members:
            meta[name] = _word(members, f"{name}.json")
    return meta


def _word(members: Mapping[str, memoryview | bytes], suffix: str) -> str:
    """A text in a json member. webdataset's writer stores a str as it is, so it may stand there without quotes."""
    text = bytes(members[suffix])
    if _PLAIN_WORD.fullmatch(text):
        return text.decode()
    word = _json(members, suffix)
    if not isinstance(word, str):
        raise SampleError("bad_value", f"{suffix} holds {word!r}, not a text")
    return word


def _meta_flags(value: Any, name: str) -> np.ndarray:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, (bool, int, float)) for v in values):
        raise SampleError("bad_value", f"{name} must be a list of 0 and 1")
    if len(values) == 1:
        return _constant(float(values[0] > 0), 1)
    return (np.array(values, np.float32) > 0).astype(np.float32)


def _array(data: memoryview | bytes, name: str) -> np.ndarray:
    """One annotation array as float32; flags become exactly 0 or 1 (NaN becomes 0)."""
    try:
        array = parse_npy(data)
    except SampleError as error:
        raise SampleError(error.reason, f"{name}.npy: {error.detail}") from None
    if array.ndim == 0 or array.shape[1:] != FIELDS[name]:
        raise SampleError("wrong_shape", f"{name}.npy is {array.shape}, not (T, {str(FIELDS[name])[1:]}")
    if array.dtype == np.float32 and name not in _FLAGS:
        return array
    if name in _FLAGS:
        return (array > 0).astype(np.float32)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is found as such
        return array.astype(np.float32)


@lru_cache(maxsize=256)
def _constant(value: float, *shape: int) -> np.ndarray:
    """A read-only array of one value, shared by all clips of a length."""
    array = np.full(shape, value, np.float32)
    array.flags.writeable = False
    return array


def _flag(num_frame: int, arrays: dict[str, np.ndarray], needs: set[str], names: tuple[str, ...]) -> np.ndarray:
    """[T, ...] the first flag of `names` that is there, else 1; all 0 where an array that it speaks of is absent."""
    is_known = needs <= arrays.keys()
    for name in names:
        if is_known and name in arrays:
            return arrays[name]
    return _constant(float(is_known), num_frame, *FIELDS[names[0]])


def _known(arrays: dict[str, np.ndarray], name: str, flag: np.ndarray) -> np.ndarray:
    """The array with 0 wherever its flag is 0, whatever stands there."""
    if name not in arrays:
        return _constant(0.0, len(flag), *FIELDS[name])
    if flag is _constant(1.0, *flag.shape) or flag.all():
        return arrays[name]
    return np.where(flag[..., None] > 0, arrays[name], np.float32(0))


def _complete(
    meta: dict[str, Any], default_mean: bool | None, arrays: dict[str, np.ndarray], num_frame: int, check: bool
) -> Clip:
    """Fill in what is absent, zero what is flagged as unknown, and find the frames that cannot be used."""
    valid_2d = _flag(num_frame, arrays, {"joint_img"}, ("joint_2d_valid", "joint_valid"))
    valid_3d = _flag(num_frame, arrays, {"joint_cam"}, ("joint_3d_valid", "joint_valid"))
    has_mano = _flag(num_frame, arrays, {"mano_pose", "mano_shape"}, ("has_mano", "mano_valid"))
    has_intr = _flag(num_frame, arrays, {"focal", "princpt"}, ("has_intr",))
    if meta.get("intr_type") == "none":
        has_intr = _constant(0.0, num_frame)
    elif "has_intr" not in arrays and "focal" in arrays and "princpt" in arrays:
        has_intr = (arrays["focal"] != 0).all(axis=-1).astype(np.float32)
    joint_img = _known(arrays, "joint_img", valid_2d)
    values = {
        "hand_bbox": arrays["hand_bbox"] if "hand_bbox" in arrays else _extent(joint_img, valid_2d),
        "joint_img": joint_img,
        "joint_cam": _known(arrays, "joint_cam", valid_3d),
        "mano_pose": _known(arrays, "mano_pose", has_mano),
        "mano_shape": _known(arrays, "mano_shape", has_mano),
        "focal": _known(arrays, "focal", has_intr),
        "princpt": _known(arrays, "princpt", has_intr),
    }
    is_real = meta.get("intr_type") not in _NOT_REAL
    return Clip(
        num_frame=num_frame,
        is_right=meta["handedness"] == "right",
        source=str(meta.get("data_source", "unknown")),
        hand_model=str(meta.get("hand_model", "unknown")),
        flat_hand_mean=bool(meta.get("flat_hand_mean", default_mean)),
        joint_2d_valid=valid_2d,
        joint_3d_valid=valid_3d,
        has_mano=has_mano,
        has_intr=has_intr if is_real else _constant(0.0, num_frame),
        bad_frame=_bad_frames(values, has_intr) if check else {},
        **values,
    )


def _extent(joint_img: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[T, 4] tight box of the valid joints, for a sample that states none; NaN where no joint is valid."""
    known = valid[..., None] > 0
    low = np.where(known, joint_img, np.inf).min(axis=1)
    high = np.where(known, joint_img, -np.inf).max(axis=1)
    return np.concatenate([low, high], axis=-1).astype(np.float32)


def _bad_frames(values: dict[str, np.ndarray], has_intr: np.ndarray) -> dict[int, str]:
    """Frame -> reason: a value that is not finite though its flag says it is known, or a box or lens that is none."""
    finite = np.ones(len(has_intr), bool)
    for array in values.values():
        if not np.isfinite(array).all():
            finite &= np.isfinite(array).reshape(len(array), -1).all(axis=1)
    bad = {int(t): "not_finite" for t in np.flatnonzero(~finite)}
    box = values["hand_bbox"]
    for t in np.flatnonzero(~((box[:, 2:] - box[:, :2]) >= 1.0).all(axis=1)):
        bad.setdefault(int(t), "bad_bbox")
    for t in np.flatnonzero((has_intr > 0) & ~(values["focal"] > 0).all(axis=1)):
        bad.setdefault(int(t), "bad_intrinsics")
    return bad
