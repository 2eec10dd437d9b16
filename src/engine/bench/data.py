"""`script/bench.py data`: how fast shards are indexed, read, decoded, cropped and augmented, and how fast a run starts.

Everything is made on the spot in a temporary folder: pictures of 640x480 with the sizes that photographs have as jpeg
(quality 90) and webp (quality 80), hands of 120 to 200 px, all augmentation on. Rates are those of one process, and
OpenCV is kept to one thread, so they are per core.
"""

from __future__ import annotations

import argparse
import multiprocessing.connection
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np

from src.data.convert.native import HandRecord, write_shards
from src.data.dataset import HandDataset
from src.data.index import FRAME, SAMPLE, ShardIndex, Tables, index_path, load_index, save_index
from src.data.index_build import build_index, open_indexes, worker_context
from src.data.plan import MixedPlan, SourcePlan
from src.data.sample import decode_image
from src.engine.bench.figure import Figure, seconds_per_call

WIDTH, HEIGHT, PATCH = 640, 480, 224
BIG_NUM_FRAME = 20_000_000
BIG_NUM_SHARD = 10_000
# config/augmentation/full.yaml; kept here so that the figures of two versions stay comparable
FULL = SimpleNamespace(
    scale_z_range=[0.9, 1.1],
    scale_f_range=[0.9, 1.1],
    persp_rot_max=10.0,
    rot_max=180.0,
    shift_max=0.1,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    noise_std=4.0,
    blur_max=1.0,
    occlusion_prob=0.3,
)


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    seconds: float  # of each measurement
    num_picture: int  # samples in the shard with pictures
    num_window: int  # in the shard for annotations; more than a reader keeps


EFFORT = {"quick": Effort(1.5, 64, 2000), "full": Effort(10.0, 256, 8000)}
_QUALITY = {"jpg": [cv2.IMWRITE_JPEG_QUALITY, 90], "webp": [cv2.IMWRITE_WEBP_QUALITY, 80]}
_LEAST_RATIO = {"jpg": 0.65, "webp": 0.85}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--quick", action="store_true", help="a few seconds: less to read, shorter measurements")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace, say: Callable[[str], None]) -> list[Figure]:
    """Measure everything; `say` is told what is going on."""
    cv2.setNumThreads(0)
    effort = EFFORT["quick" if args.quick else "full"]
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        figures = []
        for kind in _QUALITY:
            say(f"{kind}: decoding, cropping, augmenting")
            figures += _pixel_figures(Path(folder) / kind, kind, effort, args.seed)
        say("annotations and index")
        figures += _annotation_figures(Path(folder) / "note", effort, args.seed)
        figures += _index_figures(Path(folder))
        say(f"start-up from {BIG_NUM_FRAME:,} windows")
        figures += _start_figures(Path(folder) / "big", Path(folder) / "jpg")
        return figures


@lru_cache(maxsize=64)
def picture(seed: int) -> np.ndarray:
    """[480, 640, 3] uint8 with details of all sizes (amplitude falls with frequency, as in photographs) and grain."""
    rng = np.random.default_rng(seed)
    out = 5.5 * rng.standard_normal((HEIGHT, WIDTH, 1)).astype(np.float32) + np.zeros(3, np.float32)
    for octave in range(1, 9):
        shape = (HEIGHT * 2**octave // 512 + 2, WIDTH * 2**octave // 512 + 2, 3)
        detail = rng.standard_normal(shape).astype(np.float32) * 90.0 * 2 ** (-0.9 * octave)
        out += cv2.resize(detail, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + out, 0, 255).astype(np.uint8)


def _records(num: int, kind: str, seed: int, num_picture: int = 16) -> Iterator[HandRecord]:
    """Consistent hands on a few pictures, every field known."""
    encoded = [cv2.imencode(f".{kind}", picture(seed + i), _QUALITY[kind])[1].tobytes() for i in range(num_picture)]
    rng = np.random.default_rng(seed)
    focal, princpt = np.array([600.0, 600.0]), np.array([0.5 * (WIDTH - 1), 0.5 * (HEIGHT - 1)])
    for number in range(num):
        center = [rng.uniform(-120, 120), rng.uniform(-70, 70), rng.uniform(500, 750)]
        joint_cam = rng.uniform(-75, 75, (21, 3)) * (1, 1, 0.4) + center
        joint_img = joint_cam[:, :2] / joint_cam[:, 2:] * focal + princpt
        yield HandRecord(
            f"{number:07d}",
            encoded[number % num_picture],
            kind,
            "left" if number % 2 else "right",
            "bench",
            hand_model="mano",
            flat_hand_mean=True,
            hand_bbox=np.concatenate([joint_img.min(axis=0), joint_img.max(axis=0)]),
            joint_img=joint_img,
            joint_cam=joint_cam,
            mano_pose=rng.normal(0, 0.4, 48),
            mano_shape=rng.normal(0, 1, 10),
            focal=focal,
            princpt=princpt,
        )


def _dataset(indexes: list[ShardIndex], seed: int = 0) -> HandDataset:
    plan = MixedPlan([SourcePlan(indexes, 1, seed)], [1.0], seed)
    return HandDataset(
        [indexes], plan, stride=1, hand_model="mano", img_size=PATCH, expansion_ratio=2.0, augment=FULL, seed=seed
    )


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def _pixel_figures(folder: Path, kind: str, effort: Effort, seed: int) -> list[Figure]:
    """Decode-only rate, full sample rate and their ratio."""
    write_shards(_records(effort.num_picture, kind, seed), folder, num_per_shard=effort.num_picture)
    dataset = _dataset(open_indexes(_shards(folder)), seed)
    reader = dataset._reader(dataset.plan.locate(0))
    encoded = [reader.read(row)[3] for row in range(16)]

    def sample(position: int) -> None:
        reader.clips.clear()  # as in a large data set, where no sample is met twice
        dataset.__getitems__([position])

    decode, full = seconds_per_call((lambda i: decode_image(encoded[i % 16]), sample), effort.seconds, num=64)
    size = f"{WIDTH}x{HEIGHT}, {np.mean([len(e) for e in encoded]) / 1000:.0f} kB"
    return [
        Figure(f"decode only, {kind}", 1 / decode, "images/s", note=size),
        Figure(f"full sample, {kind}", 1 / full, "samples/s", note=f"to {PATCH} px, all augmentation"),
        Figure(f"full over decode, {kind}", decode / full, "", at_least=_LEAST_RATIO[kind]),
    ]


def _annotation_figures(folder: Path, effort: Effort, seed: int) -> list[Figure]:
    """Annotations of single frames in training order, every sample parsed anew (none is in the cache)."""
    num = effort.num_window
    write_shards(_records(num, "jpg", seed, num_picture=1), folder, num_per_shard=num)
    dataset = _dataset(open_indexes(_shards(folder)), seed)
    (per_call,) = seconds_per_call([lambda i: dataset.annotation(dataset.plan.locate(i))], effort.seconds / 3, num)
    return [Figure("annotations", 1 / per_call, "windows/s", at_least=10_000, note="order, read, checksum, parse")]


def _index_figures(folder: Path) -> list[Figure]:
    """Building an index from a shard in the page cache: with pictures of their usual size, and counted in samples."""
    (large,), (small,) = _shards(folder / "jpg"), _shards(folder / "note")
    figures = []
    for shard, unit in ((large, "MB/s"), (small, "windows/s")):
        (per_call,) = seconds_per_call([lambda _, shard=shard: build_index(shard)], 0.0, 1)
        amount = shard.stat().st_size / 1e6 if unit == "MB/s" else build_index(shard).num_frame()
        figures.append(Figure(f"index build, {unit}", amount / per_call, unit, note="one process, page cache"))
    return figures


def _start_figures(folder: Path, source: Path) -> list[Figure]:
    """Opening the indexes of twenty million windows, and the first batch of 32 at several places of the order."""
    _write_big_indexes(folder, _shards(source)[0])
    shards = _shards(folder)
    start = time.perf_counter()
    indexes = open_indexes(shards)
    opened = time.perf_counter() - start
    num_frame = sum(index.num_frame() for index in indexes)
    slowest = 0.0
    for position in (0, num_frame // 3, num_frame - 40, 5 * num_frame + 12_345):
        start = time.perf_counter()
        rows = _dataset(indexes).__getitems__(range(position, position + 32))
        assert len(rows.rows) == 32
        assert not rows.bad
        slowest = max(slowest, time.perf_counter() - start)
    memory, own = _worker_memory(indexes)
    note = f"{num_frame:,} windows in {len(shards)} shards"
    return [
        Figure("open the index files", opened, "s", note=note),
        Figure(
            "open, and the first batch", opened + slowest, "s", at_most=5.0, note="slowest of 4 positions, batch 32"
        ),
        Figure("memory of a worker", memory, "MB", note="resident, shared pages included"),
        Figure("memory of a worker, its own", own, "MB", note="what one more worker costs"),
    ]


def _write_big_indexes(folder: Path, shard: Path) -> None:
    """Indexes of many large shards without their bytes: every shard is a link to one, every row one of its rows."""
    folder.mkdir()
    small, (index,) = index_path(shard), open_indexes([shard])
    tables = index.tables()
    num_frame = BIG_NUM_FRAME // BIG_NUM_SHARD
    rows = np.arange(num_frame) % len(tables.sample)
    sample, frame = tables.sample[rows], tables.frame[rows].copy()
    frame["sample"] = np.arange(num_frame)
    assert sample.dtype == SAMPLE
    assert frame.dtype == FRAME
    first = folder / "000000.tar"
    first.hardlink_to(shard)
    big = ShardIndex(
        first, index.shard_size, index.shard_mtime_ns, num_frame, [num_frame], {}, [], in_memory=Tables(sample, frame)
    )
    save_index(big, index_path(first))
    assert small.is_file()
    for number in range(1, BIG_NUM_SHARD):
        link = folder / f"{number:06d}.tar"
        link.hardlink_to(shard)
        index_path(link).hardlink_to(index_path(first))
    assert load_index(first, index_path(first)) is not None


def _worker_memory(indexes: list[ShardIndex]) -> tuple[float, float]:
    """(resident, private) MB of a forked worker after 12 batches of 32; (0, 0) where the system does not tell."""
    context = worker_context()
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(indexes, send))
    process.start()
    result = receive.recv()
    process.join()
    return result


def _work(indexes: list[ShardIndex], send: multiprocessing.connection.Connection) -> None:
    dataset = _dataset(indexes)
    for batch in range(12):
        dataset.__getitems__(range(32 * batch, 32 * batch + 32))
    rollup = Path("/proc/self/smaps_rollup")
    fields = {}
    if rollup.is_file():
        lines = (line.split() for line in rollup.read_text().splitlines()[1:])
        fields = {words[0]: int(words[1]) / 1024 for words in lines}
    own = fields.get("Private_Clean:", 0.0) + fields.get("Private_Dirty:", 0.0)
    send.send((fields.get("Rss:", 0.0), own))
