"""`script/bench.py data`: how fast shards are indexed, read, decoded, cropped and augmented, and how fast a run starts.

The shards are made in a temporary folder: 640x480 images whose files are as large as a photograph's in jpeg (quality
90) and webp (quality 80), hands of 120 to 200 px, all augmentation on. Rates are of one process with one OpenCV thread,
that is, per core.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from script.benchmarks.cold import cold_figures
from script.benchmarks.measurement import Figure, Status, seconds_of, seconds_per_call
from script.benchmarks.shards import (
    HEIGHT,
    PATCH,
    QUALITY,
    WIDTH,
    bench_dataset,
    records,
    shards_of,
    worker_memory,
    write_big_indexes,
)
from src.data.image import decode_image
from src.data.loader import collate
from src.data.shards.build_index import build_index, open_indexes
from src.data.shards.reader import ShardReader
from src.data.shards.writer import write_shard

BIG_NUM_FRAME = 20_000_000
BIG_NUM_SHARD = 10_000


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    seconds: float  # of each measurement
    num_image: int  # samples in the shard of images, a multiple of the batch
    num_window: int  # samples in the shard of annotations
    num_copy: int  # copies of the shard of images, for cold reads


EFFORT = {"quick": Effort(1.5, 64, 2000, 16), "full": Effort(10.0, 256, 8000, 24)}
_BATCH = 32
_LEAST_RATIO = {"jpg": 0.65, "webp": 0.85}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--quick", action="store_true", help="a few seconds: less to read, shorter measurements")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace, status: Status) -> list[Figure]:
    """Measure decoding, annotations, index, cold reads and start-up."""
    cv2.setNumThreads(0)
    effort = EFFORT["quick" if args.quick else "full"]
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        figures = []
        for kind in QUALITY:
            status(f"{kind}: decoding, cropping, augmenting")
            figures += _pixel_figures(Path(folder) / kind, kind, effort, args.seed)
        status("annotations and index")
        figures += _annotation_figures(Path(folder) / "note", effort, args.seed)
        figures += _index_figures(Path(folder))
        status("cold reads")
        figures += cold_figures(Path(folder) / "cold", shards_of(Path(folder) / "jpg")[0], effort.num_copy)
        status(f"start-up from {BIG_NUM_FRAME:,} windows")
        figures += _start_figures(Path(folder) / "big", Path(folder) / "jpg")
        return figures


def _pixel_figures(folder: Path, kind: str, effort: Effort, seed: int) -> list[Figure]:
    """The rates of decoding alone and of whole samples, and their ratio."""
    write_shard(records(effort.num_image, kind, seed), folder / "000000.tar")
    (index,) = open_indexes(shards_of(folder))
    dataset, reader = bench_dataset([index], seed), ShardReader(index, stride=1)
    encoded = [reader.read(row)[3] for row in range(_BATCH)]

    def only_decode(_: int) -> None:
        for image in encoded:
            decode_image(image)

    def load(batch: int) -> None:
        collate(dataset.__getitems__(range(_BATCH * batch, _BATCH * (batch + 1))))

    num = effort.num_image // _BATCH
    decode, full = (s / _BATCH for s in seconds_per_call((only_decode, load), effort.seconds, num, time.thread_time))
    size = f"{WIDTH}x{HEIGHT}, {np.mean([len(e) for e in encoded]) / 1000:.0f} kB"
    return [
        Figure(f"decode only, {kind}", 1 / decode, "images/s", note=size),
        Figure(f"full sample, {kind}", 1 / full, "samples/s", note=f"to {PATCH} px, all augmentation, batches"),
        Figure(f"full over decode, {kind}", decode / full, "", at_least=_LEAST_RATIO[kind]),
    ]


def _annotation_figures(folder: Path, effort: Effort, seed: int) -> list[Figure]:
    """Annotations of single frames in training order, none of them cached."""
    num = effort.num_window
    write_shard(records(num, "jpg", seed, num_image=1), folder / "000000.tar")
    dataset = bench_dataset(open_indexes(shards_of(folder)), seed)
    (per_call,) = seconds_per_call(
        [lambda i: dataset.annotation(dataset.plan.locate(i))], effort.seconds / 3, num, time.thread_time
    )
    return [Figure("annotations", 1 / per_call, "windows/s", at_least=10_000, note="order, read, checksum, parse")]


def _index_figures(folder: Path) -> list[Figure]:
    """Building the index of a shard in the page cache, in MB/s and in windows/s."""
    (large,), (small,) = shards_of(folder / "jpg"), shards_of(folder / "note")
    figures = []
    for shard, unit in ((large, "MB/s"), (small, "windows/s")):
        (per_call,) = seconds_per_call([lambda _, shard=shard: build_index(shard)], 0.0, 1, time.thread_time)
        amount = shard.stat().st_size / 1e6 if unit == "MB/s" else build_index(shard).num_frame()
        figures.append(Figure(f"index build, {unit}", amount / per_call, unit, note="one process, page cache"))
    return figures


def _start_figures(folder: Path, source: Path) -> list[Figure]:
    """Opening the indexes of twenty million windows, then the first batch of 32 at several positions of the order."""
    write_big_indexes(folder, shards_of(source)[0], BIG_NUM_FRAME, BIG_NUM_SHARD)
    shards = shards_of(folder)
    indexes = []
    opened = seconds_of(lambda: indexes.extend(open_indexes(shards)))
    num_frame = sum(index.num_frame() for index in indexes)
    slowest = 0.0
    for position in (0, num_frame // 3, num_frame - 40, 5 * num_frame + 12_345):
        start = time.perf_counter()
        fetched = bench_dataset(indexes).__getitems__(range(position, position + 32))
        assert len(fetched.batch) == 32
        assert not fetched.bad
        slowest = max(slowest, time.perf_counter() - start)
    memory, own = worker_memory(indexes)
    note = f"{num_frame:,} windows in {len(shards)} shards"
    return [
        Figure("open the index files", opened, "s", note=note),
        Figure("open, and the first batch", opened + slowest, "s", at_most=5.0, note="slowest of 4, batch 32"),
        Figure("memory of a worker", memory, "MB", note="resident, shared pages included"),
        Figure("memory of a worker, its own", own, "MB", note="the cost of one more worker"),
    ]
