"""`script/bench.py checkpoint`: how long training stands still for a checkpoint, and how long writing one takes.

Networks of the demo's and of DINOv2-base's size with AdamW's moments, random weights, written to a temporary folder.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from src.config import Config
from src.engine.bench.figure import Figure
from src.engine.checkpoint import TrainState
from src.engine.checkpoint_writer import CheckpointWriter
from src.engine.step import build_optimizer
from src.hand.standin import build_standin_hand
from src.model.net import PoseNet

MOST_STANDSTILL = 5.0  # % of the write's duration
SIZES = {
    "demo": ("stage1-demo", []),
    "DINOv2-base": (
        "stage1-dino_large",
        ["backbone=dinov2_base", "data=demo", "MODEL.backbone.random_init=true", "MODEL.hand_model=standin"],
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--repeat", type=int, default=5, help="checkpoints of each size (default 5)")


def run(args: argparse.Namespace, say: Callable[[str], None]) -> list[Figure]:
    """Measure every size; `say` is told what is going on."""
    figures = []
    for name, (config, overrides) in SIZES.items():
        say(f"{name}: building the network")
        figures += measure(name, args.compose(config, overrides), args.repeat, say)
    return figures


def measure(name: str, cfg: Config, repeat: int, say: Callable[[str], None]) -> list[Figure]:
    """Write `repeat` checkpoints of this configuration's network; each ratio is of one checkpoint."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = PoseNet(cfg.MODEL, build_standin_hand()).to(device)
    optimizer = build_optimizer(net, cfg)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    writer, stood, wrote = CheckpointWriter(), [], []
    writer.reserve(net, optimizer)
    writer.join()
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as folder:
        for number in range(repeat):
            say(f"{name}: checkpoint {number + 1} of {repeat}")
            start = time.perf_counter()
            state = TrainState(step=number + 1)
            writer.save(Path(folder), model=net, optimizer=optimizer, scaler=None, state=state, keep=1)
            stood.append(time.perf_counter() - start)
            writer.join()
            wrote.append(time.perf_counter() - start)
        files = (Path(folder) / "checkpoints" / f"checkpoint-{repeat}").iterdir()
        size = sum(file.stat().st_size for file in files) / 2**20
    share = [100 * a / b for a, b in zip(stood, wrote, strict=True)]
    spread = f"{min(share):.2g} to {max(share):.2g} over {repeat}, {size:,.0f} MiB"
    return [
        Figure(f"{name}: standstill", 1000 * statistics.median(stood), "ms"),
        Figure(f"{name}: write", 1000 * statistics.median(wrote), "ms"),
        Figure(f"{name}: standstill / write", statistics.median(share), "%", at_most=MOST_STANDSTILL, note=spread),
    ]
