"""Renders the demo data set: hands in ordinary WebDataset shards, for training without downloads or licences.

    make_demo_shards(Path("data/demo"), {"train": 12000, "val": 512}, seed=0)

writes `train/000000.tar` ... and `val/000000.tar` ..., 500 samples per shard, and `demo.json` with the parameters. A
sample depends only on (seed, subset, index, image size), so the shards are identical to the byte for any number of
processes. A shard appears under its name only when it is complete: an interrupted call can be repeated and continues.

Every field of src/data/shards/writer.py is known: boxes, 2D and 3D joints, intrinsics, and the stand-in hand's
parameters (lengths in mm, pixel centres at integer coordinates). Left hands follow MANO's convention: the mirror image
of a right hand, with axis-angle y and z negated.

Shape legend: S image side.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from src.data.shards.annotation import joint_extent
from src.data.shards.processes import map_processes
from src.data.shards.writer import HandRecord, write_shard
from src.geometry.patch import mirror_pose
from src.hand.standin.build import build_standin_hand
from src.utils.console import logger, task_bar
from src.utils.files import encode_image, write_atomic

VERSION = 4  # increment it if the samples of a seed change
SAMPLE_PER_SHARD = 500
CHUNK = 50  # samples drawn together
MANIFEST = "demo.json"
MIN_SIZE, MAX_SIZE = 64, 512


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
    """Render the demo data set below `root`; returns at once if it is already complete.

    Args:
        root: folder of the data set, created if missing.
        num_sample: subset name -> number of samples, e.g. {"train": 12000, "val": 512}.
        seed: any integer >= 0; subsets of one seed share no sample.
        img_size: side of the images, px.
        free_rotation: fraction of hands with a uniformly random rotation; the others have views typical of photographs.
        num_process: worker processes; None: one per usable core; 1: render in this process.
        progress: called with (samples done, total) before the first and after each shard; not called if the data set
            is complete.
        subsets: render only these of `num_sample`, e.g. ("val",) for an evaluation; None: all.

    Raises:
        ValueError: `root` contains other shards, or a demo with other parameters, or a parameter is out of range.
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
    total = sum(num_sample[name] for name in missing)
    if progress is not None:
        progress(0, total)
    root.mkdir(parents=True, exist_ok=True)
    _write_manifest(root, {**manifest, "complete": complete})
    todo = []
    for subset in missing:
        for i, first in enumerate(range(0, num_sample[subset], SAMPLE_PER_SHARD)):
            numbers = range(first, min(first + SAMPLE_PER_SHARD, num_sample[subset]))
            if not (path := root / subset / f"{i:06d}.tar").exists():
                todo.append((path, subset, numbers, seed, img_size, free_rotation))
    done = total - sum(len(numbers) for _, _, numbers, *_ in todo)
    if num_process is None:
        num_process = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")  # forking a process with running torch threads can hang
    for count in map_processes(_write_shard, todo, num_process, context, _ignore_interrupt):
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
        raise ValueError(f"img_size={manifest['img_size']}: must be between {MIN_SIZE} and {MAX_SIZE}")


def _read_manifest(root: Path, wanted: dict[str, Any]) -> list[str]:
    """The complete subsets below `root`. Raises ValueError if it contains another data set."""
    path = root / MANIFEST
    if not path.exists():
        if other := next((shard for subset in wanted["num_sample"] for shard in (root / subset).glob("*.tar")), None):
            raise ValueError(
                f"DATA.root={root}: contains shards that are not the demo's ({other}); to train on them add "
                "DATA.demo=null, or else set DATA.root to another folder"
            )
        return []
    try:
        found = json.loads(path.read_text())
        complete = found.pop("complete")
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{path}: not a manifest of the demo data; delete the folder {root}") from None
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ValueError(
                f"{root}: contains demo data with {key}={found.get(key)}, but the request is {key}={value}; "
                f"delete the folder {root}, or set DATA.root to another one"
            )
    return complete


def _write_manifest(root: Path, manifest: dict[str, Any]) -> None:
    write_atomic(root / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _hand_fingerprint() -> str:
    """Identifies the stand-in hand, whose parameters the shards contain. Arrays are rounded to 1 um."""
    hand = build_standin_hand()
    arrays = (hand.v_template, hand.shapedirs, hand.posedirs, hand.skin_weights)
    return blake2b(b"".join(np.round(a * 1e6).astype("<i8").tobytes() for a in arrays), digest_size=8).hexdigest()


def _ignore_interrupt() -> None:
    """Leave Ctrl-C to the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch and OpenCV: sums are reproducible to the bit, and processes do not compete for cores."""
    import torch

    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def _write_shard(path: Path, *arguments: Any) -> int:
    """Write one shard of `_render(*arguments)`; returns its number of samples."""
    with _one_thread():
        return write_shard(_render(*arguments), path)


def _render(subset: str, samples: range, seed: int, img_size: int, free_rotation: float) -> Iterator[HandRecord]:
    for begin in range(0, len(samples), CHUNK):
        numbers = samples[begin : begin + CHUNK]
        rngs = [stream(f"demo {subset}", seed, number) for number in numbers]
        draw = draw_hands(rngs, img_size, free_rotation)
        images = paint(draw, rngs, img_size)
        for i, (number, rng) in enumerate(zip(numbers, rngs, strict=True)):
            yield make_record(f"demo_{subset}_{number:06d}", draw, i, images[i], rng)


def make_record(key: str, draw: HandDraw, i: int, image: np.ndarray, rng: np.random.Generator) -> HandRecord:
    """Hand `i` of a draw with its image [S, S, 3], all labels known; every second one is mirrored to a left hand."""
    is_right = bool(rng.random() < 0.5)
    joint, focal, princpt, pose = draw.joint[i].astype(np.float32), draw.focal[i], draw.princpt[i].copy(), draw.pose[i]
    joint_img = joint[:, :2] / joint[:, 2:] * focal + princpt
    if not is_right:
        image = cv2.flip(image, 1)
        joint[:, 0] *= -1
        pose = mirror_pose(pose)
        joint_img[:, 0] = image.shape[1] - 1 - joint_img[:, 0]
        princpt[0] = image.shape[1] - 1 - princpt[0]
    quality = int(rng.integers(40, 96))
    return HandRecord(
        key=key,
        image=encode_image(image, jpeg_quality=quality),
        image_type="jpg",
        handedness="right" if is_right else "left",
        data_source="demo",
        hand_bbox=joint_extent(joint_img),
        joint_img=joint_img,
        joint_2d_valid=np.ones(len(joint)),
        joint_cam=joint,
        joint_3d_valid=np.ones(len(joint)),
        mano_pose=pose,
        mano_shape=draw.shape[i],
        focal=focal,
        princpt=princpt,
        hand_model="standin",
        flat_hand_mean=True,
    )
