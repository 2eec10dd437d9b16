"""`script/bench.py checkpoint`: how long a checkpoint stalls training, and how long it takes to write.

Networks of the demo's and of DINOv2-base's size with AdamW's moments and random weights write to a temporary folder.
Checkpoints come in pairs. During the first, training continues with the cheapest possible step, one sample forward and
backward; the stall is the call that begins the checkpoint plus what the optimizer's step still waits for afterwards.
The second has the machine to itself: time until the copy is complete (an optimizer that steps at once waits that long)
and until the files are written.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from script.benchmarks.measurement import Figure, Status, compose_config, median_figure
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


def run(args: argparse.Namespace, status: Status) -> list[Figure]:
    """Measure every size."""
    figures = []
    for name, (config, overrides) in SIZES.items():
        status(f"{name}: building the network")
        figures += measure(name, compose_config(config, *overrides), args.repeat, status)
    return figures


def measure(name: str, cfg: Config, repeat: int, status: Status) -> list[Figure]:
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
            status(f"{name}: checkpoints {number + 1} of {repeat}")
            begin = host_seconds(lambda: writer.save(Path(folder), **what))
            step(net, net.hand, batch)
            stood.append(begin + host_seconds(writer.settle))
            writer.join()
            begin = host_seconds(lambda: writer.save(Path(folder), **what))
            copied.append(begin + host_seconds(writer.settle))
            wrote.append(copied[-1] + host_seconds(writer.join))
        files = (Path(folder) / "checkpoints" / "checkpoint-1").iterdir()
        size = sum(file.stat().st_size for file in files) / 2**20
    share = [100 * a / b for a, b in zip(stood, wrote, strict=True)]
    return [
        median_figure(f"{name}: standstill", [1000 * s for s in stood], "ms"),
        median_figure(f"{name}: copy complete", [1000 * s for s in copied], "ms"),
        median_figure(f"{name}: write", [1000 * s for s in wrote], "ms"),
        median_figure(f"{name}: standstill / write", share, "%", f"{size:,.0f} MiB", at_most=MOST_STANDSTILL),
    ]


def host_seconds(call: Callable[[], object]) -> float:
    """How long a call blocks this thread; work that the GPU still has to do does not count."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
