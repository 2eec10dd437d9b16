"""The project's folder of real photographs (`shared/realhands`, see its README.md) -> native shards.

157 hands of five sources, 2D only or 3D, both sides, no MANO parameters. Units, joint order and frames are already
this project's. An image with two hands becomes two samples. The encoded images are copied unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from src.data.convert.chunk import ConvertSummary, Progress, Request
from src.data.shards.writer import HandRecord, write_shard

SPLITS = ("all", "freihand", "hand_graph_cnn", "interhand2.6m", "rhd", "taco")


def convert_realhands(request: Request, progress: Progress | None = None) -> ConvertSummary:
    """Convert the hands listed in `annotations.json`, all of them or those of the source that `split` names.

    Raises:
        ValueError: the input folder has no annotations.json.
    """
    root, listing = request.input, request.input / "annotations.json"
    if not listing.is_file():
        raise ValueError(f"--input {root}: contains no annotations.json; pass the folder `realhands`")
    entries = json.loads(listing.read_text(encoding="utf-8"))
    entries = [entry for entry in entries if request.split in ("all", entry["source"])]
    return ConvertSummary(write_shard(_records(root, entries, progress), request.output / "000000.tar"), num_shard=1)


def _records(root: Path, entries: list[dict[str, Any]], progress: Progress | None) -> Iterator[HandRecord]:
    for done, entry in enumerate(entries, 1):
        yield _record(root, entry)
        if progress:
            progress(done, len(entries))


def _record(root: Path, entry: dict[str, Any]) -> HandRecord:
    path, valid = Path(entry["image"]), np.asarray(entry["joint_valid"])
    has_3d = entry["joint_cam"] is not None
    return HandRecord(
        key=f"{path.stem}_{entry['handedness']}",
        image=(root / path).read_bytes(),
        image_type=path.suffix[1:].lower(),
        handedness=entry["handedness"],
        data_source=entry["source"],
        hand_bbox=entry["bbox"],
        joint_img=entry["joint_img"],
        joint_2d_valid=valid,
        joint_cam=entry["joint_cam"],
        joint_3d_valid=valid if has_3d else None,
        focal=entry["focal"],
        princpt=entry["princpt"],
        extra={"image_path": entry["image"], "license": entry["license"], "synthetic": entry["synthetic"]},
    )
