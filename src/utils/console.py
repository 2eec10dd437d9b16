"""Console output: log lines (also in log.txt), and progress bars if the console is a terminal."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from src.utils.append_file import AppendFile
from src.utils.text import printable

T = TypeVar("T")

PLAIN_WIDTH = 120  # columns of output that is not a terminal (pipe, job log); COLUMNS overrides it


def make_console(markup: bool = False) -> Console:
    """A console on stdout, without markup and emoji by default: a folder may be named [x] or :x:."""
    made = Console(highlight=False, markup=markup, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PLAIN_WIDTH
    return made


console = make_console()
logger = logging.getLogger("stage1")


class _ConsoleHandler(logging.Handler):
    """Prints through rich, so that lines appear above a live progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "is_file_only", False):
            console.print(printable(self.format(record)), soft_wrap=True)


class _FileHandler(logging.Handler):
    """Appends lines to a file; if the disk is full they wait in memory, with one warning."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = AppendFile(path)

    def emit(self, record: logging.LogRecord) -> None:
        self._file.append(printable(self.format(record)).encode() + b"\n")


def is_main_process() -> bool:
    """Whether this is rank 0, from the environment: usable before Accelerate is initialised."""
    return int(os.environ.get("RANK", "0")) == 0


def set_up_logging() -> None:
    """Log to the console: everything from the main process, warnings and errors from the others."""
    until_log_file = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)
    logger.handlers[:] = [_ConsoleHandler(), until_log_file]
    logger.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    logger.propagate = False


def log_to_file(line: str) -> None:
    """Write a warning to the log file only: another process has already put it on the console."""
    logger.warning(line, extra={"is_file_only": True})


def add_log_file(path: Path) -> None:
    """Also append every line to this file, including those since `set_up_logging`."""
    file = _FileHandler(path)
    for handler in [h for h in logger.handlers if isinstance(h, MemoryHandler)]:
        logger.removeHandler(handler)
        handler.setTarget(file)
        handler.close()
    logger.addHandler(file)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A rich progress display; disabled outside of the main process or without a terminal."""
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not (is_main_process() and console.is_terminal)) as progress:
        yield progress


@contextmanager
def task_bar(progress: Progress, description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that reports `(done, total)`; it appears with the first report and disappears at the end."""
    task = progress.add_task(description, total=None, visible=False)
    yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)
    progress.remove_task(task)


def track(progress: Progress, items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Iterate over items with a progress bar, which disappears at the end."""
    task = progress.add_task(description, total=total)
    try:
        for item in items:
            yield item
            progress.advance(task)
    finally:
        progress.remove_task(task)
