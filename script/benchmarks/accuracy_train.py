"""Trains and evaluates one network of `script/bench.py accuracy`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from script.benchmarks.accuracy_data import rows_of
from script.benchmarks.measurement import machine
from src.batch import Batch
from src.config import Config
from src.metric import Samples, measure
from src.train.validation import VALIDATED
from src.utils.train_utils import get_lr_factor

VAL_BATCH = 125


def make_cell(
    net: nn.Module, cfg: Config, settings: dict[str, Any], train: Batch, val: Batch, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train one network and measure it."""
    device = train.patch.device.type
    net.to(device)
    if settings["precision"] == "bf16":  # the losses stay in float32
        net.forward = torch.autocast(device, torch.bfloat16)(net.forward)
    if hasattr(net, "fit"):
        net.fit(train)
    begin = time.perf_counter()
    groups = net.parameter_groups(settings["lr"], settings["backbone_lr"], cfg.TRAIN.weight_decay)
    net.set_dropout_rate(0.0)
    who = f"{settings['method']}, seed {settings['seed']}"
    train_network(net, net.training_loss, groups, cfg, settings["step"], settings["seed"], train, who, say)
    return {
        "settings": settings,
        "metrics": validate(net, val),
        "seconds": round(time.perf_counter() - begin, 1),
        "parameters": sum(p.numel() for p in net.parameters()),
        "machine": machine(),
    }


def train_network(
    net: nn.Module,
    loss_of: Callable[[Batch], torch.Tensor],
    groups: list[dict[str, Any]],
    cfg: Config,
    num_step: int,
    seed: int,
    data: Batch,
    who: str,
    say: Callable[[str], None],
) -> None:
    """AdamW with warm-up and cosine, as the training loop has it, over the set in an order that the seed gives."""
    batch, warmup = cfg.TRAIN.sample_per_device, num_step // 25
    optimizer = torch.optim.AdamW(groups, fused=True)
    parameters = [p for group in groups for p in group["params"]]
    order = torch.Generator().manual_seed(seed)
    index = torch.empty(0, dtype=torch.long)
    net.train()
    for step in range(num_step):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * get_lr_factor(step, num_step, warmup)
        if len(index) < batch:
            index = torch.cat([index, torch.randperm(len(data), generator=order)])
        chosen, index = index[:batch], index[batch:]
        loss_of(rows_of(data, chosen)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, cfg.TRAIN.max_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            say(f"{who}: step {step} of {num_step}")


@torch.no_grad()
def validate(net: nn.Module, val: Batch) -> dict[str, float]:
    """The metrics of the validation sample, mm."""
    net.eval()
    parts = []
    for index in torch.arange(len(val)).split(VAL_BATCH):
        batch = rows_of(val, index)
        prediction = net(batch)
        target = net.hand(net.hand.pose_to_rotmat(batch.mano_pose, batch.flat_hand_mean), batch.mano_shape).vert
        parts.append(Samples.of_batch(batch, measure(prediction, batch, target, VALIDATED)))
    return Samples.join(parts).means()
