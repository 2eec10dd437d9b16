"""The figure of a comparison: MPJPE of validation and training frames, training loss, and the dropout rate below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from src.compare.report import Comparison, count_runs
from src.compare.runs import DROPOUT_RATE, LOSS, Run

# the last side, the baseline, is grey
BASELINE_COLOUR = "#5b6770"
COLOURS = ("#d1495b", "#1f77b4", "#2a9d5c", "#e0912f", "#7b5ea7")
_DPI = 130
_SMOOTH = 40  # the training loss is smoothed over 1/40 of the run to either side


def plot_curves(comparison: Comparison, path: Path) -> None:
    """Draw the figure: lines are means over the runs of a side, bands are +- one standard deviation."""
    figure = Figure(figsize=(9.5, 8.0), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3.2, 2.0, 1.0))
    for runs, colour in zip(comparison.side.values(), _colours(comparison), strict=True):
        _draw(axes[0], runs, f"val/{comparison.metric}", colour, "-")
        _draw(axes[0], runs, f"train_eval/{comparison.metric}", colour, "--")
        _draw(axes[1], runs, LOSS, colour, "-", smooth=True)
        _draw(axes[2], runs, DROPOUT_RATE, colour, "-", with_band=False)
    _label_metric(axes[0], comparison)
    axes[0].set_ylim(*_metric_range(comparison))
    axes[1].set_ylabel("training loss")
    axes[1].set_title("as trained, with dropout; moving mean", loc="right", fontsize=8, color="0.4")
    rates = [run.curve[DROPOUT_RATE].value.max() for run in comparison.runs if DROPOUT_RATE in run.curve]
    axes[2].set(ylabel="dropout rate", xlabel="optimizer step", ylim=(-0.05 * max([*rates, 1e-3]), None))
    for axis in axes:
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].set_xlim(0, max(run.last_step for run in comparison.runs))
    figure.savefig(path, dpi=_DPI)


def _colours(comparison: Comparison) -> list[str]:
    number = len(comparison.side) - 1
    return [COLOURS[i % len(COLOURS)] for i in range(number)] + [BASELINE_COLOUR]


def _metric_range(comparison: Comparison) -> tuple[float, float]:
    """The y range of all values after step 0, mm; the untrained network would fill most of the axis."""
    curves = [curve for run in comparison.runs for curve in (run.val, run.train_eval) if curve is not None]
    value = np.concatenate([curve.value[curve.step > 0] for curve in curves])
    value = value[np.isfinite(value)]
    if not len(value):  # every run diverged before its first validation
        return 0.0, 1.0
    low, high = value.min(), value.max()
    return low - 0.05 * (high - low) - 1e-6, high + 0.05 * (high - low) + 1e-6


def _label_metric(axis: Any, comparison: Comparison) -> None:
    """Axis label, early and late windows, and a legend: sides by colour, subsets by line style."""
    window = comparison.window
    axis.set_ylabel(f"{comparison.metric}, mm")
    for first, last, text in ((0, window.early, "early"), (window.late, window.end, "late")):
        axis.axvspan(first, last, color="0.96", zorder=0)
        axis.annotate(text, ((first + last) / 2, 1.0), (0, 3), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="center", fontsize=8, color="0.4")  # fmt: skip
    sides = zip(comparison.side.items(), _colours(comparison), strict=True)
    handles = [Line2D([], [], color=c, label=f"{name} ({count_runs(runs)})") for (name, runs), c in sides]
    handles.append(Line2D([], [], color="black", label="validation"))
    if any(run.train_eval is not None for run in comparison.runs):
        handles.append(Line2D([], [], color="black", linestyle="--", label="training frames, no dropout"))
    axis.legend(handles=handles, fontsize=8, loc="upper right")


def _draw(
    axis: Any, runs: Sequence[Run], name: str, colour: str, dash: str, with_band: bool = True, smooth: bool = False
) -> None:
    """Mean and band of one curve over the runs that have it, over their common steps."""
    curves = [run.curve[name] for run in runs if name in run.curve]
    if not curves:
        return
    first, last = max(c.step[0] for c in curves), min(c.step[-1] for c in curves)
    step = np.unique(np.concatenate([c.step for c in curves]))
    step = step[(step >= first) & (step <= last)]
    value = np.stack([c.at(step) for c in curves])  # [R, N]
    if smooth:
        value = np.stack([_moving_mean(row, max(1, len(step) // _SMOOTH)) for row in value])
    mean = value.mean(axis=0)
    axis.plot(step, mean, color=colour, linestyle=dash, linewidth=1.5)
    if with_band and len(curves) > 1:
        std = value.std(axis=0, ddof=1)
        axis.fill_between(step, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)


def _moving_mean(value: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` points to either side, fewer at the ends; ignores NaN."""
    known = np.isfinite(value)
    kernel = np.ones(2 * width + 1)
    total, count = (np.convolve(x, kernel)[width : width + len(value)] for x in (np.where(known, value, 0.0), known))
    with np.errstate(invalid="ignore"):
        return total / count
