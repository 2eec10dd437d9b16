"""Several processes: set-up, precision, waiting for each other, exchanging objects, shutting down."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from src.config import Config

# gloo and the launcher notice a dead process immediately. This timeout is for a live process that hangs, for example on
# a stalled file system. No collective waits for another process's long work, see `main_process_first`.
COLLECTIVE_TIMEOUT = timedelta(minutes=20)
PREPARATION_TIMEOUT = timedelta(days=2)  # the main process indexes shards: hours for a large set on a slow disk


def _init_group_after_restart() -> None:
    """Initialise the process group under a new prefix where torchrun has restarted the processes of one machine.

    torchrun (2.13) keeps its store over restarts: gloo would find the addresses of dead processes and wait for them.
    Over several machines the restart count differs from node to node and cannot serve as a prefix.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1" or dist.is_initialized():
        return
    store, rank, world_size = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"attempt_{attempt}", store),
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


def build_accelerator(cfg: Config) -> Accelerator:
    """Processes, device and precision. `auto` is bf16 on a GPU that supports it, float32 anywhere else.

    Under bf16, the parts in float32 (hand layer, losses) use exact float32; `tf32` rounds the factors of all its
    matrix products, the hand layer's too, to 10 bits.
    """
    precision = cfg.TRAIN.mixed_precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    precision = "no" if precision == "tf32" else precision
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = world_size > 1 and not torch.cuda.is_available()  # torchrun alone does not make Accelerate use gloo
    _init_group_after_restart()
    timeout = InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)
    accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu, kwargs_handlers=[timeout])
    accelerator.ddp_handler = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    assert accelerator.num_processes == world_size, "processes that do not know of each other would train twice"
    return accelerator


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """The other processes enter the block once the main process has left it, however long that takes."""
    if accelerator.num_processes == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT)
    if not accelerator.is_main_process:
        dist.barrier(group)
    yield
    if accelerator.is_main_process:
        dist.barrier(group)
    dist.destroy_process_group(group)


def shut_down(accelerator: Accelerator) -> None:
    """Wait for every process before the exit, because a launcher kills the others as soon as one has exited."""
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        destroy_process_group()
    accelerator.end_training()


def destroy_process_group() -> None:
    """End the process group after its last collective, on every process. Delete a DDP model before it if you can.

    Without the pause this can deadlock. gloo's thread releases the last collective a moment after it is done and needs
    the GIL for that; a thread that destroys the group while holding the GIL waits for gloo's thread forever. So does
    DDP's reducer where it holds the last reference to the group.
    """
    time.sleep(0.5)
    dist.destroy_process_group()


def is_peer_lost(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone, or stuck for longer than COLLECTIVE_TIMEOUT."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
