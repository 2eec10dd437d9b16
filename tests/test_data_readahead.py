"""Blocks are requested before their frames are read, each once, and the data does not depend on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from src.data.dataset import HandDataset
from src.data.order import plan, readahead
from src.data.order.plan import MixedPlan, SourcePlan
from src.data.order.readahead import ReadAhead, pieces
from src.data.shards.build_index import open_indexes
from src.data.shards.index import ShardIndex
from tests.data_shards import native_sample, write_shard

NUM_SHARD, NUM_SAMPLE = 5, 40


@pytest.fixture
def indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ShardIndex]:
    """200 frames in 5 shards, in blocks of 17 and groups of at least 4 blocks."""
    monkeypatch.setattr(plan, "_GROUP_BLOCK", 4)
    monkeypatch.setattr(plan, "_BLOCK_SIZE", 1)
    samples = [native_sample(number) for number in range(NUM_SAMPLE)]
    return open_indexes([write_shard(tmp_path / f"{i}.tar", samples) for i in range(NUM_SHARD)])


def mixed(indexes: list[ShardIndex], stride: int = 1) -> MixedPlan:
    return MixedPlan([SourcePlan(indexes, stride, 0)], [1.0], 0)


@pytest.mark.parametrize("start", [0, 75, 460])
def test_blocks_are_requested_before_they_are_read(indexes: list[ShardIndex], start: int) -> None:
    order = mixed(indexes)
    (source,) = order.sources
    assert source.epoch(0).block == 17
    assert len(source.epoch(0).group_end) == 3
    reader = ReadAhead(order, [indexes])
    reader._work = lambda: None  # keep the requests in the queue
    done = 0
    for position in range(start, start + 2 * source.num_frame, 8):
        reader.advance(range(position, position + 8))
        requested = list(reader.queue)
        known = {frame for _, begin, end in requested for frame in range(begin, end)}
        epoch = position // source.num_frame
        batch = [source.epoch(p // source.num_frame).frame(p % source.num_frame) for p in range(position, position + 7)]
        assert set(batch) <= known
        if position == start:  # the current group in order, and a first block of the next
            group, at, size = source.epoch(epoch).find(position % source.num_frame)
            num_block = len(source.epoch(epoch).blocks(group))
            assert [begin for _, begin, _ in requested[:num_block]] == sorted(
                begin for _, begin, _ in requested[:num_block]
            )
            assert len(requested) <= num_block + 1 + round((at + 8) / size * num_block)
        done = len(requested)
    assert done <= 12 * 4 + 1  # three epochs and a bit, and no block twice


def test_requests_cover_the_bytes_of_the_samples(indexes: list[ShardIndex], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []

    def advise(file: int, offset: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        calls.append((os.readlink(f"/proc/self/fd/{file}"), offset, offset + size))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    (source,) = mixed(indexes).sources
    assert pieces(source, 34, 51) == [(0, 34, 39), (1, 0, 10)]
    for shard, first, last in pieces(source, 34, 51):
        readahead.prefetch(indexes[shard], 1, first, last)
    spans = [[(int(s["offset"]), int(s["offset"] + s["size"])) for s in index.tables().sample] for index in indexes]
    assert [call[1:] for call in calls] == [(spans[0][34][0], spans[0][39][1]), (spans[1][0][0], spans[1][10][1])]
    assert [Path(call[0]).name for call in calls] == ["0.tar", "1.tar"]
    indexes[2].shard.unlink()
    readahead.prefetch(indexes[2], 1, 0, 1)  # no error: the read will raise it


def test_read_ahead_changes_no_data(indexes: list[ShardIndex], monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> list[str]:
        dataset = HandDataset([indexes], mixed(indexes), stride=1, hand_model="mano", img_size=16, expansion_ratio=1.5)
        found = [key for at in range(0, 96, 8) for key in dataset.__getitems__(range(at, at + 8)).batch.key]
        assert dataset.readahead is not None
        assert dataset.readahead.is_on == is_on
        if dataset.readahead._thread:
            dataset.readahead._thread.join()
        assert not dataset.readahead.queue
        return found

    is_on = True
    with_it = keys()
    monkeypatch.setattr(readahead, "available_memory", lambda: 1000.0)
    is_on = False
    assert keys() == with_it
