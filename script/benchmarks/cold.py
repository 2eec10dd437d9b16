"""Reads of shards that are not in the page cache: in training order, with and without reading ahead, and end to end."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from script.benchmarks.measurement import Figure
from script.benchmarks.shards import bench_dataset
from src.data.shards.build_index import open_indexes
from src.data.shards.index import ShardIndex, index_path

_CHUNK = 4 << 20
_BATCH = 32


def cold_figures(folder: Path, shard: Path, num_copy: int) -> list[Figure]:
    """Rates of reading `num_copy` copies of an indexed shard from the disk; pictures are not decoded."""
    folder.mkdir()
    shards = [folder / f"{number:03d}.tar" for number in range(num_copy)]
    for copy in shards:
        shutil.copy2(shard, copy)  # with its time, so that the index stays valid
        shutil.copy2(index_path(shard), index_path(copy))
    indexes = open_indexes(shards)
    size = sum(index.shard_size for index in indexes) / 1e6
    rates, requests = {}, {}
    ways = {"alone": _in_order_alone, "sequential": _from_end_to_end, "order": _in_order, "warm": _in_order}
    for name, read in ways.items():
        if name != "warm":
            _forget(shards)
        before, start = _disk_reads(folder), time.perf_counter()
        read(indexes)
        rates[name] = size / (time.perf_counter() - start)
        requests[name] = _request_size(before, _disk_reads(folder))
    what = f"{size:,.0f} MB; the disk's requests were of {{}}"
    return [
        Figure("cold, sequential", rates["sequential"], "MB/s", note=what.format(requests["sequential"])),
        Figure("cold, training order", rates["order"], "MB/s", note=what.format(requests["order"])),
        Figure("cold, without reading ahead", rates["alone"], "MB/s", note=what.format(requests["alone"])),
        Figure("training order, page cache", rates["warm"], "MB/s", note="no disk: reading, checksums, parsing"),
    ]


def _forget(shards: list[Path]) -> None:
    """Take the shards out of the page cache."""
    for shard in shards:
        with shard.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_order(indexes: list[ShardIndex], read_ahead: bool = True) -> None:
    """Every sample of an epoch, in the order of training."""
    dataset = bench_dataset(indexes)
    for position in range(len(dataset)):
        if read_ahead and dataset.readahead and position % _BATCH == 0:
            dataset.readahead.advance(range(position, position + _BATCH))
        dataset.fetch(dataset.plan.locate(position))


def _in_order_alone(indexes: list[ShardIndex]) -> None:
    _in_order(indexes, read_ahead=False)


def _from_end_to_end(indexes: list[ShardIndex]) -> None:
    for index in indexes:
        with index.shard.open("rb", buffering=0) as file:
            while file.read(_CHUNK):
                pass


def _disk_reads(folder: Path) -> tuple[int, int] | None:
    """(requests, sectors) that the folder's disk has read so far, for all programs; None where nobody tells."""
    device = folder.stat().st_dev
    try:
        fields = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text(encoding="ascii").split()
    except OSError:
        return None
    return int(fields[0]), int(fields[2])


def _request_size(before: tuple[int, int] | None, after: tuple[int, int] | None) -> str:
    if before is None or after is None or after[0] == before[0]:
        return "unknown size"
    return f"{(after[1] - before[1]) / (after[0] - before[0]) / 2:,.0f} KiB"
