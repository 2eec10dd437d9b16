"""Results of `script/bench.py accuracy`: mean and spread over the seeds, ours against the better peer."""

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
COLUMNS = ("step", "method", "variant", "lr", "backbone lr", "seeds", *METRICS, "seconds a cell")


def read_cells(file: Path) -> dict[str, Any]:
    """The cells of a results file by the digest of their settings; {} without a file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def report(cells: Sequence[dict[str, Any]]) -> list[Figure]:
    """Mean and spread of each method and metric over the seeds, and the ratio of ours to the better peer."""
    figures = []
    for metric in METRICS:
        mean = {}
        for method in METHODS:
            value = [cell["metrics"][metric] for cell in cells if cell["settings"]["method"] == method]
            if not value:
                continue
            mean[method] = statistics.mean(value)
            spread = f"{min(value):.2f} to {max(value):.2f} over {len(value)} seeds"
            if len(value) > 1:
                spread = f"sd {statistics.stdev(value):.2f}, {spread}"
            figures.append(Figure(f"{metric}, {method}", mean[method], "mm", note=spread))
        peers = {method: error for method, error in mean.items() if method != "ours"}
        if peers and "ours" in mean:
            better = min(peers, key=peers.__getitem__)
            ratio = mean["ours"] / peers[better]
            name = f"{metric}, ours over the better peer"
            figures.append(Figure(name, ratio, "", at_most=MOST_OF_BETTER_PEER[metric], note=better))
    return figures


def markdown_table(cells: Sequence[dict[str, Any]]) -> str:
    """One row for all cells that differ only in their seed: mm, mean ± standard deviation over the seeds.

    Rows that would otherwise be identical list the settings that differ, for example the digest of the weights.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        what = {key: value for key, value in cell["settings"].items() if key != "seed"}
        rows.setdefault(json.dumps(what, sort_keys=True), []).append(cell)
    every = [row[0]["settings"] for row in rows.values()]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in sorted(rows.values(), key=lambda row: _order(row[0]["settings"])):
        settings = row[0]["settings"]
        alike = [other for other in every if _order(other) == _order(settings)]
        differing = [key for key in settings if key != "seed" and any(o.get(key) != settings[key] for o in alike)]
        variant = ", ".join(filter(None, [settings["name"].strip(), *(f"{key} {settings[key]}" for key in differing)]))
        seeds = ", ".join(str(seed) for seed in sorted(cell["settings"]["seed"] for cell in row))
        errors = [_mean_and_spread([cell["metrics"][metric] for cell in row]) for metric in METRICS]
        seconds = [round(cell["seconds"]) for cell in row]
        took = f"{min(seconds)} to {max(seconds)}" if len(seconds) > 1 else str(seconds[0])
        rates = [f"{settings[rate]:g}" for rate in ("lr", "backbone_lr")]
        what = [str(settings["step"]), settings["method"], variant]
        lines.append("| " + " | ".join([*what, *rates, seeds, *errors, took]) + " |")
    return "\n".join(lines)


def _order(settings: dict[str, Any]) -> tuple[Any, ...]:
    """Sort key of a row: its columns, most steps first."""
    method = METHODS.index(settings["method"])
    return -settings["step"], method, settings["name"].strip(), settings["lr"], settings["backbone_lr"]


def _mean_and_spread(value: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(value):.2f}" if len(value) > 1 else ""
    return f"{statistics.mean(value):.2f}{spread}"
