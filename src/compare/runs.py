"""Runs, finished or not: found, read from `metrics.jsonl` and `config.yaml` in their folders, and their differences."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from src.config import flatten, housekeeping_keys
from src.tracking.tracker import METRICS
from src.utils.files import walk_pattern

CONFIG = "config.yaml"
SEED = "GENERAL.seed"
METRIC_ORDER = ("mpjpe_cam", "mpjpe_rel", "mpjpe_pa", "mpvpe_rel", "root_error")
# curves besides the metrics: "<subset in metrics.jsonl>/<name>"
LOSS, EVAL_LOSS, DROPOUT_RATE = "train/loss_total", "train_eval/loss_total", "train/dropout_rate"


class ComparisonError(ValueError):
    """These runs cannot be compared; the message explains which, why and what to do."""


class NothingYetError(ComparisonError):
    """The run has no validation after step 0 yet."""


@dataclass(frozen=True)
class Curve:
    """Values over increasing optimizer steps; values that were not finite are NaN."""

    step: np.ndarray  # [N] int
    value: np.ndarray  # [N] float

    def between(self, first: float, last: float) -> Curve:
        """The points with first < step <= last."""
        keep = (self.step > first) & (self.step <= last)
        return Curve(self.step[keep], self.value[keep])

    def at(self, step: np.ndarray) -> np.ndarray:
        """Linear interpolation at `step` [M]: values [M], NaN outside the curve."""
        known = np.isfinite(self.value)
        if not known.any():
            return np.full(len(step), np.nan)
        return np.interp(step, self.step[known], self.value[known], left=np.nan, right=np.nan)


@dataclass(frozen=True)
class Run:
    """One run: its name, configuration and curves."""

    name: str
    config: dict[str, Any]  # dotted key -> value
    metric: str  # the compared metric, mm
    curve: dict[str, Curve]  # by "<subset>/<name>", for those in metrics.jsonl

    @property
    def val(self) -> Curve:
        """The metric on validation frames."""
        return self.curve[f"val/{self.metric}"]

    @property
    def train_eval(self) -> Curve | None:
        """The metric on the fixed training frames; None if the run did not evaluate any."""
        return self.curve.get(f"train_eval/{self.metric}")

    @property
    def seed(self) -> int | None:
        return self.config.get(SEED)

    @property
    def last_step(self) -> int:
        """The step of the last validation."""
        return int(self.val.step[-1])

    @property
    def total_step(self) -> int:
        return self.config.get("GENERAL.total_step", 0)


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Dotted key -> its values, for each setting in which the runs differ, without seeds and housekeeping keys."""
    ignored = {SEED, *housekeeping_keys()}
    keys = sorted({key for run in runs for key in run.config} - ignored)
    found: dict[str, list[Any]] = {key: [] for key in keys}
    for key, values in found.items():
        for run in runs:
            if (value := run.config.get(key)) not in values:
                values.append(value)
    return {key: values for key, values in found.items() if len(values) > 1}


def find_runs(patterns: Iterable[str]) -> list[Path]:
    """Resolve paths and globs to run folders; a folder stands for all runs below it.

    Raises:
        ComparisonError: a pattern without a run.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = sorted(walk_pattern(Path(), pattern)) or [Path(pattern)]
        runs = [run for path in paths for run in _runs_below(path)]
        if not runs:
            raise ComparisonError(_why_no_run(pattern))
        found |= dict.fromkeys(run.resolve() for run in runs)
    return list(found)


def _runs_below(path: Path) -> list[Path]:
    if (path / METRICS).is_file():
        return [path]
    return sorted(journal.parent for journal in path.rglob(METRICS)) if path.is_dir() else []


def _why_no_run(pattern: str) -> str:
    path = Path(pattern)
    if path.is_file():
        return f"{pattern}: is a file; give the run folder, which contains {METRICS}"
    if path.is_dir():
        return f"{pattern}: neither this folder nor one below it contains {METRICS}; is it a run folder?"
    parent = next(p for p in (path, *path.parents) if p.exists())
    return f"{pattern}: no such folder, and no match as a glob; the path exists up to {parent}"


def read_sides(
    sides: Mapping[str, Sequence[Path]], metric: str | None = None
) -> tuple[dict[str, list[Run]], tuple[str, ...]]:
    """Read the runs of every side; `metric` None: the first of METRIC_ORDER that all of them validated.

    Returns:
        The runs of each side, and for every skipped run (no validation yet, but its side has other runs) the reason.

    Raises:
        ComparisonError: as `read_run`, or a run is on two sides.
    """
    owner: dict[Path, str] = {}
    for name, folders in sides.items():
        for folder in folders:
            if owner.setdefault(folder, name) != name:
                raise ComparisonError(f"{folder}: is on two sides, {owner[folder]} and {name}; name it once")
    if metric is None:
        known = [_validated(_read_rows(folder / METRICS)) for folder in owner]
        common = [name for name in METRIC_ORDER if all(name in names for names in known if names)]
        metric = common[0] if common else METRIC_ORDER[0]
    read: dict[str, list[Run]] = {}
    skipped: list[str] = []
    for name, folders in sides.items():
        read[name] = []
        for folder in folders:
            try:
                read[name].append(read_run(folder, metric))
            except NothingYetError as error:
                skipped.append(str(error))
        if not read[name]:
            raise ComparisonError("\n".join(skipped))
    return read, tuple(skipped)


def _validated(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the validated metrics."""
    return sorted({name for row in rows if row.get("subset") == "val" for name in row} - {"step", "subset"})


def read_run(folder: Path, metric: str) -> Run:
    """Read one run.

    If a step is twice in metrics.jsonl (after resuming by hand), the last row counts. Truncated lines are ignored.

    Raises:
        ComparisonError: no readable configuration, or no validation of `metric` after step 0.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.load(_newest_config(folder)), resolve=False)
        config = flatten(tree)
    except Exception as error:  # whatever a torn or foreign file makes of the parser
        raise ComparisonError(f"{folder}: its {CONFIG} cannot be read ({error}); is it a run folder?") from error
    rows = _read_rows(folder / METRICS)
    names = [f"{subset}/{m}" for m in dict.fromkeys((metric, *METRIC_ORDER)) for subset in ("val", "train_eval")]
    read = {name: _curve(rows, name) for name in (*names, LOSS, EVAL_LOSS, DROPOUT_RATE)}
    run = Run(f"{folder.parent.name}/{folder.name}", config, metric, {k: c for k, c in read.items() if c is not None})
    if f"val/{metric}" not in run.curve or run.last_step <= 0:
        known = _validated(rows)
        if known and metric not in known:
            raise ComparisonError(f"{folder}: no {metric} was validated; choose one with --metric: {', '.join(known)}")
        last = max((row["step"] for row in rows), default=0)
        raise NothingYetError(f"{folder}: no validation after step 0 (it got to step {last}), nothing to compare yet")
    return run


def _newest_config(folder: Path) -> Path:
    """The latest configuration: each resume writes another one, named after the step it resumed from."""
    resumed = [path for path in folder.glob("config.resumed-*.yaml") if path.stem.rpartition("-")[2].isdigit()]
    return max(resumed, key=lambda path: int(path.stem.rpartition("-")[2]), default=folder / CONFIG)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _curve(rows: Sequence[Mapping[str, Any]], key: str) -> Curve | None:
    subset, _, name = key.partition("/")
    points = {row["step"]: float(row[name]) for row in rows if row.get("subset") == subset and name in row}
    if not points:
        return None
    step = np.array(sorted(points))
    value = np.array([points[s] for s in step.tolist()])
    return Curve(step, np.where(np.isfinite(value), value, np.nan))
