"""One run: its configuration and curves, and how the configurations of runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from src.config import housekeeping_keys

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

    @property
    def is_finished(self) -> bool:
        return self.last_step >= self.total_step


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
