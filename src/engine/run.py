"""One training run: its parts, its folder, and what happens at intervals. The script drives it, step.py computes.

Every process holds a Run; the main one writes. Shapes are those of src/batch.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from accelerate.utils import gather_object
from rich.progress import Progress

from src.batch import Batch
from src.config import Config
from src.data.health import merge_states
from src.data.loader import HandLoader, build_train_loader, build_val_loader
from src.data.mean_hand import mean_hand
from src.engine import parts
from src.engine.checkpoint import TrainState, is_newest, load_checkpoint, save_checkpoint
from src.engine.console import add_log_file, console, logger, task_bar, track
from src.engine.evaluate import evaluate, key_metric
from src.engine.report import closing_table, where_to_look
from src.engine.run_folder import lock_run_folder
from src.engine.step import StepResult, Trainer, build_optimizer, log_line
from src.engine.tracker import Tracker
from src.engine.weights import load_weights
from src.hand.load import load_hand
from src.loss import LOSS_TERMS
from src.model.net import PoseNet
from src.utils.checkpoint_read import find_checkpoint
from src.utils.vis import overlay_sheet


class Run:
    """Builds the parts, or takes them over from the checkpoint that `GENERAL.resume_path` names."""

    def __init__(self, cfg: Config, config_name: str, progress: Progress) -> None:
        self.cfg, self.progress = cfg, progress
        self.accelerator = parts.build_accelerator(cfg)
        self.is_main = self.accelerator.is_main_process
        checkpoint = find_checkpoint(cfg.GENERAL.resume_path) if cfg.GENERAL.resume_path else None
        with self.accelerator.main_process_first():
            parts.make_demo_data(cfg, progress)

        torch.manual_seed(cfg.GENERAL.seed)
        hand = load_hand(cfg.MODEL.hand_model)
        self.net = PoseNet(cfg.MODEL, hand).to(self.accelerator.device)
        optimizer = build_optimizer(self.net, cfg)
        self.state = TrainState(config_name=config_name)
        if checkpoint is not None:
            logger.info(f"going on from {checkpoint}")
            scaler = self.accelerator.scaler
            self.state = load_checkpoint(checkpoint, model=self.net, optimizer=optimizer, scaler=scaler)
            self.state.extra["saved_step"] = self.state.step
        elif cfg.MODEL.init_from is not None:
            logger.info(str(load_weights(self.net, find_checkpoint(cfg.MODEL.init_from))))
        if self.state.step >= cfg.GENERAL.total_step:
            raise ValueError(
                f"GENERAL.total_step={cfg.GENERAL.total_step}: {checkpoint} is at step {self.state.step} already, "
                f"nothing is left to do; ask for more steps"
            )
        self.trainer = Trainer(cfg, self.accelerator, *self.accelerator.prepare(self.net, optimizer))

        self.train_loader, self.val_loader = self._build_loaders(hand.name)
        self.mean_hand = mean_hand(self.train_loader.dataset)
        goes_on = checkpoint is not None and is_newest(checkpoint)
        self.folder = self._claim_folder(config_name, checkpoint if goes_on else None)
        self.tracker = self._open_tracker(goes_on)
        self.started = time.perf_counter()
        self.task = progress.add_task("training", total=cfg.GENERAL.total_step, completed=self.state.step)
        logger.info(parts.describe_hand(hand))
        logger.info(parts.describe_network(self.net, self.accelerator))
        self._report_damage()

    # ---- what the loop asks for -------------------------------------------------------------------------------------

    def micro_batches(self) -> Iterator[list[Batch]]:
        """The micro-batches of each step that is left, on the device."""
        batches = iter(self.train_loader)
        while self.state.step < self.cfg.GENERAL.total_step:
            share = islice(batches, self.cfg.TRAIN.grad_accum_step)
            yield [batch.to(self.accelerator.device, non_blocking=True) for batch in share]

    def step(self, micro_batches: list[Batch]) -> StepResult:
        """Take one optimizer step and move on."""
        result = self.trainer.train_step(self.state.step, micro_batches)
        self.state.step += 1
        self.state.data_position += self.accelerator.num_processes * sum(len(batch) for batch in micro_batches)
        self.progress.update(self.task, completed=self.state.step)
        return result

    def is_due(self, interval: int, at_end: bool = False) -> bool:
        """Whether the step just done ends an interval (or the run)."""
        return self.state.step % interval == 0 or (at_end and self.state.step == self.cfg.GENERAL.total_step)

    def log(self, result: StepResult) -> None:
        """The log line, the journal's row and with it AIM's points."""
        if self.is_main:
            metrics = result.metrics()
            logger.info(log_line(self.state.step, self.cfg.GENERAL.total_step, metrics))
            bad = {f"bad_{reason}": count for reason, count in self.train_loader.health.counts().items()}
            self.tracker.log(self.state.step, "train", metrics | bad)
            if not math.isfinite(metrics["loss_total"]):
                wrong = [name for name in LOSS_TERMS if not math.isfinite(metrics[name])]
                raise FloatingPointError(f"the loss is not finite ({', '.join(wrong)}); try a lower TRAIN.lr")

    @torch.no_grad()
    def draw(self, batch: Batch) -> None:
        """An overlay of prediction and target on training patches, as the network sees them without dropout."""
        if self.is_main:
            self.net.eval()
            with self.accelerator.autocast():
                prediction = self.net(batch)
            self.net.train()
            self.tracker.image(self.state.step, "train", "overlay", overlay_sheet(batch, prediction))

    def validate(self) -> bool:
        """Evaluate the fixed sample, log it, remember it; whether it is the best so far."""
        batches = track(self.progress, self.val_loader, len(self.val_loader), "validation")
        result = evaluate(self.net, batches, self.accelerator, self.cfg.LOSS, self.mean_hand)
        self.tracker.log(self.state.step, "val", result.metrics)
        if result.sheet is not None:
            self.tracker.image(self.state.step, "val", "overlay", result.sheet)
        value = key_metric(result.metrics)
        if self.is_main:
            in_mm = {k: v for k, v in result.metrics.items() if not k.startswith("loss")}
            shown = " ".join(f"{k}={v:.2f}" for k, v in (in_mm or result.metrics).items())
            logger.info(f"validation at step {self.state.step}: {shown}")
        if self.state.step == 0:
            return False  # nothing is saved of it
        is_best = self.state.best_metric is None or value < self.state.best_metric
        if is_best:
            self.state.best_metric, self.state.best_step = value, self.state.step
        return is_best

    def save(self, is_best: bool) -> None:
        """Write a checkpoint; the other processes wait until it is whole."""
        self.state.extra["health"] = merge_states(gather_object([self.train_loader.health.state_dict()]))
        if self.is_main:
            self.state.tracker = self.tracker.state()
            save_checkpoint(
                self.folder,
                model=self.net,
                optimizer=self.trainer.optimizer,
                scaler=self.accelerator.scaler,
                state=self.state,
                texts=parts.network_texts(self.cfg, self.net),
                keep=self.cfg.GENERAL.keep_checkpoint,
                is_best=is_best,
            )
        self.state.extra["saved_step"] = self.state.step
        self.accelerator.wait_for_everyone()

    def how_to_go_on(self) -> str:
        """What to tell a user whose run ended early."""
        saved = self.state.extra.get("saved_step")
        if saved is None:
            return "no checkpoint has been written yet"
        return f"go on from the checkpoint at step {saved} with GENERAL.resume_path={self.folder}"

    def report(self) -> None:
        """The closing table."""
        if self.is_main:
            seconds = time.perf_counter() - self.started
            console.print(closing_table(self.folder, seconds))
            console.print(where_to_look(self.folder, self.cfg.AIM), soft_wrap=True)

    def close(self) -> None:
        """Let the tracker finish and the processes part."""
        self.tracker.close()
        self.accelerator.end_training()

    # ---- how the parts are made -------------------------------------------------------------------------------------

    def _build_loaders(self, hand_model: str) -> tuple[HandLoader, HandLoader]:
        """Training from where the state stands, and validation. The main process indexes new shards first."""
        where = {"rank": self.accelerator.process_index, "world_size": self.accelerator.num_processes}
        how = {"pin_memory": self.accelerator.device.type == "cuda"}
        with self.accelerator.main_process_first(), task_bar(self.progress, "indexing shards") as advance:
            start = self.state.data_position
            train = build_train_loader(self.cfg, hand_model, start=start, progress=advance, **where, **how)
            return train, build_val_loader(self.cfg, hand_model, progress=advance, **where, **how)

    def _claim_folder(self, config_name: str, newest: Path | None) -> Path:
        """The run folder, locked by the main process: that of its newest checkpoint, else a new one.

        Going on from an older checkpoint branches off into a new folder: what came after it stays as it is.
        """
        if newest is not None:
            folder = newest.parent.parent
        else:
            folder = parts.make_run_folder(self.cfg, config_name, self.accelerator)
        if self.is_main:
            self._lock = lock_run_folder(folder)
            if newest is not None:
                parts.write_config(self.cfg, folder / f"config.resumed-{self.state.step}.yaml")
            add_log_file(folder / "log.txt")
            logger.info(f"run folder: {folder}")
        return folder

    def _report_damage(self) -> None:
        """Go on with the counts of damaged frames (the main process holds the sum); name what the indexes found."""
        if self.is_main and "health" in self.state.extra:
            self.train_loader.health.load_state_dict(self.state.extra["health"])
        for name, loader in (("training", self.train_loader), ("validation", self.val_loader)):
            if loader.health.counts():
                logger.warning(f"{name} data: {loader.health.summary()}\n{loader.health.table()}")

    def _open_tracker(self, goes_on: bool) -> Tracker:
        if not self.is_main:
            return Tracker.disabled()
        return Tracker.open(
            self.folder,
            run_name=self.folder.name,
            config=asdict(self.cfg),
            server_url=self.cfg.AIM.server_url,
            repo=self.cfg.AIM.repo,
            experiment=self.cfg.AIM.experiment,
            description=self.cfg.GENERAL.description,
            resume=self.state.tracker if goes_on else None,
        )
