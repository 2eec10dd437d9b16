"""One training run: its parts, its folder, and what happens at intervals. The script drives it, step.py computes.

Every process holds a Run; the main one writes. Shapes are those of src/batch.py.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from rich.progress import Progress

from src.batch import Batch
from src.checkpoint.network import init_from
from src.checkpoint.run_folder import lock_run_folder, make_run_folder, write_config
from src.checkpoint.save import CheckpointError, TrainState, load_checkpoint, network_texts
from src.checkpoint.writer import CheckpointWriter
from src.config import Config
from src.data.loader import HandLoader, build_train_loader, build_val_loader
from src.data.mean_hand import mean_hand
from src.data.prefetch import to_device
from src.distributed.processes import HostTalk, build_accelerator, main_process_first, part
from src.distributed.signals import StopRequested, StopSignals
from src.hand.load import load_hand
from src.model.net import PoseNet
from src.tracking.tracker import Tracker, name_run
from src.train import components as parts
from src.train import sharding
from src.train.optimizer import build_optimizer
from src.train.report import closing_table, where_to_look
from src.train.resume import find_origin
from src.train.shared_health import SharedDamage, name_indexed
from src.train.step import StepResult, Trainer, log_line
from src.train.step_watch import StepWatch
from src.train.validation import Validation, describe, evaluate, key_metric
from src.utils.console import add_log_file, console, logger, task_bar, track
from src.utils.vis import overlay_sheet


class Run:
    """Builds the parts, or takes them over from the checkpoint that `GENERAL.resume_path` names."""

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
        self.damage = SharedDamage(HostTalk(self.accelerator), self.is_main)
        origin = find_origin(cfg, config_name, self.accelerator)
        with main_process_first(self.accelerator):
            parts.make_demo_data(cfg, progress)

        torch.manual_seed(cfg.GENERAL.seed)
        hand = load_hand(cfg.MODEL.hand_model)
        self.net = PoseNet(cfg.MODEL, hand).to("cpu" if cfg.TRAIN.shard_weights else self.accelerator.device)
        optimizer = build_optimizer(self.net, cfg)
        self.state = self._start_from(origin.checkpoint, optimizer, config_name)
        self.trainer = self._build_trainer(optimizer)

        self.train_loader, self.val_loader, self.train_eval_loader = self._build_loaders(hand.name)
        self.mean_hand = mean_hand(self.train_loader.dataset, hand)
        self.folder = self._claim_folder(config_name, origin.checkpoint if origin.in_place else None)
        self.tracker = self._open_tracker(origin.in_place, name_run(config_name, overrides, cfg.GENERAL.seed))
        self.watch = StepWatch(self.folder, self.trainer, self.train_loader.dataset, self.state)
        self.saved_at = self.state.step  # the newest step that a checkpoint was begun at, or that this run started from
        self.writer = CheckpointWriter(self.state.step if origin.in_place else None)
        self.started, self.begun_at = time.perf_counter(), self.state.step
        self.task = progress.add_task("training", total=cfg.GENERAL.total_step, completed=self.state.step)
        logger.info(parts.describe_hand(hand))
        logger.info(parts.describe_network(self.net, self.accelerator))
        if remark := parts.dropout_remark(cfg):
            logger.info(remark)
        self.damage.take_over(self.train_loader.health, self.state.extra.get("health"))
        name_indexed("training", self.train_loader.health)
        name_indexed("validation", self.val_loader.health)

    # ---- what the loop asks for -------------------------------------------------------------------------------------

    def micro_batches(self) -> Iterator[list[Batch]]:
        """The micro-batches of each step that is left, on the device."""
        batches = to_device(self.train_loader, self.accelerator.device)
        while self.state.step < self.cfg.GENERAL.total_step:
            yield list(islice(batches, self.cfg.TRAIN.grad_accum_step))

    def catch_up(self) -> None:
        """The validation before the first step, or one that a stop cut off."""
        if self.state.step == 0:
            self.validate()
        elif self.state.validation_due:
            self.save(is_best=self.validate())

    def step(self, micro_batches: list[Batch]) -> StepResult:
        """Take one optimizer step and move on.

        Raises NumbersError for too many steps in a row that were not finite, CheckpointError for one being written.
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
        alone = self.accelerator.num_processes == 1
        if self.watch.must_stop or (alone and self.signals.requested):
            raise StopRequested(self.signals.requested or "a signal to another process")

    def is_due(self, interval: int, at_end: bool = False) -> bool:
        """Whether the step just done ends an interval (or the run)."""
        return self.state.step % interval == 0 or (at_end and self.state.step == self.cfg.GENERAL.total_step)

    def log(self, result: StepResult) -> None:
        """The log line, the journal's row and with it AIM's points."""
        bad = self.damage.row(self.train_loader.health, self.train_loader.health.read)
        if self.is_main:
            metrics = result.metrics()
            logger.info(log_line(self.state.step, self.cfg.GENERAL.total_step, metrics))
            self.tracker.log(self.state.step, "train", metrics | bad)

    @torch.no_grad()
    def draw(self, batch: Batch) -> None:
        """An overlay of prediction and target on training patches, as the network sees them without dropout."""
        if not (self.is_main or self.cfg.TRAIN.shard_weights):
            return
        self.net.eval()
        with self.accelerator.autocast():
            prediction = self.net(batch)  # with sharded weights every process takes part
        self.net.train()
        if self.is_main:
            sheet = overlay_sheet(batch, prediction, self.net.hand.faces.cpu().numpy())
            self.tracker.image(self.state.step, "train", "overlay", sheet)

    def validate(self) -> bool:
        """Evaluate the fixed samples, log them, remember the validation; whether it is the best so far.

        Raises StopRequested, without a trace of this validation, when a process is asked to stop meanwhile.
        """
        health = self.val_loader.health
        before = Counter(health.read)
        result = self._evaluate(self.val_loader, "validation", mean_hand=self.mean_hand)
        self.state.extra["val_bad"] = bad = self.damage.row(health, health.read - before)
        if self.train_eval_loader is not None:
            seen = self._evaluate(self.train_eval_loader, "training sample", draw=False)
            self.tracker.log(self.state.step, "train_eval", seen.metrics)
            self.damage.share(self.train_eval_loader.health, Counter())
        self.tracker.log(self.state.step, "val", result.metrics | bad)
        if result.sheet is not None:
            self.tracker.image(self.state.step, "val", "overlay", result.sheet)
        value = key_metric(result.metrics)
        if self.is_main:
            logger.info(f"validation at step {self.state.step}: {describe(result.metrics)}")
        if self.state.step == 0:
            return False  # nothing is saved of it
        is_best = math.isfinite(value) and (self.state.best_metric is None or value < self.state.best_metric)
        if is_best:
            self.state.best_metric, self.state.best_step = value, self.state.step
        return is_best

    def _evaluate(self, loader: HandLoader, name: str, **how: Any) -> Validation:
        batches = track(self.progress, loader, len(loader), name)
        batches = self.watch.guard(batches, lambda: self.signals.requested)
        return evaluate(self.net, batches, self.accelerator, self.cfg.LOSS, **how)

    def save(self, is_best: bool, validation_due: bool = False) -> None:
        """Begin to write a checkpoint; training goes on meanwhile."""
        self.watch.flush()
        self.state.validation_due = validation_due
        self.state.extra["health"] = self.damage.state(self.train_loader.health)
        self.saved_at = self.state.step
        model, optimizer = self.net, self.trainer.optimizer
        if self.cfg.TRAIN.shard_weights:
            self.writer.join()  # its copy lies in host memory until then
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

    def save_now(self) -> None:
        """Write what the newest checkpoint does not hold yet, and wait for it: the run ends here."""
        if self.state.step != self.saved_at:
            self.save(is_best=False, validation_due=self.is_due(self.cfg.GENERAL.checkpoint_step, at_end=True))
        self.writer.join()
        self.accelerator.wait_for_everyone()

    def how_to_go_on(self) -> str:
        """What to tell a user whose run ended early."""
        if self.writer.saved_step is None:
            return "no checkpoint has been written yet"
        return (
            f"go on from the checkpoint at step {self.writer.saved_step} with the same command and "
            f"GENERAL.resume_path={self.folder}"
        )

    def finish(self) -> None:
        """Wait for the last checkpoint; show the closing table."""
        self.writer.join()
        self.accelerator.wait_for_everyone()
        self.progress.stop()
        if self.is_main:
            seconds = time.perf_counter() - self.started
            console.print(closing_table(self.folder, seconds, self.begun_at))
            closing = where_to_look(self.folder, self.cfg.AIM, self.tracker.run_name, self.tracker.is_behind)
            console.print(closing, soft_wrap=True)

    def close(self, patience: float = 60.0, in_order: bool = True) -> None:
        """Let the writer and the tracker finish, the latter for at most `patience` seconds, and the processes part.

        Not `in_order`: without the other processes, which may be gone.
        """
        try:
            self.writer.join()
        except CheckpointError as error:
            logger.error(str(error))
        self.tracker.close(patience)
        if in_order:
            part(self.accelerator)

    # ---- how the parts are made -------------------------------------------------------------------------------------

    def _start_from(self, checkpoint: Path | None, optimizer: torch.optim.Optimizer, config_name: str) -> TrainState:
        """Fill network, optimizer and scaler from a checkpoint, or the network from `MODEL.init_from`."""
        if checkpoint is not None:
            scaler = self.accelerator.scaler
            return load_checkpoint(checkpoint, model=self.net, optimizer=optimizer, scaler=scaler, verified=True)
        if self.cfg.MODEL.init_from is not None:
            logger.info(str(init_from(self.net, self.cfg.MODEL.init_from)))
        return TrainState(config_name=config_name)

    def _build_trainer(self, optimizer: torch.optim.Optimizer) -> Trainer:
        """Each process with the whole network (DDP), or with its part of it."""
        model = parts.training_form(self.net, self.cfg)
        if self.cfg.TRAIN.shard_weights:
            sharding.shard(self.net, optimizer, self.accelerator)
            return Trainer(self.cfg, self.accelerator, model, self.accelerator.prepare(optimizer))
        return Trainer(self.cfg, self.accelerator, *self.accelerator.prepare(model, optimizer))

    def _build_loaders(self, hand_model: str) -> tuple[HandLoader, HandLoader, HandLoader | None]:
        """Training from where the state stands, validation, and the training frames measured beside it.

        The main process indexes new shards first.
        """
        where = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        how = {"pin_memory": self.accelerator.device.type == "cuda"}
        with main_process_first(self.accelerator), task_bar(self.progress, "indexing shards") as advance:
            start = self.state.data_position
            train = build_train_loader(self.cfg, hand_model, start=start, progress=advance, **where, **how)
            val = build_val_loader(self.cfg, hand_model, progress=advance, **where, **how)
            sample = parts.training_sample(self.cfg)
            return train, val, None if sample is None else build_val_loader(sample, hand_model, **where, **how)

    def _claim_folder(self, config_name: str, newest: Path | None) -> Path:
        """The run folder, locked by the main process: that of its newest checkpoint, else a new one.

        Going on from an older checkpoint branches off into a new folder: what came after it stays as it is.
        """
        if newest is not None:
            folder = newest.parent.parent
        else:
            made = [str(make_run_folder(self.cfg, config_name)) if self.is_main else None]
            folder = Path(broadcast_object_list(made)[0])
        if self.is_main:
            self._lock = lock_run_folder(folder)
            if newest is not None:
                write_config(self.cfg, folder / f"config.resumed-{self.state.step}.yaml")
            add_log_file(folder / "log.txt")
            logger.info(f"run folder: {folder}")
        return folder

    def _open_tracker(self, goes_on: bool, run_name: str) -> Tracker:
        if not self.is_main:
            return Tracker.disabled()
        return Tracker.open(
            self.folder,
            run_name=run_name,
            config=asdict(self.cfg),
            server_url=self.cfg.AIM.server_url,
            repo=self.cfg.AIM.repo,
            experiment=self.cfg.AIM.experiment,
            description=self.cfg.GENERAL.description,
            resume=self.state.tracker if goes_on else None,
        )
