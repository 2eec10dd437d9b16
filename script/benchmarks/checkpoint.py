"""`script/bench.py checkpoint`: how long training stands still for a checkpoint, and how long writing one takes.

Networks of the demo's and of DINOv2-base's size with AdamW's moments, random weights, written to a temporary folder.
Checkpoints in pairs. In one, training goes on with the least that a step computes, one sample forward and backward;
standstill is the call that begins the checkpoint and what the optimizer's step then still waits for. The other has the
machine to itself: when its copy is complete (an optimizer that stepped at once would wait that long), and when it is
written.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from script.benchmarks.measurement import Figure, compose_config
from script.benchmarks.scale_network import grey_batch, step
from src.checkpoint.save import TrainState
from src.checkpoint.writer import CheckpointWriter
from src.config import Config
from src.hand.standin.build import build_standin_hand
from src.model.net import PoseNet
from src.train.optimizer import build_optimizer

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
        figures += measure(name, compose_config(config, *overrides), args.repeat, say)
    return figures


def measure(name: str, cfg: Config, repeat: int, say: Callable[[str], None]) -> list[Figure]:
    """Write `repeat` pairs of checkpoints of this configuration's network; each ratio is of one pair."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = PoseNet(cfg.MODEL, build_standin_hand()).to(device)
    optimizer = build_optimizer(net, cfg)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    writer, stood, copied, wrote = CheckpointWriter(), [], [], []
    writer.reserve(net, optimizer)
    writer.join()
    batch = grey_batch(1, net.img_size).to(device)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-") as folder:
        what = {"model": net, "optimizer": optimizer, "scaler": None, "state": TrainState(step=1), "keep": 1}
        for number in range(repeat):
            say(f"{name}: checkpoints {number + 1} of {repeat}")
            begin = seconds(lambda: writer.save(Path(folder), **what))
            step(net, net.hand, batch)
            stood.append(begin + seconds(writer.settle))
            writer.join()
            begin = seconds(lambda: writer.save(Path(folder), **what))
            copied.append(begin + seconds(writer.settle))
            wrote.append(copied[-1] + seconds(writer.join))
        files = (Path(folder) / "checkpoints" / "checkpoint-1").iterdir()
        size = sum(file.stat().st_size for file in files) / 2**20
    share = [100 * a / b for a, b in zip(stood, wrote, strict=True)]
    spread = f"{min(share):.2g} to {max(share):.2g} over {repeat}, {size:,.0f} MiB"
    return [
        Figure(f"{name}: standstill", 1000 * statistics.median(stood), "ms"),
        Figure(f"{name}: copy complete", 1000 * statistics.median(copied), "ms"),
        Figure(f"{name}: write", 1000 * statistics.median(wrote), "ms"),
        Figure(f"{name}: standstill / write", statistics.median(share), "%", at_most=MOST_STANDSTILL, note=spread),
    ]


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes, by the clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
