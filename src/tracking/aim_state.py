"""What has arrived in AIM: `aim_state.json` of a run folder, written by the child alone.

Per target: `run_hash` of the AIM run, the `offset` of each journal that AIM has acknowledged, and `cuts_seen`, how many
of the cuts in `tracker.json` the AIM run knows of. A cut is a resume that threw rows away (src/tracking/tracker.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from src.tracking.tracker import CHILD_STATE, JOURNALS, read_object
from src.utils.files import write_atomic


def read_state(run_folder: Path) -> dict[str, Any]:
    """The whole file; empty where there is none yet. Without it the run gets a new AIM run."""
    return read_object(run_folder / CHILD_STATE)


def acknowledge(run_folder: Path, target: str, run_hash: str, offset: dict[str, int], cuts_seen: int) -> None:
    """Remember that AIM at `target` has every row before `offset`. Raises OSError where the disk refuses."""
    state = read_state(run_folder)
    state[target] = {"run_hash": run_hash, "offset": offset, "cuts_seen": cuts_seen}
    write_atomic(run_folder / CHILD_STATE, json.dumps(state, indent=1))


def has_discarded_rows(known: dict[str, Any], cuts: list[dict[str, int]]) -> bool:
    """Whether AIM may hold rows that a resume has thrown away since.

    Args: known: the target's entry, empty for none. cuts: those of `tracker.json`.
    """
    return bool(known) and len(cuts) > known["cuts_seen"]


def acknowledged(run_folder: Path, known: dict[str, Any]) -> dict[str, int]:
    """Offset of each journal to go on from; 0 where the journal is shorter than what AIM has seen of it."""
    offset = {name: known.get("offset", {}).get(name, 0) for name in JOURNALS}
    return {name: at if at <= size(run_folder / name) else 0 for name, at in offset.items()}


def size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0
