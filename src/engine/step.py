"""One optimizer step: seeds, schedules, forward, backward, clip, update. `train_step` computes; the script loops.

A step sees all its micro-batches at once. The loss is the mean over the valid items of the whole global batch: one
process with 32 samples, four with 8, or two with two micro-batches of 8 each take the same step.
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

    def metrics(self) -> dict[str, float]:
        """Everything as numbers, in the order of the log line. Waits for the device."""
        term = dict(zip(LOSS_TERMS, self.term.tolist(), strict=True))
        return {
            "lr": self.lr,
            "dropout_rate": self.dropout_rate,
            "loss_total": self.total.item(),
            **term,
            "grad_norm": self.grad_norm.item(),
        }


def log_line(step: int, total_step: int, metrics: dict[str, float]) -> str:
    """The line that users grep: `3000/100000 lr=1.0000e-04 dropout=0.000 total=1.1500 loss_theta=0.0800 ...`."""
    terms = " ".join(f"{name}={metrics[name]:.4f}" for name in LOSS_TERMS)
    return (
        f"{step}/{total_step} lr={metrics['lr']:.4e} dropout={metrics['dropout_rate']:.3f} "
        f"total={metrics['loss_total']:.4f} {terms}"
    )


def build_optimizer(model: PoseNet, cfg: Config) -> torch.optim.AdamW:
    """AdamW with the recipe's groups; fused where the device has it."""
    groups = model.parameter_groups(cfg.TRAIN.lr, cfg.TRAIN.backbone_lr, cfg.TRAIN.weight_decay)
    return torch.optim.AdamW(groups, lr=cfg.TRAIN.lr, fused=True)


class Trainer:
    """What every step needs: the wrapped model, the optimizer and the schedules' settings."""

    def __init__(
        self, cfg: Config, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.cfg = cfg
        self.accelerator = accelerator
        self.model = model  # as Accelerate wrapped it
        self.net: PoseNet = accelerator.unwrap_model(model)
        self.optimizer = optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.loss_weight = loss_weights(cfg.LOSS).to(accelerator.device)

    def train_step(self, step: int, micro_batches: list[Batch]) -> StepResult:
        """Take optimizer step number `step` (from 0) on this process's share of the global batch."""
        lr_factor, rate = self._apply_schedules(step)
        counts = self._global_counts(micro_batches)
        sums = torch.zeros_like(counts)
        for last, batch in _mark_last(micro_batches):
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                sums += self._backward(batch, counts)
        grad_norm = self.accelerator.clip_grad_norm_(self.parameters, self.cfg.TRAIN.max_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        term = mean_terms(self.accelerator.reduce(sums, "sum"), counts)
        return StepResult(self.cfg.TRAIN.lr * lr_factor, rate, term, term @ self.loss_weight, grad_norm)

    def _apply_schedules(self, step: int) -> tuple[float, float]:
        """Push the rates of this step; seed what the forward draws, so that a resumed run draws the same."""
        general = self.cfg.GENERAL
        seed = (general.seed * SEED_PRIME + step) * SEED_PRIME + self.accelerator.process_index
        torch.manual_seed(seed % 2**63)
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

    def _global_counts(self, micro_batches: list[Batch]) -> torch.Tensor:
        counts = torch.cat([loss_counts(batch) for batch in micro_batches]).sum(0)
        return self.accelerator.reduce(counts, "sum")

    def _backward(self, batch: Batch, counts: torch.Tensor) -> torch.Tensor:
        """Accumulate the gradient of one micro-batch; returns its loss sums [NUM_TERM], detached.

        DDP averages gradients over the processes, hence the factor: their sum is what a mean over global counts needs.
        """
        sums = loss_sums(self.model(batch), batch, self.net.hand).sum(0)
        loss = mean_terms(sums, counts) @ self.loss_weight
        self.accelerator.backward(loss * self.accelerator.num_processes)
        return sums.detach()


def _mark_last(items: list[Batch]) -> list[tuple[bool, Batch]]:
    return [(index == len(items) - 1, item) for index, item in enumerate(items)]
