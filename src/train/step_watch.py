"""Finds out, one step late and without waiting for the device, whether a step was skipped or a process must stop."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Generic, TypeVar

import torch
from accelerate.utils import gather_object

from src.batch import Batch
from src.checkpoint.save import TrainState, network_texts
from src.data.dataset import HandDataset
from src.loss import LOSS_TERMS
from src.train.bad_batch import BadStep, NumbersError, describe_samples, save_batch, save_step, write_report
from src.train.sharding import gather
from src.train.step import StepResult, Trainer
from src.utils.console import logger

T = TypeVar("T")
_Step = tuple[int, list[Batch], StepResult]  # steps done, this one included

LAG = 1  # pushes after which a value is read


class DelayedRead(Generic[T]):
    """A queue of small device tensors, each with a context object, that are read as numbers LAG pushes later.

    Every process pushes at the same points and so reads the same values at the same points: after a collective
    reduction all processes take the same decision.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[torch.Tensor, torch.cuda.Event | None, T]] = deque()

    def push(self, value: torch.Tensor, context: T) -> list[tuple[list[float], T]]:
        """Add a vector; returns those that are due, oldest first. Waits only for one that is LAG pushes old."""
        event = None
        if value.is_cuda:
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            value = host.copy_(value, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((value, event, context))
        return self._read(LAG)

    def flush(self) -> list[tuple[list[float], T]]:
        """Read everything that is left; waits for the device."""
        return self._read(0)

    def _read(self, keep: int) -> list[tuple[list[float], T]]:
        due = []
        while len(self._waiting) > keep:
            value, event, context = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            due.append((value.tolist(), context))
        return due


class StepWatch:
    """Checks each step, LAG steps later: was its update skipped, was a process asked to stop."""

    def __init__(self, run_folder: Path, trainer: Trainer, dataset: HandDataset, state: TrainState) -> None:
        """`state` holds the counts of skipped steps; a resumed run continues them."""
        self.run_folder, self.trainer, self.dataset, self.state = run_folder, trainer, dataset, state
        self.accelerator, self.cfg = trainer.accelerator, trainer.cfg
        self.must_stop = False
        self._steps: DelayedRead[_Step] = DelayedRead()
        trainer.skipped = torch.tensor([state.skipped_in_row, state.skipped_step], device=self.accelerator.device)

    def push(self, step: int, micro_batches: list[Batch], result: StepResult) -> None:
        """Add a step that was just launched. Raises NumbersError as `flush` does."""
        values = torch.cat([result.stop.double(), result.skipped.double()])
        self._check(self._steps.push(values, (step, micro_batches, result)))

    def flush(self) -> None:
        """Check the remaining steps; waits for the device. Every process raises NumbersError after too many skips."""
        self._check(self._steps.flush())

    def _check(self, due: list[tuple[list[float], _Step]]) -> None:
        for (stops, in_row, skipped), (step, micro_batches, result) in due:
            self.must_stop |= stops > 0
            self.state.skipped_in_row, self.state.skipped_step = int(in_row), int(skipped)
            if in_row:
                self._report(step, micro_batches, result, int(in_row))

    def _report(self, step: int, micro_batches: list[Batch], result: StepResult, in_row: int) -> None:
        """Log the samples of a skipped step; if it is one too many, save everything needed to replay it."""
        rank = self.accelerator.process_index
        samples = describe_samples(self.dataset, micro_batches, result.sample_sum, rank)
        metrics = result.metrics()
        terms = {name: metrics[name] for name in (*LOSS_TERMS, "loss_total", "grad_norm")}
        bad = BadStep(step, in_row, terms, gather_object(samples))
        context = {
            "num_process": self.accelerator.num_processes,
            "precision": self.accelerator.mixed_precision,
            "seed": self.cfg.GENERAL.seed,
            "dropout_rate": result.dropout_rate,
            "loss_weight": self.trainer.loss_weight.tolist(),
        }
        limit = self.cfg.TRAIN.max_skipped_step
        if self.accelerator.is_main_process:
            logger.warning(f"step {bad.step} skipped, {in_row} in a row (limit {limit}): {bad}")
            write_report(self.run_folder, bad, context)
        if in_row < limit:
            return
        folder, net = self.run_folder / f"bad_batch-{bad.step}", self.trainer.net
        save_batch(folder, rank, micro_batches)
        weights = gather(net, keep=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        if weights is not None:
            save_step(folder, bad, context, weights, network_texts(self.cfg, net))
        raise NumbersError(
            f"{in_row} steps in a row were skipped (TRAIN.max_skipped_step={limit}), the last one, {step}, with {bad}\n"
            f"{bad.advice()}\nReplay it with: python script/replay_batch.py {folder}"
        )
