"""Weights, gradients and moments sharded over the processes (`TRAIN.shard_weights`): torch's FSDP2.

Each backbone and decoder layer is one FSDP unit: its weights are gathered for its forward and its backward pass and
freed again. Otherwise each process holds one shard, a DTensor, of every parameter. What leaves this file is unsharded:
checkpoints equal those of an unsharded run, and either kind of run resumes from the other's.
"""

from __future__ import annotations

import warnings
from collections import defaultdict

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from src.checkpoint.writer import Frozen, map_tensors
from src.config import ConfigError
from src.distributed.exit import is_distributed
from src.model.net import PoseNet


def check_processes() -> None:
    """Raises ConfigError for a single process: there is no other one to share the weights with."""
    if not is_distributed():
        raise ConfigError(
            "TRAIN.shard_weights=true: there is one process only; start several "
            "(torchrun --standalone --nproc_per_node=8 script/stage1.py ...) or set TRAIN.shard_weights=false"
        )


def shard(net: PoseNet, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """Reduce `net` and its `optimizer`, moments included, to this process's shard, on the process's device.

    Both are changed in place. They must be unsharded, on the CPU and equal on every process, so nothing is sent. From
    then on a forward pass is a collective that every process takes part in, also in validation and drawing. Gradients
    are reduced after every micro-batch: reduced after the last one only, each process would hold them unsharded.
    """
    names = {parameter: name for name, parameter in net.named_parameters()}
    # each weight is cast once in a forward pass: autocast's cache would only hold the network in bf16 as well
    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
    net.forward = accelerator.autocast()(net.forward)
    # FSDP2 warns of every view that a module returns; no caller changes a Prediction in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in (*net.backbone.model.encoder.layer, *net.decoder.layers):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(net, mesh=mesh, reshard_after_forward=True)

    shards, moments = dict(net.named_parameters()), optimizer.state
    optimizer.state = defaultdict(dict)
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            sharded = group["params"][index] = shards[names[parameter]]
            if parameter in moments:
                state = moments.pop(parameter)
                optimizer.state[sharded] = {key: _shard_moment(value, sharded) for key, value in state.items()}


@torch.no_grad()
def _shard_moment(value: torch.Tensor, like: DTensor) -> torch.Tensor:
    """This process's shard of a moment, split like its parameter; the step count is the same on every process."""
    if value.ndim == 0:
        return value.to(like.device)
    sharded = torch.zeros_like(like.detach())  # memory of its own: a view of `value` would keep all of it alive
    split = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    sharded.to_local().copy_(split.to_local())
    return sharded


def gather(source: nn.Module | torch.optim.Optimizer, keep: bool) -> Frozen | None:
    """The unsharded state of a network or optimizer, in host memory, for a checkpoint; None unless `keep`.

    A collective: all processes call it, and each gathers one tensor at a time. Tensors that are not sharded are copied
    without communication.
    """

    def to_host(tensor: torch.Tensor) -> torch.Tensor | None:
        tensor = unsharded(tensor.detach())
        return tensor.to("cpu", copy=True) if keep else None

    state = map_tensors(to_host, source.state_dict())
    return Frozen(state) if keep else None


def unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered, by a collective; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
