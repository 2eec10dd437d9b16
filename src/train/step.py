"""One optimizer step: seeds, schedules, forward, backward, clip, update. `train_step` computes; the script loops.

A step sees all its micro-batches at once. The loss is the mean over the valid items of the whole global batch: one
process with 32 samples, four with 8, or two with two micro-batches of 8 each take the same step.

An update whose loss or gradient is not finite is skipped on the device itself, on all processes alike, without making
the host wait. After `TRAIN.max_skipped_step` skips in a row every further update is skipped too, so that the weights
stay those that the bad steps started from until the host notices (src/train/step_watch.py).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from src.batch import Batch
from src.config import Config
from src.loss import LOSS_TERMS, loss_counts, loss_sums, loss_weights, mean_terms
from src.model.net import PoseNet
from src.train.sharding import unsharded
from src.utils.train_utils import get_lr_factor, get_progressive_dropout

SEED_PRIME = 1_000_003  # spreads (seed, step, rank) over the generator's 64 bits


@dataclass
class StepResult:
    """The outcome of a step. Tensors stay on the device until they are read."""

    lr: float
    dropout_rate: float
    term: torch.Tensor  # [NUM_TERM] global mean of each loss term
    total: torch.Tensor  # [] weighted sum of the terms
    grad_norm: torch.Tensor  # [] before clipping
    sample_sum: list[torch.Tensor]  # of each micro-batch [B, NUM_TERM]: each sample's loss sums on this process
    skipped: torch.Tensor  # [2] int64 as of this step: skipped steps in a row, and since the run began
    stop: torch.Tensor  # [1] how many processes have been asked to stop

    def metrics(self) -> dict[str, float]:
        """Everything as numbers, in the order of the log line. Waits for the device."""
        term = dict(zip(LOSS_TERMS, self.term.tolist(), strict=True))
        return {
            "lr": self.lr,
            "dropout_rate": self.dropout_rate,
            "loss_total": self.total.item(),
            **term,
            "grad_norm": self.grad_norm.item(),
            "skipped_step": self.skipped[1].item(),
        }


def log_line(step: int, total_step: int, metrics: dict[str, float]) -> str:
    """The line that users grep: `3000/100000 lr=1.0000e-04 dropout=0.000 total=1.1500 loss_theta=0.0800 ...`."""
    terms = " ".join(f"{name}={metrics[name]:.4f}" for name in LOSS_TERMS)
    return (
        f"{step}/{total_step} lr={metrics['lr']:.4e} dropout={metrics['dropout_rate']:.3f} "
        f"total={metrics['loss_total']:.4f} {terms}"
    )


def step_seed(seed: int, step: int, rank: int) -> int:
    """The argument of `torch.manual_seed` before the forward pass of a step, so that a resumed run draws the same."""
    return ((seed * SEED_PRIME + step) * SEED_PRIME + rank) % 2**63


def prepare_model(net: PoseNet, cfg: Config) -> nn.Module:
    """The model that training steps call: `net`, compiled and with activation checkpointing if configured.

    Validation calls `net` itself, which shares its weights.
    """
    if cfg.TRAIN.activation_checkpointing:
        net.backbone.checkpoint_activations()
    return torch.compile(net, fullgraph=True) if cfg.TRAIN.compile else net


def unwrap(model: nn.Module) -> PoseNet:
    """The PoseNet inside the wrappers of Accelerate, DDP and torch.compile."""
    while not isinstance(model, PoseNet):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


class Trainer:
    """The wrapped model, the optimizer and the schedules' settings, for all steps."""

    def __init__(
        self, cfg: Config, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.cfg = cfg
        self.accelerator = accelerator
        self.model = model  # as Accelerate wrapped it
        if isinstance(model, DistributedDataParallel):
            model.broadcast_buffers = False  # they are constants
        self.net = unwrap(model)
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.loss_weight = loss_weights(cfg.LOSS).to(accelerator.device)
        self.skipped = torch.zeros(2, dtype=torch.int64, device=accelerator.device)  # as StepResult.skipped

    def train_step(self, step: int, micro_batches: list[Batch], stop: bool = False) -> StepResult:
        """Take optimizer step number `step` (from 0) on this process's share of the global batch.

        `stop`: this process has been asked to stop; the reduction of the counts carries it to all processes.
        """
        lr_factor, rate = self._apply_schedules(step)
        counts, stops = self._global_counts(micro_batches, stop)
        sample_sum = []
        for index, batch in enumerate(micro_batches, 1):
            is_last = index == len(micro_batches)
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                sample_sum.append(self._backward(batch, counts))
        sums = torch.stack([each.sum(0) for each in sample_sum]).sum(0)
        term = mean_terms(self.accelerator.reduce(sums, "sum"), counts)
        total = term @ self.loss_weight
        grad_norm = self._update(total)
        lr = self.cfg.TRAIN.lr * lr_factor
        return StepResult(lr, rate, term, total, grad_norm, sample_sum, self.skipped, stops)

    def _update(self, total: torch.Tensor) -> torch.Tensor:
        """Clip and take the optimizer's step unless loss or gradient is not finite; returns the gradient's norm.

        Nothing here waits for the device. A loss that is not finite makes the gradient so too, and both the fused AdamW
        (`found_inf`) and a GradScaler then skip the update, moments and step count included.
        """
        halted = self.skipped[0] >= self.cfg.TRAIN.max_skipped_step
        poison = torch.where(halted, torch.nan, total * 0.0)  # 0 in a good step
        next(p.grad for p in self.parameters if p.grad is not None).add_(poison)
        grad_norm = unsharded(self.accelerator.clip_grad_norm_(self.parameters, self.cfg.TRAIN.max_grad))
        is_skipped = ~torch.isfinite(grad_norm)
        is_bad, scaler = is_skipped, self.accelerator.scaler
        if scaler is None:
            self.optimizer.optimizer.found_inf = is_skipped.float()
        else:  # an overflow while the scale can still fall is part of the scaler's search, not a fault
            is_bad = is_skipped & ((scaler._scale <= 1.0) | ~torch.isfinite(total) | halted)
        self.skipped = torch.stack([(self.skipped[0] + 1) * is_bad, self.skipped[1] + is_skipped])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _apply_schedules(self, step: int) -> tuple[float, float]:
        """Set learning rates, dropout rate and seed of this step; returns the learning rate's factor and the rate."""
        general = self.cfg.GENERAL
        torch.manual_seed(step_seed(general.seed, step, self.accelerator.process_index))
        factor = get_lr_factor(step, general.total_step, general.warmup_step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        target, schedule = self.cfg.MODEL.handec.dropout, general.dropout_schedule
        rate = get_progressive_dropout(step, general.total_step, general.dropout_warmup_step, target, schedule)
        self.net.set_dropout_rate(rate)
        return factor, rate

    def _global_counts(self, micro_batches: list[Batch], stop: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Valid items of the global batch [NUM_TERM], and how many processes were asked to stop [1]."""
        counts = torch.cat([loss_counts(batch) for batch in micro_batches]).sum(0)
        reduced = self.accelerator.reduce(torch.cat([counts, counts.new_full((1,), float(stop))]), "sum")
        return reduced[:-1], reduced[-1:]

    def _backward(self, batch: Batch, counts: torch.Tensor) -> torch.Tensor:
        """Accumulate the gradient of one micro-batch; returns its samples' loss sums [B, NUM_TERM], detached.

        DDP and FSDP average gradients over the processes, hence the factor: a mean over global counts needs their sum.
        """
        sums = loss_sums(self.model(batch), batch, self.net.hand)
        loss = mean_terms(sums.sum(0), counts) @ self.loss_weight
        self.accelerator.backward(loss * self.accelerator.num_processes)
        return sums.detach()
