"""Runs a function in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

T = TypeVar("T")


def worker_context() -> BaseContext:
    """How data processes are started: forked where the system can, in milliseconds and without importing again.

    They use neither CUDA nor thread pools, so nothing is inherited that does not survive a fork.
    """
    return get_context("fork" if "fork" in get_all_start_methods() else None)


def map_processes(
    function: Callable[..., T],
    work: Sequence[tuple[Any, ...]],
    num_process: int,
    context: BaseContext,
    initializer: Callable[[], None] | None = None,
) -> Iterator[T]:
    """`function(*arguments)` for each entry of `work`, in the order of completion; 1 process means this one."""
    num_process = min(num_process, len(work))
    if num_process <= 1:
        yield from (function(*arguments) for arguments in work)
        return
    with ProcessPoolExecutor(num_process, context, initializer) as pool:
        futures = [pool.submit(function, *arguments) for arguments in work]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
