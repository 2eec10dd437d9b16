"""Watches a run without waiting for the device: small results of a step are copied aside and read a step later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import torch
from accelerate.utils import gather_object

from src.batch import Batch
from src.checkpoint.save import TrainState, network_texts
from src.data.dataset import HandDataset
from src.distributed.signals import StopRequested
from src.loss import LOSS_TERMS
from src.train.bad_batch import (
    BadStep,
    NumbersError,
    describe_samples,
    replay_folder,
    save_batch,
    save_step,
    write_report,
)
from src.train.sharding import gather
from src.train.step import StepResult, Trainer
from src.utils.console import logger

T = TypeVar("T")

LAG = 1  # steps after which a result is read


class DelayedRead(Generic[T]):
    """A queue of small device tensors that become numbers LAG pushes later, each with what it is about.

    Every process pushes at the same points and so reads the same at the same points: what follows from the numbers of
    a collective reduction is decided by all alike.
    """

    def __init__(self, lag: int = LAG) -> None:
        self.lag = lag
        self._waiting: deque[tuple[torch.Tensor, torch.cuda.Event | None, T]] = deque()

    def push(self, value: torch.Tensor, about: T) -> list[tuple[list[float], T]]:
        """Take a vector in; returns those that are due, oldest first. Waits only for one that is `lag` pushes old."""
        event = None
        if value.is_cuda:
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            value = host.copy_(value, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((value, event, about))
        return self._read(self.lag)

    def flush(self) -> list[tuple[list[float], T]]:
        """All that still wait; waits for the device."""
        return self._read(0)

    def _read(self, keep: int) -> list[tuple[list[float], T]]:
        due = []
        while len(self._waiting) > keep:
            value, event, about = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            due.append((value.tolist(), about))
        return due


@dataclass
class _Seen:
    """What is kept of a step until its verdict is read."""

    step: int  # steps done, this one included
    micro_batches: list[Batch]
    result: StepResult


class StepWatch:
    """Learns of each step, LAG steps later, whether its update was left out and whether a process was asked to stop."""

    def __init__(self, run_folder: Path, trainer: Trainer, dataset: HandDataset, state: TrainState) -> None:
        """`state` gets the counts of steps that were left out; a resumed run goes on with them."""
        self.run_folder, self.trainer, self.dataset, self.state = run_folder, trainer, dataset, state
        self.accelerator, self.cfg = trainer.accelerator, trainer.cfg
        self.must_stop = False
        self._steps: DelayedRead[_Seen] = DelayedRead()
        trainer.skipped = torch.tensor([state.skipped_in_row, state.skipped_step], device=self.accelerator.device)

    def push(self, step: int, micro_batches: list[Batch], result: StepResult) -> None:
        """Take in a step that has just been launched. Raises NumbersError as `flush`."""
        values = torch.cat([result.stop.double(), result.skipped.double()])
        self._review(self._steps.push(values, _Seen(step, micro_batches, result)))

    def flush(self) -> None:
        """Read what is left; waits for the device.

        Raises NumbersError, on every process, after `TRAIN.max_skipped_step` steps in a row that were left out.
        """
        self._review(self._steps.flush())

    def _review(self, due: list[tuple[list[float], _Seen]]) -> None:
        for (stops, in_row, skipped), seen in due:
            self.must_stop |= stops > 0
            self.state.skipped_in_row, self.state.skipped_step = int(in_row), int(skipped)
            if in_row:
                self._report(seen, int(in_row))

    def _report(self, seen: _Seen, in_row: int) -> None:
        """Name the samples of a bad step, and keep everything of the one that is too many."""
        rank = self.accelerator.process_index
        share = describe_samples(self.dataset, seen.micro_batches, seen.result.sample_sum, rank)
        metrics = seen.result.metrics()
        terms = {name: metrics[name] for name in (*LOSS_TERMS, "loss_total", "grad_norm")}
        bad = BadStep(seen.step, in_row, terms, gather_object(share))
        how = {
            "num_process": self.accelerator.num_processes,
            "precision": self.accelerator.mixed_precision,
            "seed": self.cfg.GENERAL.seed,
            "dropout_rate": seen.result.dropout_rate,
            "loss_weight": self.trainer.loss_weight.tolist(),
        }
        most = self.cfg.TRAIN.max_skipped_step
        if self.accelerator.is_main_process:
            logger.warning(f"step {bad.step} left out, {in_row} in a row (at most {most}): {bad}")
            write_report(self.run_folder, bad, how)
        if in_row >= most:
            self._keep(bad, how, seen.micro_batches)

    def _keep(self, bad: BadStep, how: dict[str, Any], micro_batches: list[Batch]) -> NoReturn:
        folder, net = replay_folder(self.run_folder, bad.step), self.trainer.net
        save_batch(folder, self.accelerator.process_index, micro_batches)
        weights = gather(net, keep=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()
        if weights is not None:
            save_step(folder, bad, how, weights, network_texts(self.cfg, net))
        raise NumbersError(
            f"{bad.in_row} steps in a row were left out (TRAIN.max_skipped_step={self.cfg.TRAIN.max_skipped_step}), "
            f"the last, {bad.step}, with {bad}\n{bad.advice()}\n"
            f"Look closer with: python script/replay_batch.py {folder}"
        )

    # ---- stopping ---------------------------------------------------------------------------------------------------

    def guard(self, batches: Iterable[Batch], requested: Callable[[], str | None]) -> Iterator[Batch]:
        """Pass batches of validation through until a process has been asked to stop; then StopRequested on all."""
        reads: DelayedRead[None] = DelayedRead()
        for batch in batches:
            if self.accelerator.num_processes == 1:
                stops = requested() is not None
            else:
                flag = torch.full((1,), float(requested() is not None), device=self.accelerator.device)
                stops = any(value[0] for value, _ in reads.push(self.accelerator.reduce(flag, "sum"), None))
            if stops:
                raise StopRequested(requested() or "a signal to another process")
            yield batch
