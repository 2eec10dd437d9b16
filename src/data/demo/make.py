"""Makes the demo's data set: rendered hands in ordinary WebDataset shards, for training without downloads or licences.

    make_demo_shards(Path("data/demo"), {"train": 12000, "val": 512}, seed=0)

writes `train/000000.tar` ... and `val/000000.tar` ..., 500 samples a shard, and `demo.json`, which says what they were
made from. A sample is a function of (seed, subset, index, image size) alone: the shards are the same to the byte
whatever the number of processes. A shard appears under its name only when it is complete, so an interrupted call goes
on where it stopped. Members of a sample (T = 1 frame; lengths mm, pixel centres at integers):

    jpg              the picture, RGB
    json             handedness, data_source, hand_model, flat_hand_mean, intr_type, has_mano [T], has_intr [T]
    hand_bbox.npy [T, 4] xyxy px · joint_img.npy [T, 21, 2] px · joint_cam.npy [T, 21, 3] · joint_2d_valid.npy,
    joint_3d_valid.npy [T, 21] · mano_pose.npy [T, 48] · mano_shape.npy [T, 10] · focal.npy, princpt.npy [T, 2] px

Left hands are what a left MANO hand would give: the mirror image of a right one, axis-angle y and z negated.

Shape legend: T frames (1), J = 21 joints (OpenPose order), S image side.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.progress import Progress

from src.config import Config
from src.data.demo.hand import HandDraw, draw_hands
from src.data.demo.scene import paint
from src.data.rng import stream
from src.hand.standin.build import build_standin_hand
from src.utils.console import logger, task_bar

VERSION = 4  # raise it whenever a sample of the same seed would come out different
SAMPLE_PER_SHARD = 500
CHUNK = 50  # samples drawn together
MANIFEST = "demo.json"
MIN_SIZE, MAX_SIZE = 64, 512


@dataclass(frozen=True)
class _Shard:
    """One shard to make: samples first .. first + count - 1 of a subset."""

    path: Path
    subset: str
    first: int
    count: int
    seed: int
    img_size: int
    free_rotation: float


def make_demo_shards(
    root: Path,
    num_sample: dict[str, int],
    seed: int,
    img_size: int = 256,
    free_rotation: float = 0.0,
    num_process: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    subsets: Sequence[str] | None = None,
) -> None:
    """Render the demo data set below `root`; returns at once where it is already complete.

    Args:
        root: folder of the data set, created if missing.
        num_sample: subset name -> number of samples, e.g. {"train": 12000, "val": 512}.
        seed: any integer >= 0; subsets of one seed share no sample.
        img_size: side of the pictures, px.
        free_rotation: share of hands turned anywhere on SO(3); the others are seen as hands are photographed.
        num_process: worker processes; None takes one per usable core, 1 works in this process.
        progress: called with (samples done, samples in all) before the first and after each shard; not at all where
            the data set is complete.
        subsets: render these of `num_sample` alone, e.g. ("val",) for an evaluation; None: all.

    Raises:
        ValueError: `root` already holds a demo made from other parameters, or a parameter is out of range.
    """
    root = Path(root)
    manifest = {
        "version": VERSION,
        "hand": _hand_fingerprint(),
        "seed": seed,
        "img_size": img_size,
        "free_rotation": free_rotation,
        "num_sample": dict(num_sample),
    }
    _check(manifest)
    complete = _read_manifest(root, manifest)
    missing = [name for name in (num_sample if subsets is None else subsets) if name not in complete]
    if not missing:
        return
    if progress is not None:
        progress(0, sum(num_sample[name] for name in missing))
    for subset in missing:
        (root / subset).mkdir(parents=True, exist_ok=True)
    _write_manifest(root, {**manifest, "complete": complete})
    how = (seed, img_size, free_rotation)
    shards = [shard for subset in missing for shard in _plan(root, subset, num_sample[subset], *how)]
    total, done = sum(s.count for s in shards), sum(s.count for s in shards if s.path.exists())
    todo = [s for s in shards if not s.path.exists()]
    for count in _run(todo, num_process):
        done += count
        if progress is not None:
            progress(done, total)
    _write_manifest(root, {**manifest, "complete": sorted([*complete, *missing])})


def make_demo_data(cfg: Config, display: Progress, subsets: Sequence[str] | None = None) -> None:
    """Render the demo shards that the configuration asks for and that are missing; `subsets` as in `make_demo_shards`.

    Progress goes to a bar on `display`, or to the log at each quarter if that is disabled.
    """
    demo = cfg.DATA.demo
    if demo is None:
        return
    with task_bar(display, "rendering demo hands") as advance:
        quarter = 0

        def report(done: int, total: int) -> None:
            nonlocal quarter
            if done == 0:
                logger.info(f"rendering {total} demo hands into {cfg.DATA.root}; this happens once")
            elif display.disable and done * 4 // total > quarter:
                quarter = done * 4 // total
                logger.info(f"rendered {done} of {total}")
            advance(done, total)

        make_demo_shards(
            Path(cfg.DATA.root),
            {"train": demo.train_sample, "val": demo.val_sample},
            seed=demo.seed,
            img_size=demo.img_size,
            free_rotation=demo.free_rotation,
            progress=report,
            subsets=subsets,
        )


def _check(manifest: dict[str, Any]) -> None:
    for subset, num in manifest["num_sample"].items():
        if num < 1:
            raise ValueError(f"num_sample[{subset!r}]={num}: must be at least 1")
    if manifest["seed"] < 0:
        raise ValueError(f"seed={manifest['seed']}: must not be negative")
    if not MIN_SIZE <= manifest["img_size"] <= MAX_SIZE:
        raise ValueError(f"img_size={manifest['img_size']}: must lie within {MIN_SIZE} and {MAX_SIZE}")


def _read_manifest(root: Path, wanted: dict[str, Any]) -> list[str]:
    """The subsets that are complete below `root`. Raises ValueError where it holds another data set."""
    path = root / MANIFEST
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        complete = found.pop("complete")
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{path}: is not a manifest of the demo data; delete the folder {root}") from None
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ValueError(
                f"{root}: holds demo data made with {key}={found.get(key)}, now {key}={value} is asked for; "
                f"delete the folder {root}, or set DATA.root to another one"
            )
    return complete


def _write_manifest(root: Path, manifest: dict[str, Any]) -> None:
    part = root / f"{MANIFEST}.{os.getpid()}.part"
    part.write_text(json.dumps(manifest, indent=1) + "\n")
    part.replace(root / MANIFEST)


def _hand_fingerprint() -> str:
    """Changes with the hand: shards drawn with another one hold parameters that mean another shape. Rounded to 1 um."""
    hand = build_standin_hand()
    arrays = (hand.v_template, hand.shapedirs, hand.posedirs, hand.skin_weights)
    return blake2b(b"".join(np.round(a * 1e6).astype("<i8").tobytes() for a in arrays), digest_size=8).hexdigest()


def _plan(root: Path, subset: str, num: int, seed: int, img_size: int, free_rotation: float) -> Iterator[_Shard]:
    for i, first in enumerate(range(0, num, SAMPLE_PER_SHARD)):
        count = min(SAMPLE_PER_SHARD, num - first)
        yield _Shard(root / subset / f"{i:06d}.tar", subset, first, count, seed, img_size, free_rotation)


def _run(shards: list[_Shard], num_process: int | None) -> Iterator[int]:
    """Make the shards; yields the number of samples of each as it is done."""
    if num_process is None:
        num_process = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_process = min(num_process, len(shards))
    if num_process <= 1:
        yield from map(_write_shard, shards)
        return
    # spawn: a fork of a process whose torch threads already run can hang
    how = {"mp_context": multiprocessing.get_context("spawn")}
    deaf = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}  # Ctrl-C is for the trainer
    with ProcessPoolExecutor(num_process, **how, **deaf) as pool:
        futures = [pool.submit(_write_shard, shard) for shard in shards]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch and OpenCV: sums come out the same to the bit, and processes do not fight for cores."""
    import torch

    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def _write_shard(shard: _Shard) -> int:
    """Write one shard beside its place and rename it when it is complete; returns its number of samples."""
    import webdataset as wds

    part = shard.path.with_name(f"{shard.path.name}.{os.getpid()}.part")
    pattern = str(part).replace("%", "%%")
    try:
        with _one_thread(), wds.ShardWriter(pattern + "%.0s", maxcount=shard.count, verbose=0, mtime=0) as writer:
            for first in range(shard.first, shard.first + shard.count, CHUNK):
                last = min(first + CHUNK, shard.first + shard.count)
                for sample in _samples(shard, range(first, last)):
                    writer.write(sample)
        part.replace(shard.path)
    finally:
        part.unlink(missing_ok=True)
    return shard.count


def _samples(shard: _Shard, index: range) -> Iterator[dict[str, Any]]:
    """The WebDataset samples of consecutive indices."""
    rngs = [stream(f"demo {shard.subset}", shard.seed, i) for i in index]
    draw = draw_hands(rngs, shard.img_size, shard.free_rotation)
    images = paint(draw, rngs, shard.img_size)
    for i, (number, rng) in enumerate(zip(index, rngs, strict=True)):
        yield make_sample(f"demo_{shard.subset}_{number:06d}", draw, i, images[i], rng)


def make_sample(key: str, draw: HandDraw, i: int, image: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Hand `i` of a draw with its picture [S, S, 3] as a WebDataset sample; one in two is mirrored to a left hand."""
    is_right = bool(rng.random() < 0.5)
    joint, focal, princpt = draw.joint[i].astype(np.float32), draw.focal[i], draw.princpt[i].copy()
    pose = draw.pose[i].copy().reshape(16, 3)
    joint_img = joint[:, :2] / joint[:, 2:] * focal + princpt
    if not is_right:
        image = cv2.flip(image, 1)
        joint[:, 0] *= -1
        pose[:, 1:] *= -1
        joint_img[:, 0] = image.shape[1] - 1 - joint_img[:, 0]
        princpt[0] = image.shape[1] - 1 - princpt[0]
    quality = int(rng.integers(40, 96))
    _, jpg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    arrays = {
        "hand_bbox": np.concatenate([joint_img.min(0), joint_img.max(0)]),
        "joint_img": joint_img,
        "joint_cam": joint,
        "joint_2d_valid": np.ones(len(joint)),
        "joint_3d_valid": np.ones(len(joint)),
        "mano_pose": pose.reshape(-1),
        "mano_shape": draw.shape[i],
        "focal": focal,
        "princpt": princpt,
    }
    text = {
        "handedness": "right" if is_right else "left",
        "data_source": "demo",
        "hand_model": "standin",
        "flat_hand_mean": True,
        "intr_type": "real",
        "has_mano": [1],
        "has_intr": [1],
    }
    npy = {f"{name}.npy": value[None].astype(np.float32) for name, value in arrays.items()}
    return {"__key__": key, "jpg": jpg.tobytes(), "json": text, **npy}
