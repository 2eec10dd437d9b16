"""Data order as a function: position -> (source, shard, row), from seed and position alone.

Nothing is shuffled on the fly, so nothing has to be remembered: any worker of any rank computes which frame stands at
any position, and a resumed run goes on at its integer. One epoch of a source of N frames is laid out like this:

    frames in archive order, cut into blocks of L neighbours (grid shifted by the epoch)
    blocks permuted (seed, epoch), then dealt into groups
    a group is read in L rounds; round r takes the frame of one and the same place p(r) from each of its blocks

So reads stay inside a few hundred blocks at a time, and p(r) = (a + r m) mod L keeps places of nearby rounds far apart:
neighbouring frames of a clip, whose places differ by 1, never meet in a batch, and clips shorter than L / 3 hardly
ever. Memory: one permutation of N / L blocks per epoch, one table of a group.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from src.data.index import ShardIndex
from src.data.rng import hash_int, stream

_GROUP_BLOCK = 256  # blocks that are open at once, at least; more than a common global batch has samples
_BLOCK_MIN, _BLOCK_MAX = 16, 128
_WEIGHT_BIT = 40  # weights are exact to 2^-40


class Place(NamedTuple):
    """Where a frame lies: number of the source, of the shard in it, and the row among the shard's selected frames."""

    source: int
    shard: int
    row: int


@lru_cache(maxsize=256)
def round_step(block: int) -> int:
    """The step m of the places p(r) = r m mod `block`: coprime to it, and for few rounds k, k m is far from 0."""

    def spread(m: int) -> int:
        return min(min(k * m % block, -k * m % block) * k for k in range(1, 9) if k < block)

    steps = [m for m in range(1, block) if math.gcd(m, block) == 1]
    return max(steps, key=spread, default=1) if block > 2 else 1


class EpochOrder:
    """The order of one epoch of one source of `num_frame` frames."""

    def __init__(self, num_frame: int, seed: int, epoch: int, tag: int = 0) -> None:
        assert num_frame > 0
        self.num_frame, self.key = num_frame, (seed, epoch, tag)
        block = min(num_frame, max(_BLOCK_MIN, min(_BLOCK_MAX, num_frame // _GROUP_BLOCK)))
        rng = stream("epoch order", *self.key)
        # Another block length and grid in every epoch: frames that could not meet in one can meet in the next.
        self.block = block = max(1, block - int(rng.integers(0, 1 + block // 8)))
        self.start = int(rng.integers(0, block))
        self.shift = int(rng.integers(0, block))
        num_block = -(-(num_frame + self.shift) // block)
        self.block_order = rng.permutation(num_block).astype(np.int32)
        num_group = max(1, num_block // _GROUP_BLOCK)
        self.group_block = np.linspace(0, num_block, num_group + 1).astype(np.int64)
        self.group_end = np.cumsum([self._block_sizes(g).sum() for g in range(num_group)])
        assert self.group_end[-1] == num_frame
        self._group: tuple[int, np.ndarray] | None = None

    def _bounds(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """First frame of the group's blocks on the shifted grid (may be negative), and the blocks themselves."""
        blocks = self.block_order[self.group_block[group] : self.group_block[group + 1]].astype(np.int64)
        return blocks * self.block - self.shift, blocks

    def _block_sizes(self, group: int) -> np.ndarray:
        begin, _ = self._bounds(group)
        return np.minimum(begin + self.block, self.num_frame) - np.maximum(begin, 0)

    def _group_table(self, group: int) -> np.ndarray:
        """Frames of a group in order: rounds x blocks, each round's blocks in an order of its own."""
        if self._group is None or self._group[0] != group:
            begin, _ = self._bounds(group)
            rounds = (self.start + np.arange(self.block) * round_step(self.block)) % self.block
            shuffle = np.argsort(stream("round order", *self.key, group).random((self.block, len(begin))), axis=1)
            frames = begin[shuffle] + rounds[:, None]
            self._group = (group, frames[(frames >= 0) & (frames < self.num_frame)])
        return self._group[1]

    def frame(self, place: int) -> int:
        """The frame (0 .. num_frame - 1, in archive order) at a place of this epoch."""
        group = int(np.searchsorted(self.group_end, place, side="right"))
        first = int(self.group_end[group - 1]) if group else 0
        return int(self._group_table(group)[place - first])


class SourcePlan:
    """The endless order of one source: its shards in archive order, epoch after epoch."""

    def __init__(self, shards: Sequence[ShardIndex], stride: int, seed: int, tag: int = 0) -> None:
        """`tag` keeps apart the orders of several sources with one seed."""
        self.seed, self.tag = seed, tag
        self.ends = np.cumsum([shard.num_frame(stride) for shard in shards]).tolist()
        self.num_frame = self.ends[-1] if self.ends else 0
        self._epochs: dict[int, EpochOrder] = {}

    def locate(self, place: int) -> tuple[int, int]:
        """(shard, row) at a place of the endless order."""
        epoch, place = divmod(place, self.num_frame)
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = EpochOrder(self.num_frame, self.seed, epoch, self.tag)
        return self.split(self._epochs[epoch].frame(place))

    def split(self, frame: int) -> tuple[int, int]:
        """(shard, row) of a frame counted over all shards."""
        shard = bisect_right(self.ends, frame)
        return shard, frame - (self.ends[shard - 1] if shard else 0)


class MixedPlan:
    """Several sources by weight; which source stands at a position is a low-discrepancy function of the position.

    Source after source splits what is left: of `n` positions, floor((n w + phase) / 2^40) belong to it, w its weight
    among the sources not yet served. So after any number of positions each source had its share to within a few
    samples.
    """

    def __init__(self, sources: Sequence[SourcePlan], weights: Sequence[float], seed: int) -> None:
        assert len(sources) == len(weights)
        assert all(weight > 0 for weight in weights)
        self.sources, self.seed = list(sources), seed
        rest = [math.fsum(weights[i:]) for i in range(len(weights))]
        self.shares = [round(w / r * (1 << _WEIGHT_BIT)) for w, r in zip(weights, rest)]
        self.phases = [hash_int("mixture", seed, i) >> (64 - _WEIGHT_BIT) for i in range(len(weights))]

    @property
    def num_frame(self) -> int:
        """Frames of all sources together."""
        return sum(source.num_frame for source in self.sources)

    def source_at(self, position: int) -> tuple[int, int]:
        """(source, place in the source's own order) at a position."""
        for i, (share, phase) in enumerate(zip(self.shares, self.phases)):
            before = (position * share + phase) >> _WEIGHT_BIT
            after = ((position + 1) * share + phase) >> _WEIGHT_BIT
            if after > before or i == len(self.shares) - 1:
                return i, (before if i < len(self.shares) - 1 else position)
            position -= before
        raise AssertionError("the last source takes what is left")

    def locate(self, position: int) -> Place:
        """The frame at a position of training."""
        source, place = self.source_at(position)
        return Place(source, *self.sources[source].locate(place))

    def substitute(self, position: int, attempt: int) -> Place:
        """The frame of the same source that stands in for a bad one at `position`, at attempt 1, 2, ..."""
        source, _ = self.source_at(position)
        plan = self.sources[source]
        return Place(source, *plan.split(hash_int("substitute", self.seed, position, attempt) % plan.num_frame))


@dataclass(frozen=True)
class FixedPlan:
    """A list of frames in a fixed order: what validation reads."""

    places: list[Place]

    @property
    def num_frame(self) -> int:
        return len(self.places)

    def locate(self, position: int) -> Place:
        """The frame at a position of the list."""
        return self.places[position]


def _mix(value: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit moves every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def validation_plan(shards: Sequence[ShardIndex], stride: int, val_seed: int, max_sample: int | None) -> FixedPlan:
    """The `max_sample` (None: all) frames whose keyed hashes of (key, frame, image bytes) are smallest, in their order.

    The hash knows nothing of shards, so the same frames come in the same order however they are packed.
    """
    secret = np.uint64(hash_int("validation", val_seed))
    hashes, owners, rows = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number, shard in enumerate(shards):
        tables = shard.tables()
        selected = tables.rows(stride)
        frame = tables.frame if selected is None else tables.frame[selected]
        key = tables.sample["key_hash"][frame["sample"]]
        content = frame["frame"].astype(np.uint64) << np.uint64(32) | frame["crc"]
        value = _mix(_mix(key ^ secret) ^ content)
        keep = np.arange(len(value))
        if max_sample is not None and len(value) > max_sample:
            keep = np.argpartition(value, max_sample - 1)[:max_sample]
        hashes.append(value[keep])
        owners.append(np.full(len(keep), number))
        rows.append(keep)
    value, owner, row = np.concatenate(hashes), np.concatenate(owners), np.concatenate(rows)
    order = np.lexsort((row, owner, value))[:max_sample]
    return FixedPlan([Place(0, int(owner[i]), int(row[i])) for i in order])
