"""Step times for `script/bench.py scale`: of one process, and of several with their all-reduce."""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import nullcontext
from multiprocessing import SimpleQueue

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from script.benchmarks.measurement import seconds_of
from src.batch import Batch
from src.config import Config
from src.data.crop import empty_batch, pad_rows
from src.distributed.processes import destroy_process_group
from src.hand.mano import ManoLayer
from src.hand.standin.build import build_standin_hand
from src.loss import NUM_TERM, loss_sums
from src.model.net import PoseNet

STEP_PER_BLOCK = 4


def grey_batch(num: int, img_size: int) -> Batch:
    """[num] patches without a hand: they cost as much as photographs."""
    batch = empty_batch(num, img_size)
    pad_rows(batch, range(num))
    return batch.map(torch.from_numpy)


def step(model: nn.Module, hand: ManoLayer, batch: Batch) -> None:
    """Forward, losses and backward; discards the gradients."""
    (loss_sums(model(batch), batch, hand).sum(0) @ torch.ones(NUM_TERM)).backward()
    model.zero_grad(set_to_none=True)


def step_seconds(net: PoseNet, num: int, repeat: int) -> float:
    """Median seconds of a step of `num` samples, after one warm-up step."""
    batch = grey_batch(num, net.img_size)
    return statistics.median([seconds_of(lambda: step(net, net.hand, batch)) for _ in range(repeat + 1)][1:])


def communication_seconds(cfg: Config, num_process: int, repeat: int) -> tuple[float, float]:
    """Median seconds of a step of `num_process` processes (gloo, a thread each) without and with the all-reduce."""
    result = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="bench-gloo-") as folder:
        args = (num_process, cfg, repeat, folder, result)
        multiprocessing.start_processes(_process, args, nprocs=num_process, start_method="spawn")
    return result.get()


def _process(rank: int, num_process: int, cfg: Config, repeat: int, folder: str, result: SimpleQueue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=num_process)
    seconds = _block_seconds(cfg, repeat)
    if rank == 0:
        result.put(seconds)
    destroy_process_group()


def _block_seconds(cfg: Config, repeat: int) -> tuple[float, float]:
    """Median seconds of a step without and with the all-reduce over `repeat` blocks, after one warm-up block."""
    net = PoseNet(cfg.MODEL, build_standin_hand()).train()
    model = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
    batch = grey_batch(cfg.TRAIN.sample_per_device, cfg.MODEL.img_size)
    apart, together = [], []
    for _ in range(repeat + 1):
        for seconds, context in ((apart, model.no_sync), (together, nullcontext)):
            dist.barrier()
            start = time.perf_counter()
            with context():
                for _ in range(STEP_PER_BLOCK):
                    step(model, net.hand, batch)
            dist.barrier()
            seconds.append((time.perf_counter() - start) / STEP_PER_BLOCK)
    return statistics.median(apart[1:]), statistics.median(together[1:])
