"""What a person sees: plain lines in log.txt and on the console, and a progress bar where the console is a terminal."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")

console = Console(highlight=False)
logger = logging.getLogger("stage1")


class _ConsoleHandler(logging.Handler):
    """Prints through rich, so that a line scrolls above a live progress bar instead of tearing it."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(self.format(record), markup=False, soft_wrap=True)


def set_up_logging(is_main: bool) -> None:
    """Lines of the main process go to the console as they are; the others speak up from warnings on."""
    logger.handlers[:] = [_ConsoleHandler()]
    logger.setLevel(logging.INFO if is_main else logging.WARNING)
    logger.propagate = False


def add_log_file(path: Path) -> None:
    """From now on every line also goes to this file, appended."""
    logger.addHandler(logging.FileHandler(path, encoding="utf-8"))


@contextmanager
def progress_bar(enabled: bool) -> Iterator[Progress]:
    """A rich progress display; silent when not enabled or when the console is not a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal)) as progress:
        yield progress


def track(progress: Progress, items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """Pass items through under a bar of their own, which leaves with the last one."""
    task = progress.add_task(description, total=total, note="")
    for item in items:
        yield item
        progress.advance(task)
    progress.remove_task(task)
