"""The books of damage: how many frames were bad, for which reason, where; and when that is too much."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from src.data.dataset import MAX_ATTEMPT, BadFrame
from src.data.shards.index import ShardIndex

logger = logging.getLogger("stage1.data")  # below the logger of src/utils/console.py
_MAX_EXAMPLE = 20
_AT = ", at position "  # what an example ends with
_MIN_READ = 1000  # fewer frames than this say little about a fraction


class BadDataError(ValueError):
    """More of the data is damaged than `DATA.max_bad_fraction` allows; the message holds a table."""


class DataHealth:
    """Counts by reason: `indexed` from the shards' indexes, `read` from reading."""

    def __init__(self, sources: Sequence[Sequence[ShardIndex]], max_bad_fraction: float) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.num_frame, self.num_read = 0, 0
        self.indexed: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self.example: list[str] = []  # from the indexes
        self.read_example: list[str] = []
        self._num_passed_on = 0  # of read_example
        for shard in (shard for source in sources for shard in source):
            self.num_frame += shard.num_frame()
            self.indexed.update(shard.bad_count)
            room = _MAX_EXAMPLE - len(self.example)
            self.example += [f"{bad.reason}: {bad.key} in {shard.shard}" for bad in shard.bad[: max(0, room)]]

    def add(self, num_read: int, bad: Sequence[BadFrame]) -> None:
        """Take in the rows of a batch. Raises BadDataError when it is too much, or a position has no frame left."""
        self.num_read += num_read
        for frame in bad:
            self.read[frame.reason] += 1
            if len(self.read_example) < _MAX_EXAMPLE:
                where = f"{frame.key} in {frame.shard}{_AT}{frame.position}"
                self.read_example.append(f"{frame.reason}: {where}")
                logger.warning(_line(self.read_example[-1]))
        if bad:
            self.check()
            self._check_position(bad)

    def new_lines(self) -> list[str]:
        """What this process has told of bad frames since it was last asked, for a log that another one keeps."""
        begin, self._num_passed_on = self._num_passed_on, len(self.read_example)
        return [_line(example) for example in self.read_example[begin:]]

    def counts(self) -> dict[str, int]:
        """Bad frames by reason, from indexes and from reading."""
        return dict(sorted((self.indexed + self.read).items()))

    def check(self) -> None:
        """Raises BadDataError when the shards, or what was read of them, hold more bad frames than allowed."""
        num_indexed, num_read = self.indexed.total(), self.read.total()
        shards_bad = num_indexed > self.max_bad_fraction * (self.num_frame + num_indexed)
        if shards_bad or num_read > self.max_bad_fraction * max(self.num_read, _MIN_READ):
            raise BadDataError(
                f"DATA.max_bad_fraction={self.max_bad_fraction}: {self.summary()}\n{self.table()}\n"
                "Look closer with script/check_shards.py; repair or leave them out, or raise DATA.max_bad_fraction"
            )

    def _check_position(self, bad: Sequence[BadFrame]) -> None:
        """Raises BadDataError where every frame that was tried for a position was bad."""
        position, count = Counter(frame.position for frame in bad).most_common(1)[0]
        if count >= MAX_ATTEMPT:
            raise BadDataError(
                f"position {position}: {count} frames in a row cannot be used; {self.summary()}\n{self.table()}\n"
                "Look closer with script/check_shards.py; repair the shards or leave them out"
            )

    def summary(self) -> str:
        """One line: how much is bad, and why."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.counts().items()) or "nothing"
        return (
            f"bad in the shards: {self.indexed.total()} of {self.num_frame + self.indexed.total()} frames, "
            f"while reading: {self.read.total()} of {self.num_read}; by reason: {reasons}"
        )

    def table(self) -> str:
        """Reason, count and examples, for people."""
        lines = [f"  {reason:<20} {count:>8}" for reason, count in self.counts().items()]
        return "\n".join([*lines, *(f"    {example}" for example in [*self.example, *self.read_example])])

    def state_dict(self) -> dict[str, Any]:
        """What was found while reading (the indexes are counted anew)."""
        return {"num_read": self.num_read, "read": dict(self.read), "example": list(self.read_example)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_read, self.read = int(state["num_read"]), Counter(state["read"])
        self.read_example = list(state.get("example", []))


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The `state_dict` of all ranks together, from those of each. Only one rank may load it again."""
    read = sum((Counter(state["read"]) for state in states), Counter())
    example = sorted((text for state in states for text in state.get("example", [])), key=_position)[:_MAX_EXAMPLE]
    num_read = sum(state["num_read"] for state in states)
    return {"num_read": num_read, "read": dict(sorted(read.items())), "example": example}


def _line(example: str) -> str:
    return f"bad frame: {example}"


def _position(example: str) -> int:
    """The position that an example was read at. Sorted by it, the first of all ranks do not depend on resumes."""
    return int(example.rpartition(_AT)[2])
