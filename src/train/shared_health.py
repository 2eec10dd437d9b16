"""Corruption counts of all processes together: for the journal, the log file and the checkpoint."""

from __future__ import annotations

from collections import Counter
from typing import Any

from accelerate import Accelerator

from src.data.health import DataHealth, merge_states
from src.distributed.processes import build_host_group, gather_objects
from src.utils.console import log_to_file, logger


class SharedHealth:
    """Joins the DataHealth of all processes; they all call `row`, `exchange` and `state` at the same step."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._group, self._is_main = build_host_group(accelerator), accelerator.is_main_process

    def row(self, health: DataHealth, read: Counter[str]) -> dict[str, int]:
        """`bad_<reason>`: corrupt frames in the indexes, plus those in `read` of all processes."""
        total = sum(self.exchange(health, read), Counter(health.indexed))
        return {f"bad_{reason}": count for reason, count in sorted(total.items())}

    def exchange(self, health: DataHealth, read: Counter[str]) -> list[Counter[str]]:
        """`read` of every process. Warnings of the other processes are copied to the log file."""
        reads, lines = zip(*gather_objects((read, health.new_lines()), self._group))
        if self._is_main:
            for line in (line for of_process in lines[1:] for line in of_process):
                log_to_file(line)
        return list(reads)

    def state(self, health: DataHealth) -> dict[str, Any]:
        """The joined state, for a checkpoint."""
        return merge_states(gather_objects(health.state_dict(), self._group))

    def load(self, health: DataHealth, state: dict[str, Any] | None) -> None:
        """Continue the counts of a checkpoint, if it has any: the main process holds the sum."""
        if self._is_main and state is not None:
            health.load_state_dict(state)


def log_corruption(name: str, health: DataHealth) -> None:
    """Before the first step, log what the indexes found or a checkpoint recorded."""
    if health.counts():
        logger.warning(f"{name} data: {health.summary()}\n{health.table()}")
