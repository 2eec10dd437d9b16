"""The closing table of a run: what was reached, against what, where it lies, and how to look at it."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

from rich.table import Table

from src.config import AimConfig
from src.tracking.tracker import FALLBACK, METRICS, read_rows

ROWS = (
    ("mpjpe_rel", "root-relative MPJPE"),
    ("mpjpe_cam", "camera-space MPJPE"),
    ("mpjpe_pa", "Procrustes MPJPE"),
    ("mpvpe_rel", "root-relative MPVPE"),
    ("root_error", "root error"),
)


def closing_table(folder: Path, seconds: float, since_step: int = 0) -> Table:
    """First and last validation in the journal of the run folder, beside the image-independent baseline.

    `seconds` passed since `since_step`, where a resumed run went on.
    """
    since = f" since step {since_step}" if since_step else ""
    rows, _ = read_rows(folder / METRICS, 0, count=sys.maxsize)
    validations = [row for row in rows if row["subset"] == "val"]
    first, last = validations[0], validations[-1]
    title = f"\nDone in {seconds:.0f} s{since}. Validation at step {first['step']} and {last['step']}, mm"
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("")
    for name in ("before", "after", "baseline", "against it"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, label in ROWS:
        if key in last:
            table.add_row(label, _mm(first.get(key)), _mm(last[key]), *_against_baseline(key, last))
    return table


def where_to_look(folder: Path, aim: AimConfig, run_name: str, is_behind: bool) -> str:
    """The run folder, the command that opens its curves, and its name in AIM. `is_behind`: `Tracker.is_behind`."""
    curves = _curves_elsewhere(folder, aim) if is_behind else _curves(aim)
    if importlib.util.find_spec("aim") is not None:
        curves += f"\nin AIM      experiment {aim.experiment}, run {run_name}"
    return f"run folder  {folder}\ncurves      {curves}"


def _mm(value: float | None) -> str:
    return "" if value is None else f"{float(value):.1f}"


def _against_baseline(key: str, last: dict) -> tuple[str, str]:
    """The baseline's value and how far the last validation is from it; empty where the data has no answer."""
    baseline = last.get(f"{key}_mean_hand")
    return (_mm(baseline), f"{100 * (last[key] / baseline - 1):+.0f} %") if baseline else ("", "")


def _curves(aim: AimConfig) -> str:
    if importlib.util.find_spec("aim") is None:
        return f"{METRICS} in the run folder (AIM has no wheel for this Python)"
    if aim.server_url is not None:
        return f"the page of the AIM server {aim.server_url}"
    return f".venv/bin/aim up --repo {aim.repo} --host 127.0.0.1   then open http://127.0.0.1:43800"


def _curves_elsewhere(folder: Path, aim: AimConfig) -> str:
    """AIM has failed: what has everything all the same, and the command that brings it where it should be."""
    target = aim.server_url or aim.repo
    sync = f"not all at {target}; bring them there with: python script/sync_aim.py {shlex.quote(str(folder))}"
    if aim.server_url is None:
        return f"{sync}\n            until then {METRICS} in the run folder has them"
    look = f".venv/bin/aim up --repo {shlex.quote(str(folder / FALLBACK))} --host 127.0.0.1"
    return f"{sync}\n            until then {look}   then open http://127.0.0.1:43800"
