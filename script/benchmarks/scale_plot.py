"""The plot of `script/bench.py scale`: one log-log panel per series, with its exponent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Series:
    """One quantity at several sizes."""

    name: str
    of: str  # what grows
    size: list[float]
    value: list[float]
    unit: str
    note: str = ""

    @property
    def exponent(self) -> float:
        """b of value = a size^b, by least squares of the logarithms; NaN for a single size."""
        if len(self.size) < 2:
            return math.nan
        return float(np.polyfit(np.log(self.size), np.log(self.value), 1)[0])


def draw(every: Sequence[Series], path: Path) -> None:
    """Draw all series into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 4
    rows = -(-len(every) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.0 * rows), layout="constrained", squeeze=False)
    for axis, series in zip(axes.flat, every):
        axis.loglog(series.size, series.value, "o-", color="tab:blue")
        axis.set_title(f"{series.name}\nexponent {series.exponent:.2f}", fontsize=10)
        axis.set_xlabel(series.of)
        axis.set_ylabel(series.unit or "share")
        axis.set_xticks(series.size, [_short(size) for size in series.size], rotation=30 if len(series.size) > 4 else 0)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.grid(True, alpha=0.25)
        low, high = min(series.value), max(series.value)
        if high < 10 * low:  # less than a decade would look steep and have no tick label
            axis.set_ylim(low / 5, high * 5)
    for axis in axes.flat[len(every) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _short(size: float) -> str:
    """20000000 -> 20M."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g}{unit}"
    return f"{size:g}"
