"""The curves of finished or unfinished runs, read from `metrics.jsonl` and `config.yaml` of their folders."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from omegaconf import OmegaConf

from src.engine.tracker import METRICS

CONFIG = "config.yaml"
SEED = "GENERAL.seed"
METRIC_ORDER = ("mpjpe_cam", "mpjpe_rel", "mpjpe_pa", "mpvpe_rel", "root_error")
# subset of the journal, name ({} is the metric that is compared), name here
_CURVES = (
    ("val", "{}", "val"),
    ("train_eval", "{}", "train_eval"),
    ("train_eval", "loss_total", "train_eval_loss"),
    ("train", "loss_total", "train_loss"),
    ("train", "dropout_rate", "dropout_rate"),
)
# keys in which runs may differ without being another experiment
_HOUSEKEEPING = ("GENERAL.output_root", "GENERAL.resume_path", "GENERAL.description", "GENERAL.num_worker",
                 "GENERAL.prefetch_factor", "GENERAL.keep_checkpoint", "DATA.root", "DATA.index_dir",
                 "AIM.")  # fmt: skip


class ComparisonError(ValueError):
    """These runs cannot be compared; the message says which, why and what to do."""


class NothingYetError(ComparisonError):
    """The run has not been validated after step 0."""


@dataclass(frozen=True)
class Curve:
    """Values over optimizer steps, steps rising; a value that was not finite is NaN."""

    step: np.ndarray  # [N] int
    value: np.ndarray  # [N] float

    def between(self, first: float, last: float) -> Curve:
        """The points with first < step <= last."""
        keep = (self.step > first) & (self.step <= last)
        return Curve(self.step[keep], self.value[keep])

    def at(self, step: np.ndarray) -> np.ndarray:
        """Values [M] at `step` [M], linear between points, NaN outside of them."""
        known = np.isfinite(self.value)
        if not known.any():
            return np.full(len(step), np.nan)
        return np.interp(step, self.step[known], self.value[known], left=np.nan, right=np.nan)


@dataclass(frozen=True)
class Run:
    """One run: where it was read from, what it was told to do, and what it measured."""

    name: str
    config: dict[str, Any]  # dotted key -> value
    metric: str  # what `val` and `train_eval` are, mm
    curve: dict[str, Curve]  # absent where the journal has no such row

    @property
    def seed(self) -> int | None:
        return self.config.get(SEED)

    @property
    def last_step(self) -> int:
        """The step of the last validation."""
        return int(self.curve["val"].step[-1])

    @property
    def is_finished(self) -> bool:
        return self.last_step >= self.config.get("GENERAL.total_step", 0)


def find_runs(patterns: Iterable[str]) -> list[Path]:
    """The run folders that paths and globs mean: a run folder, or a folder with runs anywhere below it.

    Raises:
        ComparisonError: for a pattern that leads to no run.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))] or [Path(pattern)]
        runs = [run for path in paths for run in _runs_below(path)]
        if not runs:
            raise ComparisonError(_why_no_run(pattern))
        found |= dict.fromkeys(run.resolve() for run in runs)
    return list(found)


def _runs_below(path: Path) -> list[Path]:
    if (path / METRICS).is_file():
        return [path]
    if path.is_file() or not path.is_dir():
        return []
    return sorted(journal.parent for journal in path.rglob(METRICS))


def _why_no_run(pattern: str) -> str:
    path = Path(pattern)
    if path.is_file():
        return f"{pattern}: is a file; give the run folder, which holds {METRICS}"
    if path.is_dir():
        return f"{pattern}: neither this folder nor one below it holds a {METRICS}; is it a run folder?"
    parent = next(p for p in (path, *path.parents) if p.exists())
    return f"{pattern}: there is no such folder, and no folder fits it as a glob; {parent} is as far as it exists"


def read_sides(
    sides: Mapping[str, Sequence[Path]], metric: str | None = None
) -> tuple[dict[str, list[Run]], tuple[str, ...]]:
    """Read the runs of every side; `metric` None takes the first of METRIC_ORDER that all of them validated.

    Returns:
        The runs, and the reasons why some are left out: of several runs of a side those that validated nothing yet.

    Raises:
        ComparisonError: as `read_run`; or for a run on two sides.
    """
    owner: dict[Path, str] = {}
    for name, folders in sides.items():
        for folder in folders:
            if owner.setdefault(folder, name) != name:
                raise ComparisonError(f"{folder}: stands on two sides, {owner[folder]} and {name}; name it once")
    if metric is None:
        known = [_validated(_read_rows(folder / METRICS)) for folder in owner]
        common = [name for name in METRIC_ORDER if all(name in names for names in known if names)]
        metric = common[0] if common else METRIC_ORDER[0]
    read: dict[str, list[Run]] = {}
    left_out: list[str] = []
    for name, folders in sides.items():
        read[name] = []
        for folder in folders:
            try:
                read[name].append(read_run(folder, metric))
            except NothingYetError as error:
                left_out.append(str(error))
        if not read[name]:
            raise ComparisonError("\n".join(left_out))
    return read, tuple(left_out)


def _validated(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of what was validated."""
    return sorted({name for row in rows if row.get("subset") == "val" for name in row} - {"step", "subset"})


def read_run(folder: Path, metric: str) -> Run:
    """Read one run.

    A step that stands twice in the journal (of a run that was resumed by hand) counts as it was measured last, and a
    line cut off by a crash is passed over.

    Raises:
        ComparisonError: no readable configuration or no validation of `metric` after step 0.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.load(_newest_config(folder)), resolve=False)
        config = dict(_leaves(tree))
    except Exception as error:  # whatever a torn or foreign file makes of the parser
        raise ComparisonError(f"{folder}: its {CONFIG} cannot be read ({error}); is it a run folder?") from error
    rows = _read_rows(folder / METRICS)
    curve = {}
    for subset, pattern, name in _CURVES:
        if (read := _curve(rows, subset, pattern.format(metric))) is not None:
            curve[name] = read
    if "val" not in curve or curve["val"].step[-1] <= 0:
        _refuse_without_validation(folder, rows, metric)
    return Run(f"{folder.parent.name}/{folder.name}", config, metric, curve)


def _newest_config(folder: Path) -> Path:
    """The configuration that was in force last: a resumed run leaves another one, with the step it went on from."""
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


def _curve(rows: Sequence[Mapping[str, Any]], subset: str, name: str) -> Curve | None:
    points = {row["step"]: float(row[name]) for row in rows if row.get("subset") == subset and name in row}
    if not points:
        return None
    step = np.array(sorted(points))
    value = np.array([points[s] for s in step.tolist()])
    return Curve(step, np.where(np.isfinite(value), value, np.nan))


def _refuse_without_validation(folder: Path, rows: Sequence[Mapping[str, Any]], metric: str) -> NoReturn:
    known = _validated(rows)
    if known and metric not in known:
        raise ComparisonError(f"{folder}: no {metric} was validated; choose one with --metric: {', '.join(known)}")
    last = max((row["step"] for row in rows), default=0)
    raise NothingYetError(f"{folder}: no validation after step 0 (it got to step {last}), nothing to compare yet")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Dotted key -> the values it has, for keys that are not the same in all runs; seeds and housekeeping left out."""
    keys = sorted({key for run in runs for key in run.config})
    found = {}
    for key in keys:
        values: list[Any] = []
        for run in runs:
            if (value := run.config.get(key)) not in values:
                values.append(value)
        if len(values) > 1 and key != SEED and not key.startswith(_HOUSEKEEPING):
            found[key] = values
    return found


def to_json(run: Run, common: Mapping[str, Any]) -> dict[str, Any]:
    """A run as it is kept beside a figure, five significant digits; `config` holds what is not in `common`."""
    curve = {
        name: {"step": c.step.tolist(), "value": [float(f"{v:.5g}") if math.isfinite(v) else None for v in c.value]}
        for name, c in run.curve.items()
    }
    own = {key: value for key, value in run.config.items() if key not in common}
    return {"name": run.name, "metric": run.metric, "config": own, "curve": curve}


def from_json(tree: Mapping[str, Any], common: Mapping[str, Any]) -> Run:
    """The inverse of `to_json`."""
    curve = {
        name: Curve(np.array(c["step"]), np.array([math.nan if v is None else v for v in c["value"]]))
        for name, c in tree["curve"].items()
    }
    return Run(tree["name"], {**common, **tree["config"]}, tree["metric"], curve)
