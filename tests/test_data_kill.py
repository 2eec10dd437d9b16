"""Readers killed with SIGKILL resume with other worker counts and read exactly what an undisturbed reader reads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import pytest

from src.batch import Batch
from src.data.loader import build_train_loader
from tests.data_shards import data_config, lab_sample, native_sample, write_shard

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create",  # more workers than cores, on purpose
    "ignore:.*use of fork",
)
NUM_BATCH = 40
MIXTURE = {
    "native": {"source": ["train/0.tar"], "weight": 2.0},
    "labs": {"source": ["train/1.tar"], "weight": 1.0},
}
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kill")
    write_shard(root / "train" / "0.tar", [native_sample(n, 1 + n % 3) for n in range(12)])
    write_shard(root / "train" / "1.tar", [lab_sample(n, 4, 1 + n % 2) for n in range(20, 26)])
    return root


def batches(root: Path, done: int, num_worker: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    cfg = data_config(root, train=MIXTURE, num_worker=num_worker, sample_per_device=8 // world)
    yield from build_train_loader(cfg, "mano", start=8 * done, num_batch=NUM_BATCH - done, rank=rank, world_size=world)


def line_of(batch: Batch) -> str:
    """A digest of the batch on one line."""
    digest = blake2b(digest_size=16)
    for name in ("patch", "joint_patch", "joint_cam", "mano_pose", "cam_rot", "patch_focal"):
        digest.update(getattr(batch, name).numpy().tobytes())
    return f"{batch.position.tolist()} {batch.key} {digest.hexdigest()}"


def read(root: Path, log: Path, done: int, num_worker: int) -> None:
    """The process that is killed: writes one line per batch and flushes it."""
    with log.open("a", encoding="utf-8") as file:
        for batch in batches(root, done, num_worker):
            file.write(f"{line_of(batch)}\n")
            file.flush()
            time.sleep(0.01)


def whole_lines(log: Path) -> list[str]:
    """The complete lines; a line cut off by a kill is removed from the file."""
    data = log.read_bytes() if log.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(log, len(whole))
    return whole.decode().splitlines()


def run(root: Path, log: Path, num_worker: int, kill_at: int | None) -> None:
    """Resume after the last line; SIGKILL the reader once there are `kill_at` lines, or let it finish."""
    process = FORK.Process(target=read, args=(root, log, len(whole_lines(log)), num_worker))
    process.start()
    deadline = time.monotonic() + 60
    while kill_at is not None and (not log.exists() or log.read_bytes().count(b"\n") < kill_at):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    if kill_at is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()  # no timeout: with one, join waits until the orphaned workers have exited
    assert process.exitcode == (0 if kill_at is None else -signal.SIGKILL)


def test_kills_do_not_change_the_order(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for num_worker, kill_at in ((2, 6), (1, 13), (3, 21), (0, 30), (2, None)):
        run(root, log, num_worker, kill_at)
        if kill_at is not None:
            assert kill_at <= len(whole_lines(log)) < NUM_BATCH
    assert whole_lines(log) == [line_of(batch) for batch in batches(root, 0, 0)]


def test_two_ranks_with_batch_4_read_the_same_as_one_with_batch_8(root: Path) -> None:
    one = list(batches(root, 0, 0))
    two = [list(batches(root, 0, num_worker, rank, 2)) for rank, num_worker in ((0, 1), (1, 2))]
    assert len(one) == len(two[0]) == len(two[1]) == NUM_BATCH
    for whole, *halves in zip(one, *two, strict=True):
        assert [key for half in halves for key in half.key] == whole.key
        for name in ("position", "patch", "joint_cam", "mano_pose", "cam_rot"):
            parts = [getattr(half, name) for half in halves]
            expected = getattr(whole, name)
            assert (parts[0] == expected[:4]).all()
            assert (parts[1] == expected[4:]).all()
