"""Shards for benchmarks: images as large as photographs with consistent hands, and indexes of millions of windows."""

from __future__ import annotations

import multiprocessing.connection
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np

from src.data.dataset import HandDataset
from src.data.order.plan import MixedPlan, SourcePlan
from src.data.shards.annotation import joint_extent
from src.data.shards.build_index import open_indexes
from src.data.shards.index import FRAME, SAMPLE, ShardIndex, Tables, index_path, load_index, save_index
from src.data.shards.processes import worker_context
from src.data.shards.writer import HandRecord

WIDTH, HEIGHT, PATCH = 640, 480, 224
QUALITY = {"jpg": [cv2.IMWRITE_JPEG_QUALITY, 90], "webp": [cv2.IMWRITE_WEBP_QUALITY, 80]}
# config/augmentation/full.yaml, copied so that figures of different versions stay comparable
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


@lru_cache(maxsize=64)
def noise_image(seed: int) -> np.ndarray:
    """[480, 640, 3] uint8: detail at all scales (amplitude falls with frequency, as in photographs) and grain."""
    rng = np.random.default_rng(seed)
    out = 5.5 * rng.standard_normal((HEIGHT, WIDTH, 1)).astype(np.float32) + np.zeros(3, np.float32)
    for octave in range(1, 9):
        shape = (HEIGHT * 2**octave // 512 + 2, WIDTH * 2**octave // 512 + 2, 3)
        detail = rng.standard_normal(shape).astype(np.float32) * 90.0 * 2 ** (-0.9 * octave)
        out += cv2.resize(detail, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + out, 0, 255).astype(np.uint8)


def records(num: int, kind: str, seed: int, num_image: int = 16) -> Iterator[HandRecord]:
    """Consistent hands on a few images, every field known."""
    encoded = [cv2.imencode(f".{kind}", noise_image(seed + i), QUALITY[kind])[1].tobytes() for i in range(num_image)]
    rng = np.random.default_rng(seed)
    focal, princpt = np.array([600.0, 600.0]), np.array([0.5 * (WIDTH - 1), 0.5 * (HEIGHT - 1)])
    for number in range(num):
        center = [rng.uniform(-120, 120), rng.uniform(-70, 70), rng.uniform(500, 750)]
        joint_cam = rng.uniform(-75, 75, (21, 3)) * (1, 1, 0.4) + center
        joint_img = joint_cam[:, :2] / joint_cam[:, 2:] * focal + princpt
        yield HandRecord(
            f"{number:07d}",
            encoded[number % num_image],
            kind,
            "left" if number % 2 else "right",
            "bench",
            hand_model="mano",
            flat_hand_mean=True,
            hand_bbox=joint_extent(joint_img),
            joint_img=joint_img,
            joint_cam=joint_cam,
            mano_pose=rng.normal(0, 0.4, 48),
            mano_shape=rng.normal(0, 1, 10),
            focal=focal,
            princpt=princpt,
        )


def bench_dataset(indexes: list[ShardIndex], seed: int = 0) -> HandDataset:
    plan = MixedPlan([SourcePlan(indexes, 1, seed)], [1.0], seed)
    return HandDataset(
        [indexes], plan, stride=1, hand_model="mano", img_size=PATCH, expansion_ratio=2.0, augment=FULL, seed=seed
    )


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def write_big_indexes(folder: Path, shard: Path, num_frame: int, num_shard: int) -> None:
    """Indexes of `num_frame` windows in `num_shard` shards that take no space: every shard is a hard link to `shard`,
    every row repeats one of its rows."""
    folder.mkdir()
    small, (index,) = index_path(shard), open_indexes([shard])
    tables = index.tables()
    num_frame //= num_shard
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
    for number in range(1, num_shard):
        link = folder / f"{number:06d}.tar"
        link.hardlink_to(shard)
        index_path(link).hardlink_to(index_path(first))
    assert load_index(first, index_path(first)) is not None


def worker_memory(indexes: list[ShardIndex]) -> tuple[float, float]:
    """(resident, private) MB of a forked worker after 12 batches of 32; (0, 0) on systems without smaps_rollup."""
    context = worker_context()
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(indexes, send))
    process.start()
    result = receive.recv()
    process.join()
    return result


def _work(indexes: list[ShardIndex], send: multiprocessing.connection.Connection) -> None:
    dataset = bench_dataset(indexes)
    for batch in range(12):
        dataset.__getitems__(range(32 * batch, 32 * batch + 32))
    rollup = Path("/proc/self/smaps_rollup")
    fields = {}
    if rollup.is_file():
        lines = (line.split() for line in rollup.read_text().splitlines()[1:])
        fields = {words[0]: int(words[1]) / 1024 for words in lines}
    own = fields.get("Private_Clean:", 0.0) + fields.get("Private_Dirty:", 0.0)
    send.send((fields.get("Rss:", 0.0), own))
