"""`script/bench.py checkpoint`: how long training waits for a checkpoint, and how long writing one takes.

Networks of the demo's and of DINOv2-base's size with AdamW's moments, random weights, written to a temporary folder.
Training waits for the copy to host memory, the call that begins a checkpoint; the files are then written in a thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

from script.benchmarks.measurement import Figure, Status, compose_config, seconds_of
from src.checkpoint.save import TrainState
from src.checkpoint.writer import CheckpointWriter
from src.config import Config
from src.hand.standin.build import build_standin_hand
from src.model.net import PoseNet
from src.train.optimizer import build_optimizer

SIZES = {
    "demo": ["stage1-demo"],
    "DINOv2-base": ["stage1-dino_large", "backbone=dinov2_base", "data=demo", "MODEL.backbone.random_init=true"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--repeat", type=int, default=5, help="checkpoints of each size (default 5)")


def run(args: argparse.Namespace, status: Status) -> list[Figure]:
    """Measure every size."""
    figures = []
    for name, config in SIZES.items():
        status(f"{name}: building the network")
        figures += measure(name, compose_config(*config), args.repeat, status)
    return figures


def measure(name: str, cfg: Config, repeat: int, status: Status) -> list[Figure]:
    """Write `repeat` checkpoints of this configuration's network."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = PoseNet(cfg.MODEL, build_standin_hand()).to(device)
    optimizer = build_optimizer(net, cfg)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    writer, waited, wrote = CheckpointWriter(), [], []
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as folder:
        what = {"model": net, "optimizer": optimizer, "scaler": None, "state": TrainState(step=1), "keep": 1}
        save = partial(writer.save, Path(folder), **what)
        first = seconds_of(save)  # allocates the host memory
        writer.join()
        for number in range(repeat):
            status(f"{name}: checkpoint {number + 1} of {repeat}")
            waited.append(seconds_of(save))
            wrote.append(waited[-1] + seconds_of(writer.join))
        files = (Path(folder) / "checkpoints" / "checkpoint-1").iterdir()
        size = sum(file.stat().st_size for file in files) / 2**20
    share = [100 * a / b for a, b in zip(waited, wrote, strict=True)]
    spread = f"{min(share):.2g} to {max(share):.2g} over {repeat}, {size:,.0f} MiB"
    return [
        Figure(f"{name}: wait", 1000 * statistics.median(waited), "ms"),
        Figure(f"{name}: wait for the first one", 1000 * first, "ms"),
        Figure(f"{name}: write", 1000 * statistics.median(wrote), "ms"),
        Figure(f"{name}: wait / write", statistics.median(share), "%", note=spread),
    ]
