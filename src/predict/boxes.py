"""Read the boxes file: JSON with one record per hand to predict.

    [{"image": "a.jpg", "bbox": [x0, y0, x1, y1], "handedness": "left", "focal": [fx, fy], "princpt": [cx, cy]}, ...]

`image` is a path relative to the JSON file or to the folder of images; px refer to the upright image; `handedness`,
`focal` and `princpt` may be absent or null. Other keys are ignored, so a list of annotations can be used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class HandBox:
    """One hand to predict; None for what the file does not specify."""

    box: tuple[float, float, float, float] | None  # xyxy px; None is the whole image
    is_right: bool | None = None
    focal: tuple[float, float] | None = None  # px
    princpt: tuple[float, float] | None = None  # px


def read_boxes(path: Path, photos: Sequence[Path]) -> tuple[dict[Path, list[HandBox]], list[str]]:
    """The boxes of each image, in the file's order, and the names of images in the file that are not in `photos`.

    Raises ValueError naming the file and the invalid record.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f'{path} must hold a list of records {{"image": ..., "bbox": [x0, y0, x1, y1], ...}}')
    known = {photo.resolve(): photo for photo in photos}
    folders = [path.parent, *{photo.parent for photo in photos}]
    boxes: dict[Path, list[HandBox]] = {photo: [] for photo in photos}
    unknown: dict[str, None] = {}
    for index, record in enumerate(records):
        try:
            name, hand = _parse(record)
        except ValueError as error:
            raise ValueError(f"{path}, record {index}: {error}") from error
        photo = next((known[p] for folder in folders if (p := (folder / name).resolve()) in known), None)
        if photo is None:
            unknown[name] = None
        else:
            boxes[photo].append(hand)
    return boxes, list(unknown)


def _parse(record: Any) -> tuple[str, HandBox]:
    """Image name and hand of one record."""
    if not isinstance(record, dict):
        raise ValueError("must be an object with `image` and `bbox`")
    name, side = record.get("image"), record.get("handedness")
    if not isinstance(name, str) or not name:
        raise ValueError("has no `image`, the name of an image file")
    if side not in ("left", "right", None):
        raise ValueError(f'`handedness` must be "left" or "right", not {side!r}')
    box = _numbers(record, "bbox", 4)
    if box is None:
        raise ValueError("has no `bbox` [x0, y0, x1, y1]")
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"`bbox` {list(box)} must be [x0, y0, x1, y1] px with x0 < x1 and y0 < y1, not x, y, w, h")
    focal, princpt = _numbers(record, "focal", 2), _numbers(record, "princpt", 2)
    if focal is not None and min(focal) <= 0:
        raise ValueError(f"`focal` {list(focal)} must be positive, in px")
    return name, HandBox(box, None if side is None else side == "right", focal, princpt)


def _numbers(record: dict[str, Any], key: str, count: int) -> Any:
    """`count` finite numbers as a tuple; None where the key is absent or null."""
    value = record.get(key)
    if value is None:
        return None
    is_number = isinstance(value, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    if not is_number or len(value) != count or not all(map(math.isfinite, value)):
        raise ValueError(f"`{key}` must be {count} numbers, not {value!r}")
    return tuple(map(float, value))
