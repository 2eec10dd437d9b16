"""One copy of weights, gradients and moments spread over the processes (`TRAIN.shard_weights`): torch's FSDP2.

Every backbone and decoder layer is a unit: its weights come together for its forward and its backward pass and are let
go again. In between each process holds one part, a DTensor, of every parameter. What leaves this file is whole again:
checkpoints are those of an unsharded run, and either kind goes on from the other's.
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from src.checkpoint.writer import Frozen
from src.config import ConfigError
from src.model.net import PoseNet


def check_processes(env: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError where there is one process, or none said: nobody to share the weights with."""
    if int(env.get("WORLD_SIZE", "1")) < 2:
        raise ConfigError(
            "TRAIN.shard_weights=true: there is one process, and nobody to share the weights with. Start several "
            "(torchrun --standalone --nproc_per_node=8 script/stage1.py ...) or set TRAIN.shard_weights=false"
        )


def shard(net: PoseNet, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """Keep this process's part of `net` and of its `optimizer` alone, moments included, on the process's device.

    Both are changed in place. They come whole, on the CPU and alike on every process, so nothing is sent. From here on
    a forward pass is a collective: every process takes part in it, validation and drawing too. Gradients are summed
    over the processes for each micro-batch: left for the last one alone, they would lie whole on each process.
    """
    names = {parameter: name for name, parameter in net.named_parameters()}
    # each weight is cast once in a forward pass: a cache would only keep the network in bf16 as well
    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
    net.forward = accelerator.autocast()(net.forward)
    # told of every view that a module returns; nobody changes a Prediction in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in (*net.backbone.model.encoder.layer, *net.decoder.layers):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(net, mesh=mesh, reshard_after_forward=True)

    parts, moments = dict(net.named_parameters()), optimizer.state
    optimizer.state = defaultdict(dict)
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            part = group["params"][index] = parts[names[parameter]]
            if parameter in moments:
                optimizer.state[part] = {key: _part(value, part) for key, value in moments.pop(parameter).items()}


@torch.no_grad()
def _part(value: torch.Tensor, like: DTensor) -> torch.Tensor:
    """This process's part of a moment, cut as its parameter; the count of steps is everybody's."""
    if value.ndim == 0:
        return value.to(like.device)
    part = torch.zeros_like(like.detach())  # memory of its own: a part of `value` would keep the whole alive
    cut = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    part.to_local().copy_(cut.to_local())
    return part


def gather(part: nn.Module | torch.optim.Optimizer, keep: bool) -> Frozen | None:
    """The whole state of a network or optimizer, in host memory, to be saved; None where not asked to `keep` it.

    A collective: all processes call it, one tensor after the other is put together on each. Without sharded tensors
    it sends nothing and merely copies.
    """
    whole_state = _whole_tree(part.state_dict(), keep)
    return Frozen(whole_state) if keep else None


def _whole_tree(tree: Any, keep: bool) -> Any:
    if isinstance(tree, torch.Tensor):
        tensor = whole(tree.detach())
        return tensor.to("cpu", copy=True) if keep else None
    if isinstance(tree, Mapping):
        return {name: _whole_tree(item, keep) for name, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_whole_tree(item, keep) for item in tree)
    return tree


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor put together, by a collective; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
