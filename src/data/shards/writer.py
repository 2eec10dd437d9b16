"""Writes hands as shards in the native format: plain image, json and array members, no pickle.

One tar sample is one hand in one image: `{key}.jpg` (the encoded bytes, unchanged), `{key}.json`, and one `.npy` per
known field with a leading T = 1. Unknown fields are omitted. `wds.WebDataset(...).decode("rgb")` reads the result.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class HandRecord:
    """One annotated hand; arrays without the leading T, units and frames as in src/batch.py. None: unknown."""

    key: str  # without dots: the first dot ends the key
    image: bytes
    image_type: str  # jpg, jpeg, png or webp
    handedness: str  # left or right
    data_source: str
    hand_bbox: np.ndarray | None = None  # [4] xyxy px
    joint_img: np.ndarray | None = None  # [21, 2] px
    joint_2d_valid: np.ndarray | None = None  # [21]
    joint_cam: np.ndarray | None = None  # [21, 3] mm
    joint_3d_valid: np.ndarray | None = None  # [21]
    mano_pose: np.ndarray | None = None  # [48] axis-angle
    mano_shape: np.ndarray | None = None  # [10]
    focal: np.ndarray | None = None  # [2] px
    princpt: np.ndarray | None = None  # [2] px
    hand_model: str | None = None  # the model that mano_pose and mano_shape are parameters of
    flat_hand_mean: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # further json entries, e.g. image_path, additional_desc
    withheld: dict[str, int] = field(
        default_factory=dict
    )  # labels of the source set to unknown, by reason; not written


_ARRAYS = [each.name for each in fields(HandRecord) if each.type == "np.ndarray | None"]


def to_members(record: HandRecord) -> dict[str, Any]:
    """The record as a webdataset sample: image bytes, json and float32 arrays [1, ...] by suffix."""
    assert "." not in record.key, record.key
    meta: dict[str, Any] = {"handedness": record.handedness, "data_source": record.data_source}
    if record.mano_pose is not None:
        assert None not in (record.hand_model, record.flat_hand_mean), record.key
        meta |= {"hand_model": record.hand_model, "flat_hand_mean": record.flat_hand_mean}
    meta |= {
        "intr_type": "real" if record.focal is not None else "none",
        "has_mano": [int(record.mano_pose is not None)],
        "has_intr": [int(record.focal is not None)],
        **record.extra,
    }
    known = {name: value for name in _ARRAYS if (value := getattr(record, name)) is not None}
    arrays = {f"{name}.npy": np.asarray(value, np.float32)[None] for name, value in known.items()}
    return {"__key__": record.key, record.image_type: record.image, "json": meta, **arrays}


def write_shard(records: Iterable[HandRecord], path: Path) -> int:
    """Write one shard, and its folder if missing; returns the number of hands. The same records give the same bytes.

    The file appears under `path` only when it is complete, and not at all if there are no records.
    """
    import webdataset as wds  # imports torch, which --help does not need

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    num_hand = 0
    try:
        with part.open("wb") as file, wds.TarWriter(file, mtime=0) as writer:
            for record in records:
                writer.write(to_members(record))
                num_hand += 1
        if num_hand:
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return num_hand
