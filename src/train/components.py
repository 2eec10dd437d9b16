"""The parts of a run, each made by one small function: demo data, what is said of hand and network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.progress import Progress
from torch import nn

from src.config import Config
from src.data.demo.make import make_demo_shards
from src.hand.skeleton import HandArrays
from src.model.net import PoseNet
from src.utils.console import logger, task_bar


def training_form(net: PoseNet, cfg: Config) -> nn.Module:
    """The network as a training step calls it; validation calls `net` itself, which shares its weights."""
    if cfg.TRAIN.activation_checkpointing:
        net.backbone.checkpoint_activations()
    return torch.compile(net, fullgraph=True) if cfg.TRAIN.compile else net


def describe_hand(hand: HandArrays) -> str:
    """One line on which hand the run uses."""
    kind = "the hand that ships, not MANO" if hand.name == "standin" else "MANO"
    return f"hand model: {hand.name} ({kind}), {len(hand.v_template)} vertices, {len(hand.faces)} faces"


def make_demo_data(cfg: Config, progress: Progress, subsets: Sequence[str] | None = None) -> None:
    """Render the demo's shards (of these subsets; None: all) where the configuration asks for them and they are not
    there yet."""
    demo = cfg.DATA.demo
    if demo is None:
        return
    num_sample = {"train": demo.train_sample, "val": demo.val_sample}
    with task_bar(progress, "rendering demo hands") as advance:
        told = 0

        def tell(done: int, total: int) -> None:
            nonlocal told
            if done == 0:
                logger.info(f"rendering {total} demo hands into {cfg.DATA.root}; this happens once")
            elif progress.disable and done * 4 // total > told:  # there is no bar to watch
                told = done * 4 // total
                logger.info(f"rendered {done} of {total}")
            advance(done, total)

        make_demo_shards(
            Path(cfg.DATA.root),
            num_sample,
            seed=demo.seed,
            img_size=demo.img_size,
            free_rotation=demo.free_rotation,
            progress=tell,
            subsets=subsets,
        )


def training_sample(cfg: Config) -> Config | None:
    """Under this configuration a validation loader gives the fixed `DATA.train.eval_sample` training frames.

    They are cut like validation frames, without augmentation: what the network makes of them tells, beside the
    validation, how much it has learnt by heart. One worker is enough for so few. None where no frame is asked for.
    """
    train = cfg.DATA.train
    if train.eval_sample == 0:
        return None
    data = replace(cfg.DATA, val=replace(cfg.DATA.val, source=train.source, max_sample=train.eval_sample))
    return replace(cfg, DATA=data, GENERAL=replace(cfg.GENERAL, num_worker=min(1, cfg.GENERAL.num_worker)))


def dropout_remark(cfg: Config) -> str | None:
    """A word where the dropout gate never opens: a short trial run may not mean that."""
    general = cfg.GENERAL
    if cfg.MODEL.handec.dropout == 0 or general.dropout_warmup_step < general.total_step:
        return None
    return (
        f"dropout stays 0 in this run: GENERAL.dropout_warmup_step={general.dropout_warmup_step} is not reached in "
        f"GENERAL.total_step={general.total_step}"
    )


def describe_network(net: PoseNet, accelerator: Accelerator) -> str:
    """One line on what is trained, where and how."""

    def millions(module: nn.Module) -> str:
        return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"

    return (
        f"network: backbone {millions(net.backbone)}, decoder {millions(net.decoder)} parameters; "
        f"{accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}"
    )
