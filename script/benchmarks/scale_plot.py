"""The figure of `script/bench.py scale`: one panel per series, logarithmic, with its exponent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Drawable(Protocol):
    """What a panel needs."""

    name: str
    of: str
    size: list[float]
    value: list[float]
    unit: str

    @property
    def exponent(self) -> float: ...


def draw(every: Sequence[Drawable], path: Path) -> None:
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
        if high < 10 * low:  # less than a decade would look like a cliff, and show no label
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
