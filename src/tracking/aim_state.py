"""What has arrived in AIM: `aim_state.json` in a run folder, written by the AIM child alone.

For each target: `run_hash` of the AIM run, the `offset` up to which AIM has acknowledged each journal, and `cuts_seen`,
the number of cuts in `tracker.json` that the AIM run reflects. A cut is a resume that discarded rows (tracker.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from src.tracking.tracker import CHILD_STATE, JOURNALS, file_size, read_object
from src.utils.files import write_atomic


def read_state(run_folder: Path) -> dict[str, Any]:
    """The whole file; empty if there is none yet. Without it a new AIM run is created."""
    return read_object(run_folder / CHILD_STATE)


def acknowledge(run_folder: Path, target: str, run_hash: str, offset: dict[str, int], cuts_seen: int) -> None:
    """Record that AIM at `target` has every row before `offset`. Raises OSError if the file cannot be written."""
    state = read_state(run_folder)
    state[target] = {"run_hash": run_hash, "offset": offset, "cuts_seen": cuts_seen}
    write_atomic(run_folder / CHILD_STATE, json.dumps(state, indent=1))


def acknowledged(run_folder: Path, known: dict[str, Any]) -> dict[str, int]:
    """Offset to continue each journal from; 0 if the journal is shorter than what AIM has received."""
    offset = {name: known.get("offset", {}).get(name, 0) for name in JOURNALS}
    return {name: at if at <= file_size(run_folder / name) else 0 for name, at in offset.items()}
