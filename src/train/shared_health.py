"""Corruption counts of all processes together: for the journal and the log file."""

from __future__ import annotations

from collections import Counter

from accelerate.utils import gather_object

from src.data.health import DataHealth
from src.utils.console import is_main_process, log_to_file


def exchange(health: DataHealth, read: Counter[str]) -> Counter[str]:
    """The sum of `read` over all processes. Warnings of the other processes are copied to the log file.

    A collective: every process must call it at the same step.
    """
    reads, lines = zip(*gather_object([(read, health.new_lines())]))
    if is_main_process():
        for line in (line for of_process in lines[1:] for line in of_process):
            log_to_file(line)
    return sum(reads, Counter())


def corruption_row(health: DataHealth, read: Counter[str]) -> dict[str, int]:
    """`bad_<reason>`: corrupt frames in the indexes, plus those in `read` of all processes. A collective."""
    total = exchange(health, read) + Counter(health.indexed)
    return {f"bad_{reason}": count for reason, count in sorted(total.items())}
