"""Writes hands of any data set as shards in the native format: ordinary image and array members, no pickle.

One tar sample is one hand in one image: `{key}.jpg` (the encoded bytes as they came), `{key}.json`, and a `.npy` per
known field with a leading T = 1. What is not known is left out. Stock `wds.WebDataset(...).decode("rgb")` reads it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HandRecord:
    """One annotated hand; arrays without the leading T, units and frames as in src/batch.py. None: not known."""

    key: str  # without dots: they end the key
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
    hand_model: str | None = None  # whose parameters mano_pose and mano_shape are
    flat_hand_mean: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # goes into the json, e.g. image_path, additional_desc


@dataclass(frozen=True)
class ConvertSummary:
    """What a converter wrote, and what it left out by reason."""

    num_hand: int
    num_shard: int
    skipped: dict[str, int] = field(default_factory=dict)
    note: tuple[str, ...] = ()  # lines for people: what was proved, what was left out and why


_ARRAYS = (
    "hand_bbox",
    "joint_img",
    "joint_2d_valid",
    "joint_cam",
    "joint_3d_valid",
    "mano_pose",
    "mano_shape",
    "focal",
    "princpt",
)


def to_members(record: HandRecord) -> dict[str, Any]:
    """The record as webdataset writes it: bytes, json and arrays [1, ...] by suffix."""
    assert "." not in record.key, record.key
    known = {name: value for name in _ARRAYS if (value := getattr(record, name)) is not None}
    meta: dict[str, Any] = {
        "handedness": record.handedness,
        "data_source": record.data_source,
        "intr_type": "real" if record.focal is not None else "none",
        "has_mano": [int(record.mano_pose is not None)],
        "has_intr": [int(record.focal is not None)],
        **record.extra,
    }
    if record.mano_pose is not None:
        assert None not in (record.hand_model, record.flat_hand_mean), record.key
        meta |= {"hand_model": record.hand_model, "flat_hand_mean": record.flat_hand_mean}
    arrays = {f"{name}.npy": np.asarray(value, np.float32)[None] for name, value in known.items()}
    return {"__key__": record.key, record.image_type: record.image, "json": meta, **arrays}


def write_shard(records: Iterable[HandRecord], path: Path) -> int:
    """Write one shard; returns its number of hands. It stands under `path` only when it is complete, and not at all
    where there is no record. The same records give the same bytes."""
    import webdataset as wds  # brings torch along: not for --help

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


def write_shards(records: Iterable[HandRecord], output: Path, num_per_shard: int = 2000) -> ConvertSummary:
    """Write `output/000000.tar`, ... in order. The same records give the same bytes.

    Shards appear in `output` when all are complete; until then they lie in `output/.partial`.
    """
    import webdataset as wds

    partial = output / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    num_hand = 0
    with wds.ShardWriter(str(partial / "%06d.tar"), maxcount=num_per_shard, verbose=0, mtime=0) as writer:
        for record in records:
            writer.write(to_members(record))
            num_hand += 1
    shards = sorted(partial.glob("*.tar"))
    for shard in shards:
        shard.replace(output / shard.name)
    partial.rmdir()
    return ConvertSummary(num_hand, len(shards))
