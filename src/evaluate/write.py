"""What an evaluation leaves in its folder: result.json, report.md, samples.csv, plots and sheets of hands.

The folder is new for every evaluation, so that nothing of an older one is lost.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.evaluate.bootstrap import Bootstrap, Estimate, Group
from src.evaluate.collect import Samples
from src.evaluate.plot import plot_joint_error, plot_pck
from src.evaluate.tables import UNITS, Grid, group_grid, group_grid_2d, joint_grid, metric_grid
from src.hand.skeleton import JOINT_NAMES
from src.metric import PCK_2D_THRESHOLDS, PCK_THRESHOLDS_MM
from src.utils.files import encode_image, make_new_folder, write_atomic

RESULT, REPORT, SAMPLES = "result.json", "report.md", "samples.csv"


@dataclass(frozen=True)
class Subject:
    """What was evaluated, and on what; goes into result.json as it is."""

    checkpoint: str
    step: int
    hand_model: str
    data_root: str
    data_source: Any
    stride: int
    max_sample: int | None
    val_seed: int
    half: str | None  # of the samples; None: both
    unreadable: dict[str, int]  # reason -> frames left out


@contextmanager
def new_folder(asked: Path | None, checkpoint: Path, step: int, output_root: Path) -> Iterator[Path]:
    """A folder as `_make_folder` makes it; removed again where an error left nothing in it."""
    folder = _make_folder(asked, checkpoint, step, output_root)
    try:
        yield folder
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


def _make_folder(asked: Path | None, checkpoint: Path, step: int, output_root: Path) -> Path:
    """A new folder: the one asked for, or `evaluation/step-<step>` in the run folder of the checkpoint (`-2` and on).

    A checkpoint outside of a run folder, such as model/hand-mini, stays as it is: its evaluations go to
    `<output_root>/evaluation/<folder name>/step-<step>`.

    Raises ValueError where it cannot be made, or where the one asked for holds something already.
    """
    try:
        if asked is not None:
            asked.mkdir(parents=True, exist_ok=True)
            if any(asked.iterdir()):
                raise ValueError(f"--output {asked}: is not empty; name a new folder")
            return asked
        folder = checkpoint.resolve()
        if folder.parent.name == "checkpoints":
            parent = checkpoint.parent.parent / "evaluation"
        else:
            parent = output_root / "evaluation" / folder.name
        parent.mkdir(parents=True, exist_ok=True)
        return make_new_folder(parent, f"step-{step}")
    except OSError as error:
        where = asked or checkpoint
        raise ValueError(f"cannot make a folder at {where}: {error}; name one you may write with --output") from error


def write_result(
    folder: Path, subject: Subject, samples: Samples, groups: Sequence[Group], bootstrap: Bootstrap
) -> None:
    """The numbers: result.json, report.md and samples.csv."""
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
    """JSON knows no NaN: such a number becomes the string `nan` or `inf`, which no reader mistakes for a value."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not np.isfinite(tree) else tree


def _write_samples(path: Path, samples: Samples) -> None:
    """One line a sample: what it is and the mean of each of its metrics; empty where it has none."""
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
    """The tables a person sees: everything of all samples, a line for each group, the joints."""
    grids = (metric_grid(groups[0]), group_grid(groups), group_grid_2d(groups), joint_grid(groups[0]))
    return [grid for grid in grids if grid is not None]


def _write_report(folder: Path, subject: Subject, groups: Sequence[Group], bootstrap: Bootstrap) -> None:
    """report.md: the tables of every group, with how they came about."""
    lines = [
        f"# Evaluation of {Path(subject.checkpoint).name} at step {subject.step}",
        "",
        f"{groups[0].num_sample} hands of {subject.data_source} below {subject.data_root}"
        + (f", half {subject.half} of the samples. " if subject.half else ". ")
        + how(bootstrap),
        "",
        *(grid.as_markdown() for grid in terminal_grids(groups)),
    ]
    for group in groups[1:]:
        lines += [grid.as_markdown() for grid in (metric_grid(group), joint_grid(group)) if grid is not None]
    write_atomic(folder / REPORT, "\n".join(lines))


def how(bootstrap: Bootstrap) -> str:
    """What the brackets mean."""
    return (
        f"In brackets: 95 % bootstrap interval, {bootstrap.num_draw} draws over {bootstrap.over}s. "
        "What the data cannot answer is absent."
    )


def draw_plots(folder: Path, group: Group) -> None:
    """joint_error.png where there is 3D, pck.png where there is 3D or 2D."""
    plot_joint_error(group, folder / "joint_error.png")
    plot_pck(group, folder / "pck.png")


def write_image(path: Path, image: np.ndarray) -> None:
    """An RGB image as png."""
    path.write_bytes(encode_image(image, path.suffix))
