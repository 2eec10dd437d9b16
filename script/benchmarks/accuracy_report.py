"""What the cells of `script/bench.py accuracy` say: mean and spread over the seeds, ours against the better peer."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from script.benchmarks.measurement import Figure

METHODS = ("ours", "hamer", "csvit")
METRICS = ("mpjpe_rel", "mpjpe_pa", "mpjpe_cam")
MOST_OF_BETTER_PEER = {"mpjpe_rel": 0.85, "mpjpe_pa": 0.85, "mpjpe_cam": 0.7}
COLUMNS = ("pretrain", "step", "method", "variant", "lr", "backbone lr", "seeds", *METRICS, "seconds a cell")


def read_cells(file: Path) -> dict[str, Any]:
    """The cells of a results file by the digest of their settings; none where there is no file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def report(cells: Sequence[dict[str, Any]]) -> list[Figure]:
    """Mean and spread of each method and metric over the seeds, and ours over the better peer."""
    value = {
        method: {m: [c["metrics"][m] for c in cells if c["settings"]["method"] == method] for m in METRICS}
        for method in METHODS
        if any(c["settings"]["method"] == method for c in cells)
    }
    figures = []
    for metric in METRICS:
        for method, of in value.items():
            spread = f"{min(of[metric]):.2f} to {max(of[metric]):.2f} over {len(of[metric])} seeds"
            if len(of[metric]) > 1:
                spread = f"sd {statistics.stdev(of[metric]):.2f}, {spread}"
            figures.append(Figure(f"{metric}, {method}", statistics.mean(of[metric]), "mm", note=spread))
        peers = {method: statistics.mean(of[metric]) for method, of in value.items() if method != "ours"}
        if peers and "ours" in value:
            better = min(peers, key=peers.__getitem__)
            ratio = statistics.mean(value["ours"][metric]) / peers[better]
            name = f"{metric}, ours over the better peer"
            figures.append(Figure(name, ratio, "", at_most=MOST_OF_BETTER_PEER[metric], note=better))
    return figures


def markdown_table(cells: Sequence[dict[str, Any]]) -> str:
    """All cells, those that differ in their seed alone in one row: mm, mean ± standard deviation over the seeds."""
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        rows.setdefault(_row_of(cell["settings"]), []).append(cell)
    order = sorted(rows, key=lambda row: (-row[0], -row[1], METHODS.index(row[2]), *row[3:]))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in order:
        seeds = ", ".join(str(seed) for seed in sorted(cell["settings"]["seed"] for cell in rows[row]))
        errors = [_mean_and_spread([cell["metrics"][metric] for cell in rows[row]]) for metric in METRICS]
        seconds = [round(cell["seconds"]) for cell in rows[row]]
        took = f"{min(seconds)} to {max(seconds)}" if len(seconds) > 1 else str(seconds[0])
        *what, lr, backbone_lr = row
        cols = [*(str(value) for value in what), f"{lr:g}", f"{backbone_lr:g}", seeds, *errors, took]
        lines.append("| " + " | ".join(cols) + " |")
    return "\n".join(lines)


def _row_of(settings: dict[str, Any]) -> tuple[Any, ...]:
    """What decides a row: pre-training and training steps, method, variant, learning rates."""
    lr, pretrain = settings["lr"], settings.get("pretrain", 0)
    return pretrain, settings["step"], settings["method"], settings["name"].strip(), lr, settings.get("backbone_lr", lr)


def _mean_and_spread(value: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(value):.2f}" if len(value) > 1 else ""
    return f"{statistics.mean(value):.2f}{spread}"
