"""One optimizer step: seeds, schedules, forward, backward, clip, update. `train_step` computes; the script loops.

A step sees all its micro-batches at once. The loss is the mean over the valid items of the whole global batch: one
process with 32 samples, four with 8, or two with two micro-batches of 8 each take the same step.

An update whose loss or gradient is not finite is left out on the device itself, on all processes alike: the host does
not wait to find out. After `TRAIN.max_skipped_step` in a row every further update is left out too, so that the weights
stay those of the steps that went wrong until the host has noticed (src/train/step_watch.py).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from src.batch import Batch
from src.config import Config
from src.loss import LOSS_TERMS, loss_counts, loss_sums, loss_weights, mean_terms
from src.model.net import PoseNet
from src.train.sharding import whole
from src.utils.train_utils import get_lr_factor, get_progressive_dropout

SEED_PRIME = 1_000_003  # spreads (seed, step, rank) over the generator's 64 bits


@dataclass
class StepResult:
    """What a step leaves behind. Tensors stay on the device until somebody reads them."""

    lr: float
    dropout_rate: float
    term: torch.Tensor  # [NUM_TERM] global mean of each loss term
    total: torch.Tensor  # [] weighted sum of the terms
    grad_norm: torch.Tensor  # [] before clipping
    sample_sum: list[torch.Tensor]  # of each micro-batch [B, NUM_TERM]: each sample's loss sums on this process
    skipped: torch.Tensor  # [2] int64 as of this step: bad steps in a row, and steps left out since the run began
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
    """What `torch.manual_seed` takes before the forward pass of a step, so that a resumed run draws the same."""
    return ((seed * SEED_PRIME + step) * SEED_PRIME + rank) % 2**63


def bare_network(model: nn.Module) -> PoseNet:
    """The PoseNet inside what Accelerate, DDP and torch.compile wrapped around it."""
    while not isinstance(model, PoseNet):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


class Trainer:
    """What every step needs: the wrapped model, the optimizer and the schedules' settings."""

    def __init__(
        self, cfg: Config, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.cfg = cfg
        self.accelerator = accelerator
        self.model = model  # as Accelerate wrapped it
        self.net = bare_network(model)
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.loss_weight = loss_weights(cfg.LOSS).to(accelerator.device)
        self.skipped = torch.zeros(2, dtype=torch.int64, device=accelerator.device)  # as StepResult.skipped

    def train_step(self, step: int, micro_batches: list[Batch], stop: bool = False) -> StepResult:
        """Take optimizer step number `step` (from 0) on this process's share of the global batch.

        `stop`: this process has been asked to stop; all learn of it through the reduction of the counts.
        """
        lr_factor, rate = self._apply_schedules(step)
        counts, stops = self._global_counts(micro_batches, stop)
        sample_sum = []
        for last, batch in _mark_last(micro_batches):
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
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
        (`found_inf`) and a GradScaler leave such an update out, moments and step count included.
        """
        halted = self.skipped[0] >= self.cfg.TRAIN.max_skipped_step
        poison = torch.where(halted, torch.nan, total * 0.0)  # 0 where all is well
        next(p.grad for p in self.parameters if p.grad is not None).add_(poison)
        grad_norm = whole(self.accelerator.clip_grad_norm_(self.parameters, self.cfg.TRAIN.max_grad))
        left_out = ~torch.isfinite(grad_norm)
        is_bad, scaler = left_out, self.accelerator.scaler
        if scaler is None:
            self.optimizer.optimizer.found_inf = left_out.float()
        else:  # an overflow while the scale can still fall is the scaler's search for it, not a fault
            is_bad = left_out & ((scaler._scale <= 1.0) | ~torch.isfinite(total) | halted)
        self.skipped = torch.stack([(self.skipped[0] + 1) * is_bad, self.skipped[1] + left_out])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _apply_schedules(self, step: int) -> tuple[float, float]:
        """Push the rates of this step; seed what the forward draws."""
        general = self.cfg.GENERAL
        torch.manual_seed(step_seed(general.seed, step, self.accelerator.process_index))
        factor = get_lr_factor(step, general.total_step, general.warmup_step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        rate = get_progressive_dropout(
            step,
            general.total_step,
            general.dropout_warmup_step,
            self.cfg.MODEL.handec.dropout,
            general.dropout_schedule,
        )
        self.net.set_dropout_rate(rate)
        return factor, rate

    def _global_counts(self, micro_batches: list[Batch], stop: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Valid items of the global batch [NUM_TERM], and how many processes were asked to stop [1]."""
        counts = torch.cat([loss_counts(batch) for batch in micro_batches]).sum(0)
        reduced = self.accelerator.reduce(torch.cat([counts, counts.new_full((1,), float(stop))]), "sum")
        return reduced[:-1], reduced[-1:]

    def _backward(self, batch: Batch, counts: torch.Tensor) -> torch.Tensor:
        """Accumulate the gradient of one micro-batch; returns its samples' loss sums [B, NUM_TERM], detached.

        DDP and FSDP average gradients over the processes, hence the factor: their sum is what a mean over global counts
        needs.
        """
        sums = loss_sums(self.model(batch), batch, self.net.hand)
        loss = mean_terms(sums.sum(0), counts) @ self.loss_weight
        self.accelerator.backward(loss * self.accelerator.num_processes)
        return sums.detach()


def _mark_last(items: list[Batch]) -> list[tuple[bool, Batch]]:
    return [(index == len(items) - 1, item) for index, item in enumerate(items)]
