"""What a benchmark measures: figures with a unit and, where one was promised, a bound; as a table and as JSON."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the promise is kept; None where there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        low, high = self.at_least, self.at_most
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    @property
    def promise(self) -> str:
        """The bound, for people."""
        parts = [f">= {self.at_least:,g}"] if self.at_least is not None else []
        parts += [f"<= {self.at_most:,g}"] if self.at_most is not None else []
        return ", ".join(parts)


def show(value: float) -> str:
    """Three significant digits at least, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def figure_table(title: str, figures: Sequence[Figure]) -> Table:
    """The figures, one a row."""
    table = Table("figure", "value", "unit", "promised", "", "note", title=title, title_justify="left")
    table.columns[1].justify = "right"
    for figure in figures:
        mark = {None: "", True: "[green]held[/]", False: "[red]missed[/]"}[figure.holds]
        table.add_row(figure.name, show(figure.value), figure.unit, figure.promise, mark, figure.note)
    return table


def figure_json(command: str, figures: Sequence[Figure]) -> dict[str, Any]:
    """The figures and the machine they were measured on, ready for `json.dump`."""
    rows = [{**asdict(figure), "holds": figure.holds} for figure in figures]
    return {"command": command, "machine": machine(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "figures": rows}


def machine() -> str:
    """The processor in words: name, usable cores, widest vector instructions."""
    name, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        name, flags = fields.get("model name", name), fields.get("flags", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    vector = next((v for v in ("avx512f", "avx2") if v in flags.split()), "no AVX2")
    return f"{name}, {cores} cores, {vector}, Python {platform.python_version()}"


def seconds_per_call(
    funcs: Sequence[Callable[[int], object]],
    seconds: float,
    num: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """The mean over i of the least time that `func(i)` took, of each function.

    The functions take turns, so that all see the same machine; the least of several passes leaves out what other
    programs took of it.

    Args:
        funcs: each called with 0 .. num - 1, again and again.
        seconds: how long to measure in all, at least three passes.
        clock: `time.thread_time` for work of one thread that does not wait for anything: what other programs take of
            the processor meanwhile does not count.
    """
    best = [[float("inf")] * num for _ in funcs]
    num_pass, deadline = 0, time.perf_counter() + seconds
    while num_pass < 3 or time.perf_counter() < deadline:
        for func, least in zip(funcs, best):
            for i in range(num):
                start = clock()
                func(i)
                least[i] = min(least[i], clock() - start)
        num_pass += 1
    return [sum(least) / num for least in best]
