"""The curves of one run, in which runs differ, and the file that keeps them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from src.config import housekeeping_keys

SEED = "GENERAL.seed"
METRIC_ORDER = ("mpjpe_cam", "mpjpe_rel", "mpjpe_pa", "mpvpe_rel", "root_error")
# "<subset of the journal>/<name>" of what is read beside the metrics
LOSS, EVAL_LOSS, DROPOUT_RATE = "train/loss_total", "train_eval/loss_total", "train/dropout_rate"


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
    metric: str  # the one that is compared, mm
    curve: dict[str, Curve]  # by "<subset>/<name>"; absent where the journal has no such row

    @property
    def val(self) -> Curve:
        """The metric on validation frames."""
        return self.curve[f"val/{self.metric}"]

    @property
    def train_eval(self) -> Curve | None:
        """The metric on the fixed training frames; None where they were not measured."""
        return self.curve.get(f"train_eval/{self.metric}")

    @property
    def seed(self) -> int | None:
        return self.config.get(SEED)

    @property
    def last_step(self) -> int:
        """The step of the last validation."""
        return int(self.val.step[-1])

    @property
    def is_finished(self) -> bool:
        return self.last_step >= self.config.get("GENERAL.total_step", 0)


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Dotted key -> its values, for each setting in which the runs differ, without seeds and housekeeping keys."""
    ignored = {SEED, *housekeeping_keys()}
    keys = sorted({key for run in runs for key in run.config} - ignored)
    found = {}
    for key in keys:
        values: list[Any] = []
        for run in runs:
            if (value := run.config.get(key)) not in values:
                values.append(value)
        if len(values) > 1:
            found[key] = values
    return found


def to_json(run: Run, common: Mapping[str, Any]) -> dict[str, Any]:
    """A run as it is kept beside a figure, five significant digits; `config` holds what is not in `common`."""
    curve = {
        name: {"step": c.step.tolist(), "value": [float(f"{v:.5g}") if math.isfinite(v) else None for v in c.value]}
        for name, c in run.curve.items()
    }
    own = {key: value for key, value in run.config.items() if key not in common}
    return {"name": run.name, "config": own, "curve": curve}


def from_json(tree: Mapping[str, Any], common: Mapping[str, Any], metric: str | None) -> Run:
    """The inverse of `to_json`, to be compared by `metric`; None is the first of METRIC_ORDER.

    Raises:
        ComparisonError: the run has no such metric.
    """
    curve = {
        name: Curve(np.array(c["step"]), np.array([math.nan if v is None else v for v in c["value"]]))
        for name, c in tree["curve"].items()
    }
    known = [name.removeprefix("val/") for name in curve if name.startswith("val/")]
    metric = metric or next(name for name in (*METRIC_ORDER, *known) if name in known)
    if metric not in known:
        raise ComparisonError(f"{tree['name']}: no {metric} was kept; choose one with --metric: {', '.join(known)}")
    return Run(tree["name"], {**common, **tree["config"]}, metric, curve)
