"""The data order as a pure function: position -> (source, shard, row), from seed and position alone.

There is no shuffle buffer and no state: any worker of any rank computes the frame at any position, and a run resumes
from one integer. The order of one epoch of a source of N frames:

    frames in archive order, cut into blocks of L consecutive frames (about 8 MB of the shards)
    blocks permuted (seed, epoch), then split into groups
    a group is read in L rounds; each round takes the frame at one index from every block of the group

Reads are thus confined to a few hundred blocks at a time, which src/data/order/readahead.py has prefetched
sequentially, and src/data/order/spacing.py keeps consecutive frames of a clip out of the same batch. Memory: one
permutation of N / L blocks per epoch and one table per group.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from src.data.order.spacing import largest_prime, rounds_of_epoch
from src.data.rng import hash_int, stream
from src.data.shards.index import ShardIndex

_GROUP_BLOCK = 256  # minimum number of blocks per group, in a source with that many
_BLOCK_SIZE = 8 << 20  # target size of a block, bytes of the shards
_BLOCK_MIN, _BLOCK_MAX = 17, 251  # frames
_APART = 1024  # minimum number of positions between neighbouring frames, in a source that is large enough
_WEIGHT_BIT = 40  # weights are exact to 2^-40
HALVES = ("a", "b")  # of the samples: choose settings on one, report the other


class Place(NamedTuple):
    """The location of a frame: source, shard of that source, row among the shard's frames selected by the stride."""

    source: int
    shard: int
    row: int


def block_length(num_frame: int, frame_size: float) -> int:
    """Frames per block: a prime, so that it does not align with the length of clips."""
    most = min(_BLOCK_MAX, max(_BLOCK_MIN, int(_BLOCK_SIZE / max(1.0, frame_size))))
    return largest_prime(min(num_frame, most, max(5, num_frame // 8)))


def group_count(num_frame: int, block: int) -> int:
    """Groups per epoch, of `_GROUP_BLOCK` blocks or slightly more."""
    return max(1, -(-num_frame // block) // _GROUP_BLOCK)


class EpochOrder:
    """The order of one epoch of one source of `num_frame` frames with a mean size of `frame_size` bytes."""

    def __init__(self, num_frame: int, seed: int, epoch: int, tag: int = 0, frame_size: float = 0.0) -> None:
        assert num_frame > 0
        self.num_frame, self.key = num_frame, (seed, epoch, tag)
        self.block = block_length(num_frame, frame_size)
        num_block = -(-num_frame // self.block)
        self.block_order = stream("epoch order", *self.key).permutation(num_block).astype(np.int32)
        num_group = group_count(num_frame, self.block)
        self.group_block = np.linspace(0, num_block, num_group + 1).astype(np.int64)
        self.group_end = np.cumsum([np.diff(self.blocks(g)).sum() for g in range(num_group)])
        assert self.group_end[-1] == num_frame
        round_size = max(1, int(np.diff(self.group_block).min()) - 1)  # the last block may be shorter
        apart = -(-(_APART - 1) // round_size) + 1
        self.rounds = rounds_of_epoch(self.block, apart, *self.key)
        self._group: tuple[int, np.ndarray] | None = None

    def num_block(self, group: int) -> int:
        """The number of blocks in a group."""
        return int(self.group_block[group + 1] - self.group_block[group])

    def blocks(self, group: int) -> np.ndarray:
        """[n, 2] first frame of each block of a group and the first frame after it, in the permuted order."""
        begin = self.block_order[self.group_block[group] : self.group_block[group + 1]].astype(np.int64) * self.block
        return np.stack([begin, np.minimum(begin + self.block, self.num_frame)], axis=1)

    def _group_table(self, group: int) -> np.ndarray:
        """Frames of a group in reading order: rounds x blocks, with the blocks shuffled in every round."""
        if self._group is None or self._group[0] != group:
            begin = self.blocks(group)[:, 0]
            places = np.array([self.rounds.place(number) for number in range(self.block)])
            shuffle = np.argsort(stream("round order", *self.key, group).random((self.block, len(begin))), axis=1)
            frames = begin[shuffle] + places[:, None]
            self._group = (group, frames[frames < self.num_frame])
        return self._group[1]

    def find(self, place: int) -> tuple[int, int, int]:
        """(group, index in the group, size of the group) of an index into this epoch."""
        group = int(np.searchsorted(self.group_end, place, side="right"))
        first = int(self.group_end[group - 1]) if group else 0
        return group, place - first, int(self.group_end[group]) - first

    def frame(self, place: int) -> int:
        """The frame (0 .. num_frame - 1, in archive order) at an index of this epoch."""
        group, place, _ = self.find(place)
        return int(self._group_table(group)[place])


class SourcePlan:
    """The endless order of one source, epoch after epoch."""

    def __init__(self, shards: Sequence[ShardIndex], stride: int, seed: int, tag: int = 0) -> None:
        """`tag` makes the orders of several sources with the same seed different."""
        self.stride, self.seed, self.tag = stride, seed, tag
        self.ends = np.cumsum([shard.num_frame(stride) for shard in shards]).tolist()
        self.num_frame = self.ends[-1] if self.ends else 0
        self.frame_size = sum(shard.shard_size for shard in shards) / max(1, self.num_frame)
        self._epochs: dict[int, EpochOrder] = {}

    @property
    def group_size(self) -> float:
        """Mean size of a group, bytes of the shards."""
        num_group = group_count(self.num_frame, block_length(self.num_frame, self.frame_size))
        return self.frame_size * self.num_frame / num_group

    def epoch(self, epoch: int) -> EpochOrder:
        """The order of an epoch; the last two are cached."""
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = EpochOrder(self.num_frame, self.seed, epoch, self.tag, self.frame_size)
        return self._epochs[epoch]

    def locate(self, place: int) -> tuple[int, int]:
        """(shard, row) at an index of the endless order."""
        epoch, place = divmod(place, self.num_frame)
        return self.split(self.epoch(epoch).frame(place))

    def split(self, frame: int) -> tuple[int, int]:
        """(shard, row) of a frame numbered across all shards."""
        shard = bisect_right(self.ends, frame)
        return shard, frame - (self.ends[shard - 1] if shard else 0)


class MixedPlan:
    """Several sources mixed by weight; the source is a low-discrepancy function of the position.

    The sources take their share one after the other: of `n` remaining positions, floor((n w + phase) / 2^40) belong to
    a source, where w is its weight among the remaining sources. After any number of positions each source has had its
    share to within a few samples.
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
        """Number of frames of all sources."""
        return sum(source.num_frame for source in self.sources)

    def source_at(self, position: int) -> tuple[int, int]:
        """(source, index in the source's own order) at a position."""
        for i, (share, phase) in enumerate(zip(self.shares, self.phases)):
            before = (position * share + phase) >> _WEIGHT_BIT
            after = ((position + 1) * share + phase) >> _WEIGHT_BIT
            if after > before or i == len(self.shares) - 1:
                return i, (before if i < len(self.shares) - 1 else position)
            position -= before
        raise AssertionError("the last source takes all remaining positions")

    def locate(self, position: int) -> Place:
        """The frame at a position of training."""
        source, place = self.source_at(position)
        return Place(source, *self.sources[source].locate(place))

    def substitute(self, position: int, attempt: int) -> Place:
        """The frame of the same source that replaces a bad one at `position`, for attempt 1, 2, ..."""
        source, _ = self.source_at(position)
        plan = self.sources[source]
        return Place(source, *plan.split(hash_int("substitute", self.seed, position, attempt) % plan.num_frame))


@dataclass(frozen=True)
class FixedPlan:
    """A list of frames in a fixed order, for validation."""

    places: list[Place]

    @property
    def num_frame(self) -> int:
        return len(self.places)

    def locate(self, position: int) -> Place:
        """The frame at a position of the list."""
        return self.places[position]


def _mix(value: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit affects every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def in_half(key_hash: np.ndarray, half: str) -> np.ndarray:
    """[N] bool: whether samples with these key hashes [N] uint64 belong to half `a` or `b`.

    Decided by one bit of a keyed hash of the sample's key: a clip is never split, and the half does not depend on
    shards or seeds.
    """
    bit = _mix(key_hash ^ np.uint64(hash_int("half"))) >> np.uint64(63)
    return bit == HALVES.index(half)


def validation_plan(
    shards: Sequence[ShardIndex], stride: int, val_seed: int, max_sample: int | None, half: str | None = None
) -> FixedPlan:
    """The `max_sample` (None: all) frames with the smallest keyed hashes of (key, frame, image bytes), in that order.

    The hash does not depend on the shards, so selection and order stay the same however the frames are packed.
    `half`: only samples of that half (`in_half`).
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
        keep = np.arange(len(value)) if half is None else np.flatnonzero(in_half(key, half))
        if max_sample is not None and len(keep) > max_sample:
            keep = keep[np.argpartition(value[keep], max_sample - 1)[:max_sample]]
        hashes.append(value[keep])
        owners.append(np.full(len(keep), number))
        rows.append(keep)
    value, owner, row = np.concatenate(hashes), np.concatenate(owners), np.concatenate(rows)
    order = np.lexsort((row, owner, value))[:max_sample]
    return FixedPlan([Place(0, int(owner[i]), int(row[i])) for i in order])
