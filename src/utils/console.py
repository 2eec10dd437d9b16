"""What a person sees: plain lines in log.txt and on the console, and a progress bar where the console is a terminal."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from src.utils.append_file import AppendFile
from src.utils.text import printable

T = TypeVar("T")

PLAIN_WIDTH = 120  # columns of what is no terminal, a pipe or a job's log; COLUMNS may say otherwise


def make_console(markup: bool = False) -> Console:
    """A console on stdout; without markup and emoji, since a folder may be called [x] or :x:."""
    made = Console(highlight=False, markup=markup, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PLAIN_WIDTH
    return made


console = make_console()
logger = logging.getLogger("stage1")


class _ConsoleHandler(logging.Handler):
    """Prints through rich, so that a line scrolls above a live progress bar instead of tearing it."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "is_file_only", False):
            console.print(printable(self.format(record)), soft_wrap=True)


class _FileHandler(logging.Handler):
    """Appends lines to a file; a disk that refuses is told once and costs no line as long as the process lives."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = AppendFile(path)

    def emit(self, record: logging.LogRecord) -> None:
        self._file.append(printable(self.format(record)).encode() + b"\n")


class _Beginning(MemoryHandler):
    """Keeps what is said before there is a run folder."""


def is_main_process() -> bool:
    """Whether this process is the one that speaks and writes, before Accelerate has been asked."""
    return int(os.environ.get("RANK", "0")) == 0


def set_up_logging() -> None:
    """Lines of the main process go to the console as they are; the others speak up from warnings on."""
    logger.handlers[:] = [_ConsoleHandler(), _Beginning(capacity=1000, flushLevel=logging.CRITICAL + 1)]
    logger.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    logger.propagate = False


def log_to_file(line: str) -> None:
    """Write a warning to the log file only: another process has already put it on the console."""
    logger.warning(line, extra={"is_file_only": True})


def add_log_file(path: Path) -> None:
    """Every line also goes to this file, appended: those said since `set_up_logging`, and all to come."""
    file = _FileHandler(path)
    for handler in [h for h in logger.handlers if isinstance(h, _Beginning)]:
        logger.removeHandler(handler)
        handler.setTarget(file)
        handler.close()
    logger.addHandler(file)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A rich progress display, for the main process on a terminal; silent anywhere else."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (is_main_process() and console.is_terminal)) as progress:
        yield progress


@contextmanager
def task_bar(progress: Progress, description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that reports `(done, total)`; it shows up with the first report and leaves at the end."""
    task = progress.add_task(description, total=None, visible=False)
    yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)
    progress.remove_task(task)


def track(progress: Progress, items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Pass items through under a bar of their own, which leaves with the last one."""
    task = progress.add_task(description, total=total)
    try:
        for item in items:
            yield item
            progress.advance(task)
    finally:
        progress.remove_task(task)
