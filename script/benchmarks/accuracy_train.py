"""Trains and evaluates one network of `script/bench.py accuracy`."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from script.benchmarks.accuracy_data import rows_of
from script.benchmarks.measurement import Status, machine
from src.batch import Batch
from src.config import Config
from src.metric import Samples, measure
from src.train.validation import VALIDATED
from src.utils.train_utils import get_lr_factor

VAL_BATCH = 125


def make_cell(
    net: nn.Module, cfg: Config, settings: dict[str, Any], train: Batch, val: Batch, status: Status
) -> dict[str, Any]:
    """Train and evaluate one network; the settings, metrics and cost go to the results file."""
    device = train.patch.device.type
    net.to(device)
    if settings["precision"] == "bf16":  # the losses stay in float32
        net.forward = torch.autocast(device, torch.bfloat16)(net.forward)
    if hasattr(net, "fit"):
        net.fit(train)
    begin = time.perf_counter()
    net.set_dropout_rate(0.0)
    train_network(net, cfg, settings, train, status)
    return {
        "settings": settings,
        "metrics": validate(net, val),
        "seconds": round(time.perf_counter() - begin, 1),
        "parameters": sum(p.numel() for p in net.parameters()),
        "machine": machine(),
    }


def train_network(net: nn.Module, cfg: Config, settings: dict[str, Any], data: Batch, status: Status) -> None:
    """AdamW with warm-up and cosine, as in the training loop; the seed determines the order of the samples."""
    num_step, batch = settings["step"], cfg.TRAIN.sample_per_device
    groups = net.parameter_groups(settings["lr"], settings["backbone_lr"], cfg.TRAIN.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    parameters = [p for group in groups for p in group["params"]]
    order = torch.Generator().manual_seed(settings["seed"])
    index = torch.empty(0, dtype=torch.long)
    net.train()
    for step in range(num_step):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * get_lr_factor(step, num_step, num_step // 25)
        if len(index) < batch:
            index = torch.cat([index, torch.randperm(len(data), generator=order)])
        chosen, index = index[:batch], index[batch:]
        net.training_loss(rows_of(data, chosen)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, cfg.TRAIN.max_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            status(f"{settings['method']}, seed {settings['seed']}: step {step} of {num_step}")


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
