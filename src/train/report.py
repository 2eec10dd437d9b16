"""What a run prints about itself: hand, network and dropout at the start, results and where to find them at the end."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path

from accelerate import Accelerator
from rich.table import Table
from torch import nn

from src.config import AimConfig, Config
from src.hand.skeleton import HandArrays
from src.model.net import PoseNet
from src.tracking.tracker import FALLBACK, METRICS, read_rows
from src.utils.table import Grid

ROWS = (
    ("mpjpe_rel", "root-relative MPJPE"),
    ("mpjpe_cam", "camera-space MPJPE"),
    ("mpjpe_pa", "Procrustes MPJPE"),
    ("mpvpe_rel", "root-relative MPVPE"),
    ("root_error", "root error"),
)


def describe_hand(hand: HandArrays) -> str:
    """One line on the hand model."""
    kind = "the hand that ships, not MANO" if hand.name == "standin" else "MANO"
    return f"hand model: {hand.name} ({kind}), {len(hand.v_template)} vertices, {len(hand.faces)} faces"


def describe_network(net: PoseNet, accelerator: Accelerator) -> str:
    """One line on the network's size, the devices and the precision."""

    def millions(module: nn.Module) -> str:
        return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"

    return (
        f"network: backbone {millions(net.backbone)}, decoder {millions(net.decoder)} parameters; "
        f"{accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}"
    )


def describe_dropout(cfg: Config) -> str | None:
    """A note if the dropout gate never opens, which a short trial run may not intend; else None."""
    general = cfg.GENERAL
    if cfg.MODEL.handec.dropout == 0 or general.dropout_warmup_step < general.total_step:
        return None
    return (
        f"dropout stays 0 in this run: GENERAL.dropout_warmup_step={general.dropout_warmup_step} is not reached in "
        f"GENERAL.total_step={general.total_step}"
    )


def closing_table(folder: Path, seconds: float, start_step: int = 0) -> Table:
    """First and last validation in the journal of the run folder, beside the image-independent baseline.

    `seconds`: duration since `start_step`, where this process started or resumed.
    """
    since = f" since step {start_step}" if start_step else ""
    rows, _ = read_rows(folder / METRICS, 0, count=sys.maxsize)
    validations = [row for row in rows if row["subset"] == "val"]
    first, last = validations[0], validations[-1]
    title = f"\nDone in {seconds:.0f} s{since}. Validation at step {first['step']} and {last['step']}, mm"
    rows = [
        (label, _mm(first.get(key)), _mm(last[key]), *_against_baseline(key, last))
        for key, label in ROWS
        if key in last
    ]
    return Grid(title, ("", "before", "after", "baseline", "against it"), rows).as_rich()


def where_to_look(folder: Path, aim: AimConfig, run_name: str, is_behind: bool) -> str:
    """The run folder, the command that opens its curves, and its name in AIM. `is_behind`: `Tracker.is_behind`."""
    curves = _curves_elsewhere(folder, aim) if is_behind else _curves(aim)
    if importlib.util.find_spec("aim") is not None:
        curves += f"\nin AIM      experiment {aim.experiment}, run {run_name}"
    return f"run folder  {folder}\ncurves      {curves}"


def _mm(value: float | None) -> str:
    return "" if value is None else f"{float(value):.1f}"


def _against_baseline(key: str, last: dict) -> tuple[str, str]:
    """The baseline's value and the last validation's distance from it; empty if the data does not give a baseline."""
    baseline = last.get(f"{key}_mean_hand")
    return (_mm(baseline), f"{100 * (last[key] / baseline - 1):+.0f} %") if baseline else ("", "")


def _curves(aim: AimConfig) -> str:
    if importlib.util.find_spec("aim") is None:
        reason = " and has no wheel for this Python" if sys.version_info >= (3, 13) else ""
        return f"{METRICS} in the run folder (AIM is not installed{reason})"
    if aim.server_url is not None:
        return f"the page of the AIM server {aim.server_url}"
    return f".venv/bin/aim up --repo {aim.repo} --host 127.0.0.1   then open http://127.0.0.1:43800"


def _curves_elsewhere(folder: Path, aim: AimConfig) -> str:
    """Where the metrics are after AIM has failed, and the command that uploads them."""
    target = aim.server_url or aim.repo
    sync = f"incomplete at {target}; upload the rest with: python script/sync_aim.py {shlex.quote(str(folder))}"
    if aim.server_url is None:
        return f"{sync}\n            until then see {METRICS} in the run folder"
    look = f".venv/bin/aim up --repo {shlex.quote(str(folder / FALLBACK))} --host 127.0.0.1"
    return f"{sync}\n            until then {look}   then open http://127.0.0.1:43800"
