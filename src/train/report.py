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
_MIN_BASELINE_MM = 0.05  # a smaller one, as of hands in one place, is shown as 0.0


def describe_network(net: PoseNet, hand: HandArrays, accelerator: Accelerator) -> str:
    """A line on the hand model, and one on the network's size, the devices and the precision."""

    def millions(module: nn.Module) -> str:
        return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"

    kind = "the hand that ships, not MANO" if hand.name == "standin" else "MANO"
    return (
        f"hand model: {hand.name} ({kind}), {len(hand.v_template)} vertices, {len(hand.faces)} faces\n"
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

    `seconds`: duration since `start_step`, where this process started or resumed. With a single validation, as in a
    short branch of another run, there is no column `before`.
    """
    since = f" since step {start_step}" if start_step else ""
    rows, _ = read_rows(folder / METRICS, 0, count=sys.maxsize)
    validations = [row for row in rows if row["subset"] == "val"]
    *earlier, last = validations
    first = earlier[0] if earlier else {}
    steps = f"{first['step']} and {last['step']}" if first else f"{last['step']}"
    in_mm = [(key, label) for key, label in ROWS if key in last]
    title = f"\nDone in {seconds:.0f} s{since}. Validation at step {steps}" + (", mm" if in_mm else "")
    rows = []
    for key, label in in_mm or [("loss_total", "loss")]:  # data without 3D labels
        baseline = last.get(f"{key}_mean_hand")
        has_error = baseline is not None and float(baseline) >= _MIN_BASELINE_MM
        against = f"{100 * (float(last[key]) / float(baseline) - 1):+.0f} %" if has_error else ""
        values = ("" if value is None else f"{float(value):.1f}" for value in (first.get(key), last[key], baseline))
        rows.append((label, *values, against))
    return Grid(title, ("", "before", "after", "baseline", "vs. baseline"), rows).as_rich()


def where_to_look(folder: Path, aim: AimConfig, run_name: str, is_behind: bool) -> str:
    """The run folder, the command that opens its curves, and its name in AIM. `is_behind`: `Tracker.is_behind`."""
    has_aim = importlib.util.find_spec("aim") is not None
    page = ".venv/bin/aim up --repo {} --host 127.0.0.1   then open http://127.0.0.1:43800"
    if is_behind:
        sync = f"python script/sync_aim.py {shlex.quote(str(folder))}"
        until = f"see {METRICS} in the run folder"
        if aim.server_url is not None:
            until = page.format(shlex.quote(str(folder / FALLBACK)))
        target = aim.server_url or aim.repo
        curves = f"incomplete at {target}; upload the rest with: {sync}\n            until then {until}"
    elif not has_aim:
        reason = " and has no wheel for this Python" if sys.version_info >= (3, 13) else ""
        curves = f"{METRICS} in the run folder (AIM is not installed{reason})"
    else:
        curves = f"the page of the AIM server {aim.server_url}" if aim.server_url else page.format(aim.repo)
    if has_aim:
        curves += f"\nin AIM      experiment {aim.experiment}, run {run_name}"
    return f"run folder  {folder}\ncurves      {curves}"
