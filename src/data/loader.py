"""Batches in the data order, for any number of workers and ranks, resumable at any batch.

Micro-batch k of rank r of W holds the B positions starting at start + (k W + r) B. The global micro-batch is therefore
the same range of the order for 1 x 8, 2 x 4 and 4 x 2 samples, and one integer is enough to resume a run.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader

from src.batch import Batch
from src.config import Config, named_sources
from src.data.dataset import BadFrame, Fetched, HandDataset
from src.data.health import DataHealth
from src.data.order.plan import MixedPlan, SourcePlan, validation_plan
from src.data.shards.build_index import open_indexes
from src.data.shards.index import ShardIndex
from src.data.shards.paths import resolve_source
from src.data.shards.processes import worker_context

Progress = Callable[[int, int], None]


def collate(fetched: Fetched) -> tuple[Batch, list[BadFrame]]:
    """The batch as tensors that share the arrays' memory, and the frames that could not be used."""
    return fetched.batch.map(torch.from_numpy), fetched.bad


class TrainBatchSampler:
    """This rank's micro-batches from position `start` of the order: `num_batch` of them, or endless (None)."""

    def __init__(self, batch_size: int, start: int, num_batch: int | None, rank: int, world_size: int) -> None:
        assert 0 <= rank < world_size
        self.batch_size, self.start, self.num_batch = batch_size, start, num_batch
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        for batch in count() if self.num_batch is None else range(self.num_batch):
            begin = self.start + (batch * self.world_size + self.rank) * self.batch_size
            yield list(range(begin, begin + self.batch_size))

    def __len__(self) -> int:
        if self.num_batch is None:
            raise TypeError("an endless order has no length")
        return self.num_batch


class ValBatchSampler:
    """Every frame exactly once across ranks. All ranks have equally many batches of equal size, padded with -1."""

    def __init__(self, num_frame: int, batch_size: int, rank: int, world_size: int) -> None:
        assert 0 <= rank < world_size
        self.num_frame, self.batch_size, self.rank, self.world_size = num_frame, batch_size, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            begin = (batch * self.world_size + self.rank) * self.batch_size
            yield [p if p < self.num_frame else -1 for p in range(begin, begin + self.batch_size)]

    def __len__(self) -> int:
        return -(-self.num_frame // (self.batch_size * self.world_size))


class HandLoader:
    """Iterates over Batches and counts corrupt samples in `health`, which stops the run if there are too many."""

    def __init__(self, loader: DataLoader, health: DataHealth) -> None:
        self.loader, self.health = loader, health

    @property
    def dataset(self) -> HandDataset:
        return self.loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yields Batch. Raises BadDataError if more than `DATA.max_bad_fraction` of the frames read were bad."""
        for batch, bad in self.loader:
            num_read = int((batch.position >= 0).sum()) + len(bad)  # without padding, which has position -1, too
            self.health.add(min(num_read, len(batch)), bad)
            yield batch


def _init_worker(_: int) -> None:
    """Obey SIGTERM from the parent only. Signals to the whole process group (Ctrl-C, Slurm) are for the trainer, which
    terminates its workers itself."""
    cv2.setNumThreads(0)  # a thread pool in every worker would compete for the cores, and may hang after a fork
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _data_loader(dataset: HandDataset, sampler: Any, cfg: Config, pin_memory: bool, persistent: bool) -> DataLoader:
    num_worker = cfg.GENERAL.num_worker
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_worker,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=cfg.GENERAL.prefetch_factor if num_worker else None,
        persistent_workers=persistent and num_worker > 0,
        multiprocessing_context=worker_context() if num_worker else None,
        worker_init_fn=_init_worker,
    )


def _open_sources(cfg: Config, source: Any, key: str, progress: Progress | None) -> list[list[ShardIndex]]:
    """The indexes of every named source. Raises ValueError for a source without a usable frame, or if a shard is a
    folder or a broken link."""
    sources = []
    for named in named_sources(source):
        shards = resolve_source(cfg.DATA.root, named.patterns, key)
        try:
            sources.append(open_indexes(shards, cfg.DATA.index_dir, max(1, cfg.GENERAL.num_worker), progress))
        except (FileNotFoundError, IsADirectoryError) as error:
            cure = "everything named .tar in a folder of shards is read: repair it or move it elsewhere"
            raise ValueError(f"{key}: {error.filename}: {error.strerror}; {cure}") from error
        if not sum(shard.num_frame(cfg.DATA.stride) for shard in sources[-1]):
            health = DataHealth(sources[-1:], cfg.DATA.max_bad_fraction)
            raise ValueError(
                f"{key}={list(named.patterns)}: none of the frames in its {len(shards)} shards can be used; "
                f"{health.summary()}\n{health.table()}"
            )
    return sources


def build_train_loader(
    cfg: Config,
    hand_model: str,
    *,
    start: int = 0,
    num_batch: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    progress: Progress | None = None,
) -> HandLoader:
    """The training batches.

    Args:
        cfg: the whole configuration (GENERAL, TRAIN, DATA and MODEL are used).
        hand_model: name of the run's hand model; MANO parameters of another model are not used.
        start: position to resume from: the number of samples that all ranks together have consumed. The batch size may
            differ from before.
        num_batch: number of micro-batches on each rank; None: endless.
        rank, world_size: of this process; the global order depends on sample_per_device x world_size only.
        progress: called with (shards done, shards to index) while missing indexes are built.

    Raises:
        ValueError: a source matches no shard or has no usable frame.
        BadDataError: more than `DATA.max_bad_fraction` of the frames in the shards are bad.
    """
    sources = _open_sources(cfg, cfg.DATA.train.source, "DATA.train.source", progress)
    seed, stride = cfg.GENERAL.seed, cfg.DATA.stride
    health = DataHealth(sources, cfg.DATA.max_bad_fraction)
    health.check()
    plan = MixedPlan(
        [SourcePlan(shards, stride, seed, tag) for tag, shards in enumerate(sources)],
        [named.weight for named in named_sources(cfg.DATA.train.source)],
        seed,
    )
    dataset = _dataset(cfg, sources, plan, hand_model, augment=cfg.TRAIN)
    sampler = TrainBatchSampler(cfg.TRAIN.sample_per_device, start, num_batch, rank, world_size)
    return HandLoader(_data_loader(dataset, sampler, cfg, pin_memory, persistent=False), health)


def build_val_loader(
    cfg: Config,
    hand_model: str,
    *,
    half: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    progress: Progress | None = None,
) -> HandLoader:
    """The validation batches: frames selected by `GENERAL.val_seed`, unaugmented, in a fixed order, each on one rank.

    Rows with position -1 pad the last batches and replace frames that cannot be read. `half`: only the samples of that
    half (src/data/order/plan.py). Other arguments and errors as in `build_train_loader`. Can be iterated repeatedly.
    """
    sources = _open_sources(cfg, cfg.DATA.val.source, "DATA.val.source", progress)
    shards = [shard for source in sources for shard in source]
    health = DataHealth([shards], cfg.DATA.max_bad_fraction)
    health.check()
    plan = validation_plan(shards, cfg.DATA.stride, cfg.GENERAL.val_seed, cfg.DATA.val.max_sample, half)
    if not plan.num_frame:
        raise ValueError(f"DATA.val.source: no sample is in half {half}")
    dataset = _dataset(cfg, [shards], plan, hand_model, augment=None)
    sampler = ValBatchSampler(plan.num_frame, cfg.TRAIN.sample_per_device, rank, world_size)
    return HandLoader(_data_loader(dataset, sampler, cfg, pin_memory, persistent=True), health)


def _dataset(
    cfg: Config, sources: Sequence[Sequence[ShardIndex]], plan: Any, hand_model: str, augment: Any
) -> HandDataset:
    return HandDataset(
        sources,
        plan,
        stride=cfg.DATA.stride,
        hand_model=hand_model,
        img_size=cfg.MODEL.img_size,
        expansion_ratio=cfg.TRAIN.expansion_ratio,
        augment=augment,
        seed=cfg.GENERAL.seed,
    )


def train_eval_config(cfg: Config) -> Config | None:
    """A configuration whose validation loader reads `DATA.train.eval_sample` training frames; None if that is 0.

    They are cropped like validation frames, without augmentation: the gap to the validation metrics measures
    overfitting. One worker is enough for so few frames.
    """
    train = cfg.DATA.train
    if train.eval_sample == 0:
        return None
    data = replace(cfg.DATA, val=replace(cfg.DATA.val, source=train.source, max_sample=train.eval_sample))
    return replace(cfg, DATA=data, GENERAL=replace(cfg.GENERAL, num_worker=min(1, cfg.GENERAL.num_worker)))


def to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on `device`; on CUDA they are copied in a stream of their own, beside the running step.

    A step does not wait for the device, so the host requests the next batch while the last step still computes. The
    copy from pinned memory runs beside that step, and only the next step waits for it.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = batch.to(device, non_blocking=True)
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        moved.record_stream(current)
        yield moved
