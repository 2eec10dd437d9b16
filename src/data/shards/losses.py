"""Counts lost frames: of a sample that cannot be used, and of a shard that cannot be read at all."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from src.data.shards.annotation import FIELDS
from src.data.shards.errors import SampleError
from src.data.shards.format import LAB_IMAGES, is_image
from src.data.shards.safe_parse import parse_npy, pickled_image_spans

_ARRAYS = {f"{name}.npy": len(shape) + 1 for name, shape in FIELDS.items()}  # member -> number of dimensions
_META = frozenset({"json", "handedness.json", "data_source.json", "intr_type.json"})
_PATHS = "imgs_path.json"
_KNOWN = "|".join(re.escape(name) for name in (*_ARRAYS, *_META, _PATHS, LAB_IMAGES))
_ANNOTATION = re.compile(rf"^(.*?)\.({_KNOWN})$")
_IMAGE = re.compile(r"^(?:(.*)\.)?(jpe?g|png|webp)$")

Members = Mapping[str, "memoryview | bytes"]


def is_used(suffix: str) -> bool:
    """Whether a member with this suffix is read; others are ignored."""
    return suffix in _ARRAYS or suffix in _META or is_image(suffix)


def is_whole(suffixes: Iterable[str]) -> bool:
    """Whether members with these suffixes can make a sample: an image, its metadata, and a box or 2D joints."""
    found = {*suffixes}
    return (
        any(map(is_image, found))
        and not found.isdisjoint(("json", "handedness.json"))
        and not found.isdisjoint(("hand_bbox.npy", "joint_img.npy"))
    )


def count_images(members: Members) -> int:
    """The number of encoded images in a sample, 0 if unknown."""
    if LAB_IMAGES not in members:
        return sum(map(is_image, members))
    try:
        return len(pickled_image_spans(bytes(members[LAB_IMAGES])))
    except Exception:  # malformed bytes may raise anything
        return 0


def count_annotated(members: Members) -> int:
    """The number of frames that a sample's other members state: its list of paths, else its arrays; 0 if unknown."""
    try:
        if (paths := json.loads(bytes(members.get(_PATHS, b"0")))) and isinstance(paths, list):
            return len(paths)
    except (ValueError, RecursionError):
        pass
    lengths = [0]
    for suffix in members.keys() & _ARRAYS.keys():
        try:
            array = parse_npy(members[suffix])
        except SampleError:
            continue
        if array.ndim == _ARRAYS[suffix] and array.size:
            lengths.append(len(array))
    return max(lengths)


def count_frames(members: Members) -> int:
    """The number of frames of a sample that cannot be used, from whatever can still be parsed; at least 1."""
    return count_images(members) or count_annotated(members) or 1


def split_dotted(members: Members) -> dict[str | None, Members]:
    """The samples that dots in file names have merged into one; empty unless one of them has an image and annotations.

    `a.1.jpg`, `a.1.json`, ..., `a.2.jpg`, ... all have the key `a`: their suffixes begin with what distinguishes them,
    which is the key here (None: the sample that has the key alone).
    """
    hands: dict[str | None, dict[str, memoryview | bytes]] = {}
    for suffix, data in members.items():
        if is_used(suffix) and not _IMAGE.match(suffix):
            hands.setdefault(None, {})[suffix] = data
        elif match := _ANNOTATION.match(suffix):
            hands.setdefault(match[1], {})[match[2]] = data
    annotated = {*hands}
    for suffix, data in members.items():
        if match := _IMAGE.match(suffix):
            owner, image = _image_owner(match[1], match[2], annotated)
            hands.setdefault(owner, {})[image] = data
    is_merged = any(name is not None and len(hand) > 1 and any(map(is_image, hand)) for name, hand in hands.items())
    return {name: hand for name, hand in hands.items() if any(map(_makes_frames, hand))} if is_merged else {}


def _image_owner(stem: str | None, kind: str, annotated: set[str | None]) -> tuple[str | None, str]:
    """(beginning, suffix after it) of the image `<stem>.<kind>`: `1.0000.jpg` may be frame 0 of the sample 1."""
    if stem in annotated or stem is None:
        return stem, kind
    head, dot, number = stem.rpartition(".")
    owner = head if dot else None
    return (owner, f"{number}.{kind}") if number.isdigit() and owner in annotated else (stem, kind)


def _makes_frames(suffix: str) -> bool:
    return is_image(suffix) or suffix in _ARRAYS


def count_lost(shards: Iterable[tuple[int, Mapping[str, int], bool]]) -> tuple[Counter[str], int]:
    """Reason -> lost frames in the shards of one source, and how many shards cannot be read at all.

    Args:
        shards: for each (healthy frames, reason -> lost frames, whether it cannot be read at all). A shard that cannot
            be read counts as many frames as the others have on average, and at least one.
    """
    shards = list(shards)
    sizes = [healthy + sum(bad.values()) for healthy, bad, is_lost in shards if not is_lost]
    mean = max(1, round(sum(sizes) / len(sizes))) if sizes else 1
    counts: Counter[str] = Counter()
    for _, bad, is_lost in shards:
        counts.update(dict.fromkeys(bad, mean) if is_lost else bad)
    return counts, len(shards) - len(sizes)
