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
    reads = {
        "cold, without reading ahead": lambda: _in_order(indexes, read_ahead=False),
        "cold, sequential": lambda: _sequentially(shards),
        "cold, training order": lambda: _in_order(indexes),
        "training order, page cache": lambda: _in_order(indexes),
    }
    figures = []
    for name, read in reads.items():
        if name.startswith("cold"):
            _evict(shards)
        figures.append(Figure(name, size / seconds_of(read), "MB/s", note=f"{size:,.0f} MB"))
    return figures


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
        if read_ahead and dataset.readahead and position % _BATCH == 0:
            dataset.readahead.advance(range(position, position + _BATCH))
        dataset.fetch(dataset.plan.locate(position))


def _sequentially(shards: list[Path]) -> None:
    for shard in shards:
        with shard.open("rb", buffering=0) as file:
            while file.read(_CHUNK):
                pass
