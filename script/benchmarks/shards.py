"""Shards for benchmarks: images as large as photographs with consistent hands, and indexes of millions of windows."""

from __future__ import annotations

import multiprocessing.connection
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import psutil
from omegaconf import OmegaConf

from script.benchmarks.measurement import CONFIG_DIR
from src.data.dataset import HandDataset
from src.data.order.plan import MixedPlan, SourcePlan
from src.data.shards.annotation import joint_extent
from src.data.shards.build_index import open_indexes
from src.data.shards.index import ShardIndex, Tables, index_path, save_index
from src.data.shards.processes import worker_context
from src.data.shards.writer import HandRecord

WIDTH, HEIGHT, PATCH = 640, 480, 224
QUALITY = {"jpg": [cv2.IMWRITE_JPEG_QUALITY, 90], "webp": [cv2.IMWRITE_WEBP_QUALITY, 80]}
FULL = SimpleNamespace(**OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "augmentation/full.yaml")))


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


def records(num: int, kind: str, num_image: int = 16) -> Iterator[HandRecord]:
    """Consistent hands on a few images, every field known."""
    encoded = [cv2.imencode(f".{kind}", noise_image(i), QUALITY[kind])[1].tobytes() for i in range(num_image)]
    rng = np.random.default_rng(0)
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


def bench_dataset(indexes: list[ShardIndex]) -> HandDataset:
    plan = MixedPlan([SourcePlan(indexes, 1, 0)], [1.0], 0)
    return HandDataset([indexes], plan, stride=1, hand_model="mano", img_size=PATCH, expansion_ratio=2.0, augment=FULL)


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def write_big_indexes(folder: Path, shard: Path, num_frame: int, num_shard: int) -> None:
    """Indexes of `num_frame` windows in `num_shard` shards that take no space: every shard is a hard link to `shard`,
    every row repeats one of its rows."""
    folder.mkdir()
    (index,) = open_indexes([shard])
    tables = index.tables()
    num_frame //= num_shard
    rows = np.arange(num_frame) % len(tables.sample)
    sample, frame = tables.sample[rows], tables.frame[rows].copy()
    frame["sample"] = np.arange(num_frame)
    first = folder / "000000.tar"
    first.hardlink_to(shard)
    big = ShardIndex(
        first, index.shard_size, index.shard_mtime_ns, num_frame, [num_frame], {}, [], in_memory=Tables(sample, frame)
    )
    save_index(big, index_path(first))
    for number in range(1, num_shard):
        link = folder / f"{number:06d}.tar"
        link.hardlink_to(shard)
        index_path(link).hardlink_to(index_path(first))


def worker_memory(indexes: list[ShardIndex]) -> tuple[float, float]:
    """(resident, private) MB of a forked worker after 12 batches of 32."""
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
    memory = psutil.Process().memory_full_info()
    send.send((memory.rss / 2**20, memory.uss / 2**20))
