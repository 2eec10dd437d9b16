"""Write the folder of an evaluation: result.json, report.md, samples.csv, plots and sheets of hands.

Every evaluation gets a new folder, so that nothing is overwritten. It is created once there is something to write.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.evaluate.bootstrap import Bootstrap, Estimate, Group
from src.evaluate.plot import plot_joint_error, plot_pck
from src.evaluate.tables import group_grid, group_grid_2d, joint_grid, metric_grid
from src.hand.skeleton import JOINT_NAMES
from src.metric import PCK_2D_THRESHOLDS, PCK_THRESHOLDS_MM, UNITS, Samples
from src.utils.files import encode_image, make_new_folder, write_atomic
from src.utils.table import Grid

RESULT, REPORT, SAMPLES = "result.json", "report.md", "samples.csv"


@dataclass(frozen=True)
class Subject:
    """What was evaluated, on which data; its fields are keys of result.json."""

    checkpoint: str
    step: int
    hand_model: str
    data_root: str
    data_source: Any
    stride: int
    max_sample: int | None
    val_seed: int
    half: str | None  # None: all samples
    unreadable: dict[str, int]  # reason -> number of skipped frames


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
        raise ValueError(_cannot_create(asked or default, f"{existing} is not a writable folder"))


def make_output(asked: Path | None, default: Path) -> Path:
    """Create `asked`, or `default` (`-2`, `-3`, ... if it exists). Raises ValueError."""
    try:
        if asked is not None:
            asked.mkdir(parents=True, exist_ok=True)
            return asked
        default.parent.mkdir(parents=True, exist_ok=True)
        return make_new_folder(default.parent, default.name)
    except OSError as error:
        raise ValueError(_cannot_create(asked or default, str(error))) from error


def _cannot_create(folder: Path, why: str) -> str:
    return f"cannot create {folder}: {why}; choose a writable folder with --output"


def write_result(
    folder: Path, subject: Subject, samples: Samples, groups: Sequence[Group], bootstrap: Bootstrap
) -> None:
    """Write result.json, report.md and samples.csv."""
    _write_report(folder, subject, groups, bootstrap)
    tree = {
        **asdict(subject),
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
    def tree(estimate: Estimate | None) -> dict[str, Any] | None:
        return None if estimate is None else asdict(estimate)

    joint = {
        frame: {name: tree(e) for name, e in zip(JOINT_NAMES, estimates, strict=True) if e is not None}
        for frame, estimates in group.joint.items()
    }
    metric = {name: tree(estimate) for name, estimate in group.metric.items()}
    head = {"kind": group.kind, "name": group.name, "num_sample": group.num_sample}
    return {**head, "metric": metric, "joint": joint, "pck_curve": group.curve}


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
            values = [_mean(samples, name, row) for name in names]
            writer.writerow([int(samples.position[row]), samples.source[row], side, samples.key[row], *values])


def _mean(samples: Samples, name: str, row: int) -> str:
    total, count = samples.metric[name].total[row, 0], samples.metric[name].count[row, 0]
    return f"{total / count:.6g}" if count > 0 else ""


def terminal_grids(groups: Sequence[Group]) -> list[Grid]:
    """The tables for the terminal: all metrics of all samples, one row per group, the joints."""
    grids = (metric_grid(groups[0]), group_grid(groups), group_grid_2d(groups), joint_grid(groups[0]))
    return [grid for grid in grids if grid is not None]


def _write_report(folder: Path, subject: Subject, groups: Sequence[Group], bootstrap: Bootstrap) -> None:
    """Write report.md: the tables of every group, what was evaluated and how the intervals were computed."""
    lines = [
        f"# Evaluation of {Path(subject.checkpoint).name} at step {subject.step}",
        "",
        f"{groups[0].num_sample} hands of {subject.data_source} below {subject.data_root}"
        + (f", half {subject.half} of the samples. " if subject.half else ". ")
        + describe_intervals(bootstrap),
        "",
        *(grid.as_markdown() for grid in terminal_grids(groups)),
    ]
    for group in groups[1:]:
        lines += [grid.as_markdown() for grid in (metric_grid(group), joint_grid(group)) if grid is not None]
    write_atomic(folder / REPORT, "\n".join(lines))


def describe_intervals(bootstrap: Bootstrap) -> str:
    """The legend of the tables."""
    return (
        f"In brackets: 95 % bootstrap interval, {bootstrap.num_draw} draws over {bootstrap.over}s. "
        "Metrics that the data has no labels for are absent."
    )


def draw_plots(folder: Path, group: Group) -> None:
    """Draw joint_error.png (needs 3D labels) and pck.png (3D or 2D)."""
    plot_joint_error(group, folder / "joint_error.png")
    plot_pck(group, folder / "pck.png")


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an RGB image as PNG."""
    path.write_bytes(encode_image(image, path.suffix))
