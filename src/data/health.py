"""Counts bad frames by reason, with examples, and stops the run when there are too many."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from src.data.dataset import MAX_ATTEMPT, BadFrame
from src.data.shards.errors import REASONS
from src.data.shards.index import Bad, ShardIndex
from src.data.shards.losses import count_lost

logger = logging.getLogger("stage1.data")  # below the logger of src/utils/console.py
_MAX_EXAMPLE = 20
_AT = ", at position "  # followed by the position at the end of an example
_MIN_READ = 1000  # frames below which a fraction means little


class BadDataError(ValueError):
    """More frames are bad than `DATA.max_bad_fraction` allows; the message contains a table."""


class DataHealth:
    """Bad frames by reason: `indexed` when the shards were indexed, `read` while reading."""

    def __init__(self, sources: Sequence[Sequence[ShardIndex]], max_bad_fraction: float) -> None:
        self.max_bad_fraction = max_bad_fraction
        self.num_frame, self.num_read, self.num_lost_shard = 0, 0, 0
        self.indexed: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self.example: list[str] = []  # from the indexes
        self.read_example: list[str] = []
        self._num_reported = 0  # of read_example, by new_lines
        for source in sources:
            lost, num_shard = count_lost((shard.num_frame(), shard.bad_count, shard.is_lost) for shard in source)
            self.indexed.update(lost)
            self.num_lost_shard += num_shard
            self.num_frame += sum(shard.num_frame() for shard in source)
            for shard in source:
                room = _MAX_EXAMPLE - len(self.example)
                self.example += [_example(bad, shard) for bad in shard.bad[: max(0, room)]]

    def add(self, num_read: int, bad: Sequence[BadFrame]) -> None:
        """Count a batch of `num_read` rows. Raises BadDataError if too many frames, or all of a position, were bad."""
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
        """The lines this process has logged since the last call, for the log file that the main process writes."""
        begin, self._num_reported = self._num_reported, len(self.read_example)
        return [_line(example) for example in self.read_example[begin:]]

    def counts(self) -> dict[str, int]:
        """Bad frames by reason, indexing and reading together."""
        return dict(sorted((self.indexed + self.read).items()))

    def check(self) -> None:
        """Raises BadDataError if the shards, or the frames read so far, contain more bad frames than allowed."""
        num_indexed, num_read = self.indexed.total(), self.read.total()
        shards_bad = num_indexed > self.max_bad_fraction * (self.num_frame + num_indexed)
        if shards_bad or num_read > self.max_bad_fraction * max(self.num_read, _MIN_READ):
            cure = "repair or exclude them, or raise DATA.max_bad_fraction"
            raise self._error(f"DATA.max_bad_fraction={self.max_bad_fraction}", cure)

    def _error(self, why: str, cure: str) -> BadDataError:
        hint = f"Inspect the shards with script/check_shards.py; {cure}"
        return BadDataError(f"{why}: {self.summary()}\n{self.table()}\n{hint}")

    def _check_position(self, bad: Sequence[BadFrame]) -> None:
        """Raises BadDataError if all frames tried for a position were bad."""
        position, count = Counter(frame.position for frame in bad).most_common(1)[0]
        if count >= MAX_ATTEMPT:
            raise self._error(f"position {position}: {count} frames in a row cannot be used", "repair or exclude them")

    def summary(self) -> str:
        """One line: how many frames are bad, and why."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.counts().items()) or "nothing"
        lost = f" (shards that cannot be read at all: {self.num_lost_shard})" if self.num_lost_shard else ""
        return (
            f"bad in the shards: {self.indexed.total()} of {self.num_frame + self.indexed.total()} frames{lost}, "
            f"while reading: {self.read.total()} of {self.num_read}; by reason: {reasons}"
        )

    def table(self) -> str:
        """A table of reasons, counts and what to do, then examples."""
        lines = [f"  {reason:<20} {count:>8}  {REASONS.get(reason, '')}" for reason, count in self.counts().items()]
        return "\n".join([*lines, *(f"    {example}" for example in [*self.example, *self.read_example])])

    def state_dict(self) -> dict[str, Any]:
        """The counts from reading; those of the indexes are loaded with the shards."""
        return {"num_read": self.num_read, "read": dict(self.read), "example": list(self.read_example)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_read, self.read = int(state["num_read"]), Counter(state["read"])
        self.read_example = list(state.get("example", []))


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sum of all ranks' `state_dict`. Only one rank may load it."""
    read = sum((Counter(state["read"]) for state in states), Counter())
    example = sorted((text for state in states for text in state.get("example", [])), key=_position)[:_MAX_EXAMPLE]
    num_read = sum(state["num_read"] for state in states)
    return {"num_read": num_read, "read": dict(sorted(read.items())), "example": example}


def _example(bad: Bad, shard: ShardIndex) -> str:
    return f"{bad.reason}: {bad} in {shard.shard}" + (f": {bad.detail}" if bad.detail else "")


def _line(example: str) -> str:
    return f"bad frame: {example}"


def _position(example: str) -> int:
    """The position of an example. Sorting by it makes the kept examples independent of resumes."""
    return int(example.rpartition(_AT)[2])
