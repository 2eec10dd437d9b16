"""Reads ahead: while one group of blocks is worked on, the system is asked to bring the next one into its page cache.

Within a group frames are taken here and there, which a disk does slowly. A block is some megabytes in one piece, which
it does at full speed. So each block is announced (posix_fadvise, WILLNEED) before its group's turn comes, a few with
every batch; where a run begins or goes on, those of the group at hand are announced at once. The requests are made in a
thread, since a busy disk makes them wait. All workers of a machine share the page cache: what one has announced costs
the others some microseconds. Where the system cannot do this, or has too little memory, frames are read as they come.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.data.order.plan import MixedPlan, SourcePlan
from src.data.shards.index import ShardIndex

_MEMORY_SHARE = 0.5  # of the memory that is free, for the two groups of every source


class Turn(NamedTuple):
    """A group of an epoch of a source."""

    source: int
    epoch: int
    group: int


class ReadAhead:
    """Announces the blocks of a plan's sources as the reading goes on."""

    def __init__(self, plan: MixedPlan, sources: Sequence[Sequence[ShardIndex]]) -> None:
        self.plan, self.sources = plan, sources
        self.num_asked: dict[Turn, int] = {}  # blocks of a group that were announced
        self.todo: deque[tuple[int, int, int]] = deque()  # (source, first frame, first frame behind)
        self._thread: threading.Thread | None = None
        self.is_on = hasattr(os, "posix_fadvise") and self._size() <= _MEMORY_SHARE * available_memory()

    def _size(self) -> float:
        """Bytes of two groups of every source."""
        return sum(2 * source.group_size for source in self.plan.sources)

    def advance(self, positions: Sequence[int]) -> None:
        """To be called with the positions that are read next."""
        if not self.is_on:
            return
        places = [self.plan.source_at(position) for position in positions if position >= 0]
        first, last = dict(reversed(places)), dict(places)
        for number, place in last.items():
            source = self.plan.sources[number]
            self._reach(number, source, first[number])
            here, behind = self._reach(number, source, place)
            for turn in [turn for turn in self.num_asked if turn.source == number and turn not in (here, behind)]:
                del self.num_asked[turn]
        if self.todo and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)
            self._thread.start()

    def _reach(self, number: int, source: SourcePlan, place: int) -> tuple[Turn, Turn]:
        """Announce what should be on its way when `place` of a source is read; returns its group and the next one."""
        epoch, place = divmod(place, source.num_frame)
        group, at, size = source.epoch(epoch).find(place)
        here = Turn(number, epoch, group)
        behind = self._next(source, here)
        self._ask(source, here, 1.0)
        self._ask(source, behind, (at + 1) / size)
        return here, behind

    @staticmethod
    def _next(source: SourcePlan, turn: Turn) -> Turn:
        is_last = turn.group + 1 == len(source.epoch(turn.epoch).group_end)
        return turn._replace(epoch=turn.epoch + 1, group=0) if is_last else turn._replace(group=turn.group + 1)

    def _ask(self, source: SourcePlan, turn: Turn, share: float) -> None:
        """See to it that this share of a group's blocks has been announced, in the order of the archive."""
        order = source.epoch(turn.epoch)
        asked, wanted = self.num_asked.get(turn, 0), math.ceil(share * order.num_block(turn.group))
        if wanted > asked:
            blocks = order.blocks(turn.group)
            blocks = blocks[np.argsort(blocks[:, 0])]
            self.todo.extend((turn.source, begin, end) for begin, end in blocks[asked:wanted].tolist())
            self.num_asked[turn] = wanted

    def _work(self) -> None:
        while self.todo:
            source, begin, end = self.todo.popleft()
            for shard, first, last in pieces(self.plan.sources[source], begin, end):
                announce(self.sources[source][shard], self.plan.sources[source].stride, first, last)


def pieces(source: SourcePlan, begin: int, end: int) -> list[tuple[int, int, int]]:
    """Frames [begin, end) of a source as (shard, first row, last row), one for each shard that they lie in."""
    found = []
    while begin < end:
        shard, row = source.split(begin)
        stop = min(end, source.ends[shard])
        found.append((shard, row, row + stop - begin - 1))
        begin = stop
    return found


def announce(index: ShardIndex, stride: int, first: int, last: int) -> None:
    """Ask the system to read the samples that rows `first` to `last` of a shard belong to. Errors show when reading."""
    tables = index.tables()
    rows = tables.rows(stride)
    low, high = (first, last) if rows is None else (rows[first], rows[last])
    low, high = (tables.sample[tables.frame[row]["sample"]] for row in (low, high))
    begin, end = int(low["offset"]), int(high["offset"]) + int(high["size"])
    try:
        file = os.open(index.shard, os.O_RDONLY)
    except OSError:
        return
    try:
        os.posix_fadvise(file, begin, end - begin, os.POSIX_FADV_WILLNEED)
    except OSError:
        pass
    finally:
        os.close(file)


def available_memory() -> float:
    """Bytes that programs could still take; infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))
