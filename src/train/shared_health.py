"""What the processes of a run know together of damaged frames: for the journal, the log file and the checkpoint."""

from __future__ import annotations

from collections import Counter
from typing import Any

from src.data.health import DataHealth, merge_states
from src.distributed.processes import HostTalk
from src.utils.console import log_said, logger


class SharedDamage:
    """The books of damage of all processes, who all call `row`, `share` and `state` at the same step."""

    def __init__(self, talk: HostTalk, is_main: bool) -> None:
        self.talk, self.is_main = talk, is_main

    def row(self, health: DataHealth, read: Counter[str]) -> dict[str, int]:
        """`bad_<reason>`: frames that the indexes know of, and those `read` by all processes together."""
        total = sum(self.share(health, read), Counter(health.indexed))
        return {f"bad_{reason}": count for reason, count in sorted(total.items())}

    def share(self, health: DataHealth, read: Counter[str]) -> list[Counter[str]]:
        """`read` of every process. What the others have told of these frames goes to the log file."""
        reads, lines = zip(*self.talk.gather((read, health.new_lines())))
        if self.is_main:
            for line in (line for told in lines[1:] for line in told):
                log_said(line)
        return list(reads)

    def state(self, health: DataHealth) -> dict[str, Any]:
        """The books of all, for a checkpoint."""
        return merge_states(self.talk.gather(health.state_dict()))

    def take_over(self, health: DataHealth, state: dict[str, Any] | None) -> None:
        """Go on with the books of a checkpoint, if there are any: the main process holds the sum."""
        if self.is_main and state is not None:
            health.load_state_dict(state)


def name_indexed(name: str, health: DataHealth) -> None:
    """Tell what the indexes found, or a checkpoint remembers, before the first step."""
    if health.counts():
        logger.warning(f"{name} data: {health.summary()}\n{health.table()}")
