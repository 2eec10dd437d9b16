"""What all benchmarks share: a measured figure with its bound, tables and JSON of figures, timing, configurations."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.table import Table

from src.config import Config
from src.config_parse import check_command_line, parse_config

CONFIG_DIR = Path(__file__).resolve().parents[2] / "config"
Status = Callable[[str], None]  # updates the status line


@dataclass(frozen=True)
class Figure:
    """One measured number, with a lower or an upper bound where the project promises one."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the value is within its bound; None without one."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most

    @property
    def promise(self) -> str:
        """The bound as text."""
        if self.at_least is not None:
            return f">= {self.at_least:,g}"
        return "" if self.at_most is None else f"<= {self.at_most:,g}"


def median_figure(name: str, values: Sequence[float], unit: str = "", note: str = "", **bound: float) -> Figure:
    """The median of repeated measurements; the note starts with their range. `bound`: at_least, at_most."""
    span = f"{min(values):.4g} to {max(values):.4g} over {len(values)}"
    return Figure(name, statistics.median(values), unit, note=f"{span}; {note}" if note else span, **bound)


def ratio_figure(name: str, above: Sequence[float], below: Sequence[float], **bound: float) -> Figure:
    """The median ratio of measurements that were taken one right after the other."""
    return median_figure(name, [a / b for a, b in zip(above, below, strict=True)], **bound)


def figure_table(title: str, figures: Sequence[Figure]) -> Table:
    """One row per figure: three significant digits, whole numbers from 100 on."""
    table = Table("figure", "value", "unit", "promised", "", "note", title=title, title_justify="left")
    table.columns[1].justify = "right"
    for figure in figures:
        value = f"{figure.value:,.0f}" if abs(figure.value) >= 100 else f"{figure.value:.3g}"
        mark = {None: "", True: "[green]held[/]", False: "[red]missed[/]"}[figure.holds]
        table.add_row(figure.name, value, figure.unit, figure.promise, mark, figure.note)
    return table


def write_figures(file: Path, subject: str, figures: Sequence[Figure]) -> None:
    """Write the figures and the machine they were measured on as JSON."""
    rows = [{**asdict(figure), "holds": figure.holds} for figure in figures]
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    result = {"command": subject, "machine": machine(), "time": now, "figures": rows}
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def machine() -> str:
    """Processor, usable cores and widest vector instructions, Python version."""
    file = Path("/proc/cpuinfo")
    info = file.read_text() if file.is_file() else ""
    model = re.search(r"model name\s*: (.*)", info)
    name = model[1] if model else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    vector = next((v for v in ("avx512f", "avx2") if v in info), "no AVX2")
    return f"{name}, {cores} cores, {vector}, Python {platform.python_version()}"


def compose_config(name: str, *overrides: str) -> Config:
    """The shipped configuration `name` with overrides, typed and checked."""
    check_command_line(list(overrides))
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return parse_config(compose(name, overrides=list(overrides)))


def seconds_of(call: Callable[[], object]) -> float:
    """Wall-clock time of a call, including the GPU work that it started."""
    wait_for_gpu()
    start = time.perf_counter()
    call()
    wait_for_gpu()
    return time.perf_counter() - start


def wait_for_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_per_call(
    funcs: Sequence[Callable[[int], object]],
    seconds: float,
    num: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """For each function, the minimum time of `func(i)` over all passes, averaged over i.

    The functions take turns, so that all of them run under the same conditions; the minimum excludes what other
    programs took of the machine.

    Args:
        funcs: each is called with 0 .. num - 1 in every pass.
        seconds: total measuring time; there are at least three passes.
        clock: `time.thread_time` for single-threaded work that never waits: time on the processor, without the time
            that it spent on other programs.
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
