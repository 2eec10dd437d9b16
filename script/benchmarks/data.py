"""`script/bench.py data`: how fast shards are indexed, read, decoded, cropped and augmented, and how fast a run starts.

The shards are made in a temporary folder: 640x480 images whose files are as large as a photograph's in jpeg (quality
90) and webp (quality 80), hands of 120 to 200 px, all augmentation on. Rates are of one process with one OpenCV thread,
that is, per core.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from script.benchmarks.measurement import Figure, Status, seconds_of, seconds_per_call
from script.benchmarks.shards import (
    PATCH,
    QUALITY,
    bench_dataset,
    noise_image,
    records,
    shards_of,
    worker_memory,
    write_big_indexes,
)
from src.data.image import decode_image
from src.data.loader import collate
from src.data.shards.build_index import build_index, open_indexes
from src.data.shards.index import ShardIndex, index_path
from src.data.shards.reader import ShardReader
from src.data.shards.writer import write_shard
from src.geometry.patch import Aim, view_of_patch, warp_image

BIG_NUM_FRAME = 20_000_000
BIG_NUM_SHARD = 10_000


# seconds of a measurement, samples in the shard of images (a multiple of the batch), copies of it for cold reads,
# samples in the shard of annotations
EFFORT = {"quick": (1.5, 64, 16, 2000), "full": (10.0, 256, 24, 8000)}
_BATCH = 32
_LEAST_RATIO = {"jpg": 0.65, "webp": 0.85}
_SCALES = (0.25, 0.5, 0.75, 1.0)  # patch px per image px; the images above are cropped at 0.54 to 1.19, median 0.82


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--quick", action="store_true", help="a few seconds: less to read, shorter measurements")


def run(args: argparse.Namespace, status: Status) -> list[Figure]:
    """Measure decoding, annotations, index, cold reads and start-up."""
    cv2.setNumThreads(0)
    seconds, num_image, num_copy, num_window = EFFORT["quick" if args.quick else "full"]
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        figures = []
        for kind in QUALITY:
            status(f"{kind}: decoding, cropping, augmenting")
            figures += _pixel_figures(Path(folder) / kind, kind, num_image, seconds)
        figures += _crop_figures(seconds / 3)
        status("annotations and index")
        figures += _annotation_figures(Path(folder) / "note", num_window, seconds / 3)
        figures += _index_figures(Path(folder))
        status("cold reads")
        figures += _cold_figures(Path(folder) / "cold", shards_of(Path(folder) / "jpg")[0], num_copy)
        status(f"start-up from {BIG_NUM_FRAME:,} windows")
        figures += _start_figures(Path(folder) / "big", Path(folder) / "jpg")
        return figures


def _pixel_figures(folder: Path, kind: str, num_image: int, seconds: float) -> list[Figure]:
    """The rates of decoding alone and of whole samples, and their ratio."""
    write_shard(records(num_image, kind), folder / "000000.tar")
    (index,) = open_indexes(shards_of(folder))
    dataset, reader = bench_dataset([index]), ShardReader(index, stride=1)
    encoded = [reader.read(row)[3] for row in range(_BATCH)]

    def only_decode(_: int) -> None:
        for image in encoded:
            decode_image(image)

    def load(batch: int) -> None:
        collate(dataset.__getitems__(range(_BATCH * batch, _BATCH * (batch + 1))))

    times = seconds_per_call((only_decode, load), seconds, num_image // _BATCH, time.thread_time)
    decode, full = (s / _BATCH for s in times)
    height, width = decode_image(encoded[0]).shape[:2]
    size = f"{width}x{height}, {np.mean([len(e) for e in encoded]) / 1000:.0f} kB"
    return [
        Figure(f"decode only, {kind}", 1 / decode, "images/s", note=size),
        Figure(
            f"full sample, {kind}", 1 / full, "samples/s", note=f"to {dataset.img_size} px, all augmentation, batches"
        ),
        Figure(f"full over decode, {kind}", decode / full, "", at_least=_LEAST_RATIO[kind]),
    ]


def _crop_figures(seconds: float) -> list[Figure]:
    """Cutting a patch out of a decoded image, by scale."""
    image = np.tile(noise_image(0), (4, 3, 1))
    height, width = image.shape[:2]
    focal, centre = np.array([width, width]), np.array([0.5 * (width - 1), 0.5 * (height - 1)])

    def crop(scale: float) -> Callable[[int], object]:
        half = 0.25 * PATCH / scale
        aim = Aim(np.concatenate([centre - half, centre + half]), focal, centre, True, 2.0, roll=0.5)
        view = view_of_patch(aim, PATCH)
        return lambda _: warp_image(image, view, PATCH)

    times = seconds_per_call([crop(scale) for scale in _SCALES], seconds, 4, time.thread_time)
    return [
        Figure(f"crop at scale {scale:g}", 1000 * s, "ms", note=f"to {PATCH} px, rolled by 29 degrees")
        for scale, s in zip(_SCALES, times)
    ]


def _annotation_figures(folder: Path, num: int, seconds: float) -> list[Figure]:
    """Annotations of single frames in training order, none of them cached."""
    write_shard(records(num, "jpg", num_image=1), folder / "000000.tar")
    dataset = bench_dataset(open_indexes(shards_of(folder)))
    (per_call,) = seconds_per_call(
        [lambda i: dataset.annotation(dataset.plan.locate(i))], seconds, num, time.thread_time
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
    slowest = max(
        seconds_of(lambda first=first: bench_dataset(indexes).__getitems__(range(first, first + 32)))
        for first in (0, num_frame // 3, num_frame - 40, 5 * num_frame + 12_345)
    )
    memory, own = worker_memory(indexes)
    note = f"{num_frame:,} windows in {len(shards)} shards"
    return [
        Figure("open the index files", opened, "s", note=note),
        Figure("open, and the first batch", opened + slowest, "s", at_most=5.0, note="slowest of 4, batch 32"),
        Figure("memory of a worker", memory, "MB", note="resident, shared pages included"),
        Figure("memory of a worker, its own", own, "MB", note="the cost of one more worker"),
    ]


def _cold_figures(folder: Path, shard: Path, num_copy: int) -> list[Figure]:
    """Rates of reading `num_copy` copies of an indexed shard without decoding: from disk, in training order with and
    without readahead and sequentially, and from the page cache."""
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
        shard.read_bytes()
