"""The folder of an evaluation, and its result.json, report.md and samples.csv.

Every evaluation gets a new folder, so that nothing is overwritten. It is created once there is something to write.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from src.batch import NUM_JOINT
from src.evaluate.bootstrap import Bootstrap, Group
from src.evaluate.tables import joint_grids, metric_grid, misses_joints, num_joint, summary_grids
from src.hand.skeleton import JOINT_NAMES
from src.metric import METRICS, PCK_2D_THRESHOLDS, PCK_THRESHOLDS_MM, UNITS, Samples
from src.utils.files import write_atomic

RESULT, REPORT, SAMPLES = "result.json", "report.md", "samples.csv"


def default_output(checkpoint: Path, step: int, half: str | None, output_root: Path) -> Path:
    """`evaluation/step-<step>` in the run folder of the checkpoint, with `-half-<half>` for one half of the samples.

    For a checkpoint outside of a run folder, such as model/hand-mini:
    `<output_root>/evaluation/<folder name>/step-<step>`.
    """
    folder = checkpoint.resolve()
    if folder.parent.name == "checkpoints":
        parent = checkpoint.parent.parent / "evaluation"
    else:
        parent = output_root / "evaluation" / folder.name
    return parent / (f"step-{step}" if half is None else f"step-{step}-half-{half}")


def check_output(asked: Path | None, default: Path) -> None:
    """Fail before the network runs: raises ValueError if `--output` is not empty or the folder cannot be created."""
    if asked is not None and asked.is_dir() and any(asked.iterdir()):
        raise ValueError(f"--output {asked}: is not empty; name a new folder")
    folder = asked or default.parent
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = f"{existing} is not a writable folder; choose another with --output"
        raise ValueError(f"cannot create {asked or default}: {why}")


def write_result(
    folder: Path, subject: Mapping[str, Any], samples: Samples, groups: Sequence[Group], bootstrap: Bootstrap
) -> None:
    """Write result.json, report.md and samples.csv. `subject`: what was evaluated, the first keys of result.json."""
    _write_report(folder / REPORT, subject, groups, bootstrap)
    tree = {
        **subject,
        "num_sample": len(samples),
        "bootstrap": {**asdict(bootstrap), "interval": "2.5 % to 97.5 %"},
        "unit": {name: unit or "0..1" for name, unit in UNITS.items()},
        "pck_thresholds_mm": PCK_THRESHOLDS_MM.tolist(),
        "pck_thresholds_2d": PCK_2D_THRESHOLDS.tolist(),
        "groups": [_group_tree(group) for group in groups],
    }
    write_atomic(folder / RESULT, json.dumps(_finite(tree), indent=1) + "\n")
    _write_samples(folder / SAMPLES, samples)


def _group_tree(group: Group) -> dict[str, Any]:
    tree = asdict(group)
    tree["joint"] = {
        frame: {name: e for name, e in zip(JOINT_NAMES, estimates, strict=True) if e is not None}
        for frame, estimates in tree["joint"].items()
    }
    tree["pck_curve"] = tree.pop("curve")
    return tree


def _finite(tree: Any) -> Any:
    """JSON has no NaN or infinity: replace them by the strings `nan` and `inf`."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not np.isfinite(tree) else tree


def _write_samples(path: Path, samples: Samples) -> None:
    """One row per sample with the mean of each metric; empty where the sample does not have it."""
    names = [n for n, v in samples.metric.items() if v.total.shape[1] == 1 and v.count.sum() > 0]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["position", "source", "side", "key", *names])
        for row in range(len(samples)):
            side = "right" if samples.is_right[row] else "left"
            metrics = [(samples.metric[name].total[row, 0], samples.metric[name].count[row, 0]) for name in names]
            values = [f"{float(total) / float(count):.6g}" if count > 0 else "" for total, count in metrics]
            writer.writerow([int(samples.position[row]), samples.source[row], side, samples.key[row], *values])


def _write_report(path: Path, subject: Mapping[str, Any], groups: Sequence[Group], bootstrap: Bootstrap) -> None:
    lines = [
        f"# Evaluation of {Path(subject['checkpoint']).name} at step {subject['step']}",
        "",
        f"{groups[0].num_sample} hands of {subject['data_source']} below {subject['data_root']}"
        + (f", half {subject['half']} of the samples. " if subject["half"] else ". ")
        + legend(groups, bootstrap),
        "",
        *(grid.as_markdown() for grid in summary_grids(groups)),
    ]
    for group in groups[1:]:
        lines += [grid.as_markdown() for grid in (metric_grid(group), *joint_grids(group))]
    write_atomic(path, "\n".join(lines))


def legend(groups: Sequence[Group], bootstrap: Bootstrap) -> str:
    """The legend of the tables of `groups`."""
    lines = [
        f"In brackets: 95 % bootstrap interval, {bootstrap.num_draw} draws over {bootstrap.over}s.",
        "Metrics that the data has no labels for are absent.",
    ]
    if not any(metric.label and name in groups[0].metric for name, metric in METRICS.items()):
        lines.append(f"None of the {groups[0].num_sample} hands has labels for any metric.")
    if any("rel" in group.joint for group in groups):
        lines.append("–: the error of the wrist relative to itself.")
    known = {group.name if group.kind != "all" else "all samples": num_joint(group) for group in groups if group.joint}
    if partly := [f"{num} of {NUM_JOINT} in {name}" for name, num in known.items() if num < NUM_JOINT]:
        lines.append(f"Joints with 3D labels: {', '.join(partly)}.")
    if any(misses_joints(group) for group in groups):
        lines.append(
            "Some hands lack some joints: `over points` is the mean over all valid joints of all hands, `over joints` "
            "the mean over joints of each joint's mean, as the official evaluations of InterHand2.6M, DexYCB, FreiHAND "
            "and HO-3D compute it."
        )
    return " ".join(lines)
