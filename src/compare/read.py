"""Find runs, finished or not, and read `metrics.jsonl` and `config.yaml` of their folders."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from omegaconf import OmegaConf

from src.compare.runs import (
    DROPOUT_RATE,
    EVAL_LOSS,
    LOSS,
    METRIC_ORDER,
    ComparisonError,
    Curve,
    NothingYetError,
    Run,
)
from src.config import flatten
from src.tracking.tracker import METRICS

CONFIG = "config.yaml"


def find_runs(patterns: Iterable[str]) -> list[Path]:
    """Resolve paths and globs to run folders; a folder stands for all runs below it.

    Raises:
        ComparisonError: a pattern without a run.
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
        _refuse_without_validation(folder, rows, metric)
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


def _refuse_without_validation(folder: Path, rows: Sequence[Mapping[str, Any]], metric: str) -> NoReturn:
    known = _validated(rows)
    if known and metric not in known:
        raise ComparisonError(f"{folder}: no {metric} was validated; choose one with --metric: {', '.join(known)}")
    last = max((row["step"] for row in rows), default=0)
    raise NothingYetError(f"{folder}: no validation after step 0 (it got to step {last}), nothing to compare yet")
