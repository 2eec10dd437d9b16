"""One training run: its components, its folder, and what happens at intervals. The script loops, step.py computes.

Every process holds a Run; the main one writes. Shapes are those of src/batch.py.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from rich.progress import Progress

from src.batch import Batch
from src.checkpoint.folder import CONFIG
from src.checkpoint.network import init_from
from src.checkpoint.run_folder import config_yaml, create_run_folder, lock_run_folder
from src.checkpoint.save import CheckpointError, TrainState, load_checkpoint, network_texts
from src.checkpoint.writer import CheckpointWriter
from src.config import Config
from src.data.demo.make import make_demo_data
from src.data.health import merge_states
from src.data.loader import HandLoader, build_train_loader, build_val_loader, to_device, train_eval_config
from src.data.mean_hand import mean_hand
from src.data.plausibility.report import warn_if_implausible
from src.distributed.processes import build_accelerator, main_process_first, shut_down
from src.distributed.signals import StopRequested, StopSignals
from src.hand.load import load_hand
from src.model.net import PoseNet
from src.tracking.tracker import Tracker, name_run
from src.train import sharding
from src.train.optimizer import build_optimizer
from src.train.report import closing_table, describe_dropout, describe_network, where_to_look
from src.train.resume import find_origin
from src.train.shared_health import corruption_row, exchange
from src.train.step import StepResult, Trainer, log_line, prepare_model
from src.train.step_watch import DelayedRead, StepWatch
from src.train.validation import describe, evaluate, key_metric
from src.utils.console import add_log_file, console, logger, task_bar, track
from src.utils.files import write_atomic
from src.utils.vis import overlay_sheet


class Run:
    """Builds all components, and loads their state from the checkpoint that `GENERAL.resume_path` names."""

    def __init__(
        self,
        cfg: Config,
        config_name: str,
        progress: Progress,
        signals: StopSignals | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        self.cfg, self.progress, self.signals = cfg, progress, signals or StopSignals()
        if cfg.TRAIN.shard_weights:
            sharding.check_processes()
        self.accelerator = build_accelerator(cfg)
        self.is_main = self.accelerator.is_main_process
        checkpoint, in_place = find_origin(cfg, config_name, self.accelerator)
        with main_process_first(self.accelerator):
            make_demo_data(cfg, progress)

        torch.manual_seed(cfg.GENERAL.seed)
        hand = load_hand(cfg.MODEL.hand_model)
        self.net = PoseNet(cfg.MODEL, hand).to("cpu" if cfg.TRAIN.shard_weights else self.accelerator.device)
        optimizer = build_optimizer(self.net, cfg)
        self.state = self._load_state(checkpoint, optimizer, config_name)
        self.trainer = self._build_trainer(optimizer)

        self.train_loader, self.val_loader, self.train_eval_loader = self._build_loaders(hand.name)
        self.mean_hand = mean_hand(self.train_loader.dataset, hand)
        self.folder = self._claim_folder(config_name, checkpoint if in_place else None)
        if self.is_main:
            self.tracker = Tracker(
                self.folder,
                run_name=name_run(config_name, overrides, cfg.GENERAL.seed),
                config=asdict(cfg),
                aim=cfg.AIM,
                description=cfg.GENERAL.description,
                resume=self.state.tracker if in_place else None,
            )
        self.watch = StepWatch(self.folder, self.trainer, self.train_loader.dataset, self.state)
        self.start_time, self.start_step = time.perf_counter(), self.state.step
        self.checkpoint_step = self.state.step  # of the newest checkpoint, even if still being written, or the start
        self.writer = CheckpointWriter(self.state.step if in_place else None)
        self.task = progress.add_task("training", total=cfg.GENERAL.total_step, completed=self.state.step)
        logger.info(describe_network(self.net, hand, self.accelerator))
        if note := describe_dropout(cfg):
            logger.info(note)
        if self.is_main:
            for name, loader in (("training", self.train_loader), ("validation", self.val_loader)):
                warn_if_implausible(name, loader.dataset, {hand.name: hand})
        if self.is_main and (saved := self.state.extra.get("health")):  # the sum over all processes
            self.train_loader.health.load_state_dict(saved)
        for name, health in (("training", self.train_loader.health), ("validation", self.val_loader.health)):
            if health.counts():
                logger.warning(f"{name} data: {health.summary()}\n{health.table()}")

    # ---- called by the loop -----------------------------------------------------------------------------------------

    def micro_batches(self) -> Iterator[list[Batch]]:
        """The micro-batches of each remaining step, on the device."""
        batches = to_device(self.train_loader, self.accelerator.device)
        while self.state.step < self.cfg.GENERAL.total_step:
            yield list(islice(batches, self.cfg.TRAIN.grad_accum_step))

    def catch_up(self) -> None:
        """Run the validation before the first step, or one that a stop interrupted."""
        if self.state.step == 0:
            self.validate()
        elif self.state.validation_due:
            self.save(is_best=self.validate())

    def step(self, micro_batches: list[Batch]) -> StepResult:
        """Take one optimizer step.

        Raises NumbersError after too many skipped steps in a row, CheckpointError if a checkpoint could not be written.
        """
        result = self.trainer.train_step(self.state.step, micro_batches, self.signals.requested is not None)
        self.state.step += 1
        self.state.data_position += self.accelerator.num_processes * sum(len(batch) for batch in micro_batches)
        self.watch.push(self.state.step, micro_batches, result)
        self.writer.poll()
        self.progress.update(self.task, completed=self.state.step)
        return result

    def check_stop(self) -> None:
        """Raises StopRequested, at the same step on every process, once one of them has been asked to stop."""
        is_single = self.accelerator.num_processes == 1
        if self.watch.must_stop or (is_single and self.signals.requested):
            raise StopRequested(self.signals.requested or "a signal to another process")

    def is_due(self, interval: int, at_end: bool = False) -> bool:
        """Whether the step just done ends an interval (or the run)."""
        return self.state.step % interval == 0 or (at_end and self.state.step == self.cfg.GENERAL.total_step)

    def log(self, result: StepResult) -> None:
        """Write the log line and the journal's row, which AIM plots."""
        bad = corruption_row(self.train_loader.health, self.train_loader.health.read)
        if self.is_main:
            metrics = result.metrics()
            logger.info(log_line(self.state.step, self.cfg.GENERAL.total_step, metrics))
            self.tracker.log(self.state.step, "train", metrics | bad)

    @torch.no_grad()
    def draw(self, batch: Batch) -> None:
        """Draw prediction and target over training patches, predicted without dropout."""
        if not (self.is_main or self.cfg.TRAIN.shard_weights):
            return
        self.net.eval()
        with self.accelerator.autocast():
            prediction = self.net(batch)  # a collective with sharded weights
        self.net.train()
        if self.is_main:
            sheet = overlay_sheet(batch, prediction, self.net.hand.faces.cpu().numpy())
            self.tracker.image(self.state.step, "train", "overlay", sheet)

    def validate(self) -> bool:
        """Evaluate the fixed samples and log the result; returns whether it is the best so far.

        Raises StopRequested, without a trace of this validation, if a process is asked to stop meanwhile.
        """
        health = self.val_loader.health
        before = Counter(health.read)
        metrics, sheet = self._evaluate(self.val_loader, "validation", mean_hand=self.mean_hand)
        bad = corruption_row(health, health.read - before)
        train_eval = None
        if self.train_eval_loader is not None:
            train_eval, _ = self._evaluate(self.train_eval_loader, "training sample", draw=False)
            exchange(self.train_eval_loader.health, Counter())
        value = key_metric(metrics)
        if self.is_main:
            if train_eval is not None:
                self.tracker.log(self.state.step, "train_eval", train_eval)
            self.tracker.log(self.state.step, "val", metrics | bad)
            self.tracker.image(self.state.step, "val", "overlay", sheet)
            logger.info(f"validation at step {self.state.step}: {describe(metrics)}")
        if self.state.step == 0:
            return False  # no checkpoint is saved at step 0
        is_best = math.isfinite(value) and (self.state.best_metric is None or value < self.state.best_metric)
        if is_best:
            self.state.best_metric, self.state.best_step = value, self.state.step
        return is_best

    def save(self, is_best: bool, validation_due: bool = False) -> None:
        """Start writing a checkpoint; training continues meanwhile."""
        self.watch.flush()
        self.state.validation_due = validation_due
        self.state.extra = {"health": merge_states(gather_object([self.train_loader.health.state_dict()]))}
        self.checkpoint_step = self.state.step
        model, optimizer = self.net, self.trainer.optimizer
        if self.cfg.TRAIN.shard_weights:
            self.writer.join()  # free the host memory of the last one's copy
            model, optimizer = (sharding.gather(each, keep=self.is_main) for each in (model, optimizer))
        if self.is_main:
            self.state.tracker = self.tracker.state()
            self.writer.save(
                self.folder,
                model=model,
                optimizer=optimizer,
                scaler=self.accelerator.scaler,
                state=self.state,
                texts=network_texts(self.cfg, self.net),
                keep=self.cfg.GENERAL.keep_checkpoint,
                is_best=is_best,
            )

    def finish(self) -> None:
        """Wait for the last checkpoint and print the closing table."""
        self.writer.join()
        self.accelerator.wait_for_everyone()
        self.progress.stop()
        if self.is_main:
            seconds = time.perf_counter() - self.start_time
            console.print(closing_table(self.folder, seconds, self.start_step))
            closing = where_to_look(self.folder, self.cfg.AIM, self.tracker.run_name, self.tracker.is_behind)
            console.print(closing, soft_wrap=True)

    # ---- called when the run ends early -----------------------------------------------------------------------------

    def save_now(self) -> None:
        """Save the steps since the newest checkpoint, if any, and wait until it is written."""
        if self.state.step != self.checkpoint_step:
            self.save(is_best=False, validation_due=self.is_due(self.cfg.GENERAL.checkpoint_step, at_end=True))
        self.writer.join()
        self.accelerator.wait_for_everyone()

    def resume_hint(self) -> str:
        """How to resume, for the last message of a run that ends early."""
        if self.writer.saved_step is None:
            return "no checkpoint has been written yet"
        return (
            f"resume from the checkpoint at step {self.writer.saved_step} with the same command and "
            f"GENERAL.resume_path={self.folder}"
        )

    def close(self, timeout: float = 60.0, wait_for_peers: bool = True) -> None:
        """Finish checkpoint and tracker, the latter within `timeout` seconds, and shut the processes down.

        `wait_for_peers=False`: other processes may be gone.
        """
        try:
            self.writer.join()
        except CheckpointError as error:
            logger.error(str(error))
        if self.is_main:
            self.tracker.close(timeout)
        if wait_for_peers:
            shut_down(self.accelerator)

    # ---- components -------------------------------------------------------------------------------------------------

    def _load_state(self, checkpoint: Path | None, optimizer: torch.optim.Optimizer, config_name: str) -> TrainState:
        """Load network, optimizer and scaler from a checkpoint, or only the network from `MODEL.init_from`."""
        if checkpoint is not None:
            scaler = self.accelerator.scaler
            return load_checkpoint(checkpoint, model=self.net, optimizer=optimizer, scaler=scaler)
        if self.cfg.MODEL.init_from is not None:
            logger.info(str(init_from(self.net, self.cfg.MODEL.init_from)))
        return TrainState(config_name=config_name)

    def _build_trainer(self, optimizer: torch.optim.Optimizer) -> Trainer:
        """A Trainer whose weights are replicated on each process (DDP) or sharded (FSDP)."""
        model = prepare_model(self.net, self.cfg)
        if self.cfg.TRAIN.shard_weights:
            sharding.shard(self.net, optimizer, self.accelerator)
            return Trainer(self.cfg, self.accelerator, model, self.accelerator.prepare(optimizer))
        return Trainer(self.cfg, self.accelerator, *self.accelerator.prepare(model, optimizer))

    def _build_loaders(self, hand_model: str) -> tuple[HandLoader, HandLoader, HandLoader | None]:
        """Loaders of training from the state's position, validation, and the training frames evaluated beside it.

        The main process indexes new shards first.
        """
        place = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        options = {**place, "pin_memory": self.accelerator.device.type == "cuda"}
        with main_process_first(self.accelerator), task_bar(self.progress, "indexing shards") as advance:
            start = self.state.data_position
            train = build_train_loader(self.cfg, hand_model, start=start, progress=advance, **options)
            val = build_val_loader(self.cfg, hand_model, progress=advance, **options)
            train_eval = train_eval_config(self.cfg)
            return train, val, None if train_eval is None else build_val_loader(train_eval, hand_model, **options)

    def _claim_folder(self, config_name: str, newest: Path | None) -> Path:
        """The run folder, locked by the main process: that of the run's newest checkpoint, else a new one.

        Resuming from an older checkpoint branches off into a new folder and leaves the later steps untouched.
        """
        if newest is not None:
            folder, config = newest.parent.parent, f"config.resumed-{self.state.step}.yaml"
        else:
            made = create_run_folder(Path(self.cfg.GENERAL.output_root), config_name) if self.is_main else None
            folder, config = broadcast_object_list([made])[0], CONFIG
        if self.is_main:
            self._lock = lock_run_folder(folder)
            write_atomic(folder / config, config_yaml(self.cfg))
            add_log_file(folder / "log.txt")
            logger.info(f"run folder: {folder}")
        return folder

    # ---- validation -------------------------------------------------------------------------------------------------

    def _evaluate(self, loader: HandLoader, name: str, **options: Any) -> tuple[dict[str, float], np.ndarray | None]:
        batches = self._until_stopped(track(self.progress, loader, len(loader), name))
        return evaluate(self.net, batches, self.accelerator, self.cfg.LOSS, **options)

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches; raises StopRequested, on all processes at the same batch, once one has been asked to stop."""
        reads: DelayedRead[None] = DelayedRead()
        for batch in batches:
            stops = self.signals.requested is not None
            if self.accelerator.num_processes > 1:
                flag = torch.full((1,), float(stops), device=self.accelerator.device)
                stops = any(value[0] for value, _ in reads.push(self.accelerator.reduce(flag, "sum"), None))
            if stops:
                raise StopRequested(self.signals.requested or "a signal to another process")
            yield batch
