"""Reading shards that are not in the page cache: in training order with and without readahead, and sequentially."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from script.benchmarks.measurement import Figure, seconds_of
from script.benchmarks.shards import bench_dataset
from src.data.shards.build_index import open_indexes
from src.data.shards.index import ShardIndex, index_path

_CHUNK = 4 << 20
_BATCH = 32


def cold_figures(folder: Path, shard: Path, num_copy: int) -> list[Figure]:
    """Rates of reading `num_copy` copies of an indexed shard from disk, without decoding the images."""
    folder.mkdir()
    shards = [folder / f"{number:03d}.tar" for number in range(num_copy)]
    for copy in shards:
        shutil.copy2(shard, copy)  # keeps the mtime, so that the index stays valid
        shutil.copy2(index_path(shard), index_path(copy))
    indexes = open_indexes(shards)
    size = sum(index.shard_size for index in indexes) / 1e6
    rates, requests = {}, {}
    ways = {
        "alone": lambda indexes: _in_order(indexes, read_ahead=False),
        "sequential": _sequentially,
        "order": _in_order,
        "warm": _in_order,
    }
    for name, read in ways.items():
        if name != "warm":
            _evict(shards)
        before = _disk_reads(folder)
        rates[name] = size / seconds_of(lambda read=read: read(indexes))
        requests[name] = _request_size(before, _disk_reads(folder))
    what = f"{size:,.0f} MB; mean size of a disk request {{}}"
    return [
        Figure("cold, sequential", rates["sequential"], "MB/s", note=what.format(requests["sequential"])),
        Figure("cold, training order", rates["order"], "MB/s", note=what.format(requests["order"])),
        Figure("cold, without reading ahead", rates["alone"], "MB/s", note=what.format(requests["alone"])),
        Figure("training order, page cache", rates["warm"], "MB/s", note="no disk: reading, checksums, parsing"),
    ]


def _evict(shards: list[Path]) -> None:
    """Remove the shards from the page cache."""
    for shard in shards:
        with shard.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_order(indexes: list[ShardIndex], read_ahead: bool = True) -> None:
    """Read every sample of an epoch in training order."""
    dataset = bench_dataset(indexes)
    for position in range(len(dataset)):
        if read_ahead and dataset.ahead and position % _BATCH == 0:
            dataset.ahead.go_on(range(position, position + _BATCH))
        dataset.fetch(dataset.plan.locate(position))


def _sequentially(indexes: list[ShardIndex]) -> None:
    for index in indexes:
        with index.shard.open("rb", buffering=0) as file:
            while file.read(_CHUNK):
                pass


def _disk_reads(folder: Path) -> tuple[int, int] | None:
    """(requests, sectors) that the folder's disk has read so far, for all programs; None without counters."""
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
