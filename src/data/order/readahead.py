"""Read-ahead: while one group of blocks is read, the system loads the next one into its page cache.

Within a group, frames are read in random order, which is slow on disks; a block is several contiguous megabytes, which
disks read at full speed. Each block is therefore requested (posix_fadvise, WILLNEED) before its group is read, a few
with every batch; when a run starts or resumes, all blocks of the current group are requested at once. A thread makes
the requests, because they block while the disk is busy. All workers of a machine share the page cache, so repeating
another worker's request costs microseconds. Without posix_fadvise, or with too little memory, nothing is requested.
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

_MEMORY_SHARE = 0.5  # of the available memory, for two groups of every source


class GroupKey(NamedTuple):
    """A group of an epoch of a source."""

    source: int
    epoch: int
    group: int


class ReadAhead:
    """Asks the system to prefetch the blocks of a plan's sources as reading advances."""

    def __init__(self, plan: MixedPlan, sources: Sequence[Sequence[ShardIndex]]) -> None:
        self.plan, self.sources = plan, sources
        self.num_requested: dict[GroupKey, int] = {}  # blocks of a group that were requested
        self.queue: deque[tuple[int, int, int]] = deque()  # (source, first frame, first frame after)
        self._thread: threading.Thread | None = None
        size = sum(2 * source.group_size for source in plan.sources)  # bytes of two groups of every source
        self.is_on = hasattr(os, "posix_fadvise") and size <= _MEMORY_SHARE * available_memory()

    def advance(self, positions: Sequence[int]) -> None:
        """Request the blocks that are due when `positions` are read; call it with every batch, before reading."""
        if not self.is_on:
            return
        indices = [self.plan.source_at(position) for position in positions if position >= 0]
        first, last = dict(reversed(indices)), dict(indices)
        for number, index in last.items():
            source = self.plan.sources[number]
            self._request_until(number, source, first[number])
            current, following = self._request_until(number, source, index)
            for key in [key for key in self.num_requested if key.source == number and key not in (current, following)]:
                del self.num_requested[key]
        if self.queue and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)
            self._thread.start()

    def _request_until(self, number: int, source: SourcePlan, index: int) -> tuple[GroupKey, GroupKey]:
        """Request the blocks due when `index` of a source's order is read; returns its group and the next one."""
        epoch, index = divmod(index, source.num_frame)
        group, at, size = source.epoch(epoch).find(index)
        current = GroupKey(number, epoch, group)
        is_last = group + 1 == len(source.epoch(epoch).group_end)
        following = GroupKey(number, epoch + 1, 0) if is_last else GroupKey(number, epoch, group + 1)
        self._request(source, current, 1.0)
        self._request(source, following, (at + 1) / size)
        return current, following

    def _request(self, source: SourcePlan, key: GroupKey, share: float) -> None:
        """Make sure that this share of a group's blocks has been requested, in archive order."""
        order = source.epoch(key.epoch)
        done, due = self.num_requested.get(key, 0), math.ceil(share * order.num_block(key.group))
        if due > done:
            blocks = order.blocks(key.group)
            blocks = blocks[np.argsort(blocks[:, 0])]
            self.queue.extend((key.source, begin, end) for begin, end in blocks[done:due].tolist())
            self.num_requested[key] = due

    def _work(self) -> None:
        while self.queue:
            source, begin, end = self.queue.popleft()
            for shard, first, last in pieces(self.plan.sources[source], begin, end):
                prefetch(self.sources[source][shard], self.plan.sources[source].stride, first, last)


def pieces(source: SourcePlan, begin: int, end: int) -> list[tuple[int, int, int]]:
    """Frames [begin, end) of a source as (shard, first row, last row) for each shard that contains some of them."""
    found = []
    while begin < end:
        shard, row = source.split(begin)
        stop = min(end, source.ends[shard])
        found.append((shard, row, row + stop - begin - 1))
        begin = stop
    return found


def prefetch(index: ShardIndex, stride: int, first: int, last: int) -> None:
    """Ask the system to load the samples of rows `first` to `last` of a shard. Errors are left to the actual reads."""
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
    """Bytes of memory available to programs; infinite if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))
