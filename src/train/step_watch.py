"""Finds out, one step late and without waiting for the device, whether a step was skipped or a process must stop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object

from src.batch import Batch
from src.checkpoint.save import TrainState, network_texts
from src.data.dataset import HandDataset
from src.loss import LOSS_TERMS
from src.train.bad_batch import BadStep, NumbersError, describe_samples, save_batch, save_step, write_report
from src.train.delayed_read import DelayedRead
from src.train.sharding import gather
from src.train.step import StepResult, Trainer
from src.utils.console import logger


@dataclass
class _PendingStep:
    """What is kept of a step until its outcome is read."""

    step: int  # steps done, this one included
    micro_batches: list[Batch]
    result: StepResult


class StepWatch:
    """Checks each step, LAG steps later: was its update skipped, was a process asked to stop."""

    def __init__(self, run_folder: Path, trainer: Trainer, dataset: HandDataset, state: TrainState) -> None:
        """`state` holds the counts of skipped steps; a resumed run continues them."""
        self.run_folder, self.trainer, self.dataset, self.state = run_folder, trainer, dataset, state
        self.accelerator, self.cfg = trainer.accelerator, trainer.cfg
        self.must_stop = False
        self._steps: DelayedRead[_PendingStep] = DelayedRead()
        trainer.skipped = torch.tensor([state.skipped_in_row, state.skipped_step], device=self.accelerator.device)

    def push(self, step: int, micro_batches: list[Batch], result: StepResult) -> None:
        """Add a step that was just launched. Raises NumbersError as `flush` does."""
        values = torch.cat([result.stop.double(), result.skipped.double()])
        self._check(self._steps.push(values, _PendingStep(step, micro_batches, result)))

    def flush(self) -> None:
        """Check the steps that are left; waits for the device.

        Raises NumbersError, on every process, after `TRAIN.max_skipped_step` skipped steps in a row.
        """
        self._check(self._steps.flush())

    def _check(self, due: list[tuple[list[float], _PendingStep]]) -> None:
        for (stops, in_row, skipped), pending in due:
            self.must_stop |= stops > 0
            self.state.skipped_in_row, self.state.skipped_step = int(in_row), int(skipped)
            if in_row:
                self._report(pending, int(in_row))

    def _report(self, pending: _PendingStep, in_row: int) -> None:
        """Log the samples of a skipped step; if it is one too many, save everything needed to replay it."""
        rank = self.accelerator.process_index
        samples = describe_samples(self.dataset, pending.micro_batches, pending.result.sample_sum, rank)
        metrics = pending.result.metrics()
        terms = {name: metrics[name] for name in (*LOSS_TERMS, "loss_total", "grad_norm")}
        bad = BadStep(pending.step, in_row, terms, gather_object(samples))
        context = {
            "num_process": self.accelerator.num_processes,
            "precision": self.accelerator.mixed_precision,
            "seed": self.cfg.GENERAL.seed,
            "dropout_rate": pending.result.dropout_rate,
            "loss_weight": self.trainer.loss_weight.tolist(),
        }
        limit = self.cfg.TRAIN.max_skipped_step
        if self.accelerator.is_main_process:
            logger.warning(f"step {bad.step} skipped, {in_row} in a row (limit {limit}): {bad}")
            write_report(self.run_folder, bad, context)
        if in_row >= limit:
            self._save_and_raise(bad, context, pending.micro_batches)

    def _save_and_raise(self, bad: BadStep, context: dict[str, Any], micro_batches: list[Batch]) -> NoReturn:
        folder, net = self.run_folder / f"bad_batch-{bad.step}", self.trainer.net
        save_batch(folder, self.accelerator.process_index, micro_batches)
        weights = gather(net, keep=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        if weights is not None:
            save_step(folder, bad, context, weights, network_texts(self.cfg, net))
        raise NumbersError(
            f"{bad.in_row} steps in a row were skipped (TRAIN.max_skipped_step={self.cfg.TRAIN.max_skipped_step}), "
            f"the last one, {bad.step}, with {bad}\n{bad.advice()}\n"
            f"Replay it with: python script/replay_batch.py {folder}"
        )
