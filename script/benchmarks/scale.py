"""`script/bench.py scale`: how cost grows with the data set, workers, processes, patch size and backbone.

Each quantity is measured at several sizes; the exponent is the slope of a straight line fitted to the logarithms. The
results go to `<out>/scale.json` and are plotted to `<out>/scale.png`; `--redraw` repeats the plot without measuring.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from multiprocessing import SimpleQueue
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from script.benchmarks.measurement import Figure, Status, compose_config, seconds_of
from script.benchmarks.shards import bench_dataset, records, shards_of, worker_memory, write_big_indexes
from src.batch import Batch
from src.config import Config
from src.data.crop import empty_batch, pad_rows
from src.data.loader import build_train_loader
from src.data.shards.build_index import open_indexes
from src.data.shards.writer import write_shard
from src.distributed.processes import destroy_process_group
from src.hand.mano import ManoLayer
from src.hand.standin.build import build_standin_hand
from src.loss import NUM_TERM, loss_sums
from src.model.net import PoseNet

NUM_WINDOW = [10_000, 100_000, 1_000_000, 10_000_000, 20_000_000]
NUM_WORKER = [1, 2]
NUM_PROCESS = [1, 2, 4]
IMG_SIZE = [112, 168, 224, 336]
BACKBONE = ["tiny", "dinov2_small", "dinov2_base", "dinov2_large"]
NUM_REPEAT = 5
WINDOWS_PER_SHARD = 2_000
STEP_PER_BLOCK = 4
LEAST_SHARE = 1e-3  # of communication: reported if the difference of the two times is smaller or negative


@dataclass(frozen=True)
class Series:
    """One quantity at several sizes."""

    name: str
    of: str  # what grows
    size: list[float]
    value: list[float]
    unit: str
    note: str = ""

    @property
    def exponent(self) -> float:
        """b of value = a size^b, by least squares of the logarithms."""
        return float(np.polyfit(np.log(self.size), np.log(self.value), 1)[0])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--out", type=Path, help="folder for scale.json and scale.png")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="only draw scale.png next to this file")


def run(args: argparse.Namespace, status: Status) -> list[Figure]:
    """Measure and plot every series."""
    if args.redraw is not None:
        every = [Series(**row) for row in json.loads(args.redraw.read_text(encoding="utf-8"))]
        draw(every, args.redraw.with_suffix(".png"))
        return _figures(every)
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as folder:
        every = window_series(Path(folder), status) + worker_series(Path(folder), status)
    every += process_series(status) + network_series(status)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "scale.json").write_text(json.dumps([asdict(s) for s in every], indent=1) + "\n", encoding="utf-8")
        draw(every, args.out / "scale.png")
    return _figures(every)


def window_series(folder: Path, status: Status) -> list[Series]:
    """Start-up time, memory of a worker and time of a lookup against the number of windows."""
    write_shard(records(64, "jpg"), folder / "small" / "000000.tar")
    (shard,) = shards_of(folder / "small")
    start_up, memory, lookup = [], [], []
    for number in NUM_WINDOW:
        status(f"{number:,} windows")
        big = folder / str(number)
        write_big_indexes(big, shard, number, max(1, number // WINDOWS_PER_SHARD))
        start_up.append(seconds_of(lambda big=big: bench_dataset(open_indexes(shards_of(big))).__getitems__(range(32))))
        locate = bench_dataset(indexes := open_indexes(shards_of(big))).plan.locate
        places = np.random.default_rng(0).integers(0, number, 4000).tolist()
        lookup.append(1e6 * seconds_of(partial(list, map(locate, places))) / len(places))
        memory.append(worker_memory(indexes)[0])
    of, size = "windows", [float(number) for number in NUM_WINDOW]
    return [
        Series("start-up to the first batch", of, size, start_up, "s", f"{WINDOWS_PER_SHARD:,} windows a shard"),
        Series("memory of a worker", of, size, memory, "MB", "resident, shared pages included"),
        Series("place of a random position", of, size, lookup, "us", "worst case: training reads in order"),
    ]


def worker_series(folder: Path, status: Status) -> list[Series]:
    """Samples a second of worker processes, without training at the same time."""
    rates = []
    for worker in NUM_WORKER:
        status(f"{worker} data workers")
        root = folder / "small"
        sources = [f"DATA.{subset}.source=[{root}/*.tar]" for subset in ("train", "val")]
        cfg = compose_config("stage1-dino_large", *sources, f"GENERAL.num_worker={worker}")
        batches = iter(build_train_loader(cfg, "mano", start=0))
        next(batches)
        seconds = [seconds_of(lambda b=batches: list(islice(b, 8))) for _ in range(NUM_REPEAT)]
        rates.append(8 * cfg.TRAIN.sample_per_device / statistics.median(seconds))
        del batches
    note = f"{os.cpu_count()} cores; 640x480 jpeg to 224 px, all augmentation"
    return [Series("samples of the loader", "workers", [float(w) for w in NUM_WORKER], rates, "samples/s", note)]


def process_series(status: Status) -> list[Series]:
    """A step of N processes (gloo, one thread and batch 16 each) and the share of it that is communication."""
    cfg = compose_config("stage1-demo")
    step, share = [], []
    for number in NUM_PROCESS:
        status(f"{number} processes")
        apart, together = communication_seconds(cfg, number)
        step.append(1e3 * together)
        share.append(max(1.0 - apart / together, LEAST_SHARE))
    size = [float(number) for number in NUM_PROCESS]
    note = f"the demo's network, batch 16 each, {os.cpu_count()} cores"
    share_note = f"1 - step without all-reduce / with it; {LEAST_SHARE:g} if below the noise"
    return [
        Series("step of all processes", "processes", size, step, "ms", note),
        Series("share of communication", "processes", size[1:], share[1:], "", share_note),
    ]


def network_series(status: Status) -> list[Series]:
    """Forward and backward of the whole network against the number of tokens and of backbone parameters."""
    tokens, by_token, parameters, by_parameter = [], [], [], []
    for img_size in IMG_SIZE:
        status(f"{img_size} px")
        net = _network("dinov2_small", img_size)
        tokens.append(float(net.backbone.grid_size**2))
        by_token.append(1e3 * step_seconds(net))
    for name in BACKBONE:
        status(name)
        net = _network(name, 112)
        parameters.append(float(sum(p.numel() for p in net.backbone.parameters())))
        by_parameter.append(1e3 * step_seconds(net))
        del net
    return [
        Series("step by patch size", "image tokens", tokens, by_token, "ms", "DINOv2-small, batch 2"),
        Series("step by backbone", "backbone parameters", parameters, by_parameter, "ms", "112 px, batch 2"),
    ]


def _grey_batch(num: int, img_size: int) -> Batch:
    """[num] patches without a hand: they cost as much as photographs."""
    batch = empty_batch(num, img_size)
    pad_rows(batch, range(num))
    return batch.map(torch.from_numpy)


def _step(model: nn.Module, hand: ManoLayer, batch: Batch) -> None:
    """Forward, losses and backward; discards the gradients."""
    (loss_sums(model(batch), batch, hand).sum(0) @ torch.ones(NUM_TERM)).backward()
    model.zero_grad(set_to_none=True)


def step_seconds(net: PoseNet) -> float:
    """Median seconds of a step of two samples, after one warm-up step."""
    batch = _grey_batch(2, net.img_size)
    return statistics.median([seconds_of(lambda: _step(net, net.hand, batch)) for _ in range(NUM_REPEAT + 1)][1:])


def communication_seconds(cfg: Config, num_process: int) -> tuple[float, float]:
    """Median seconds of a step of `num_process` processes (gloo, a thread each) without and with the all-reduce."""
    result = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="bench-gloo-") as folder:
        args = (num_process, cfg, NUM_REPEAT, folder, result)
        multiprocessing.start_processes(_process, args, nprocs=num_process, start_method="spawn")
    return result.get()


def _process(rank: int, num_process: int, cfg: Config, repeat: int, folder: str, result: SimpleQueue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=num_process)
    seconds = _block_seconds(cfg, repeat)
    if rank == 0:
        result.put(seconds)
    destroy_process_group()


def _block_seconds(cfg: Config, repeat: int) -> tuple[float, float]:
    """Median seconds of a step without and with the all-reduce over `repeat` blocks, after one warm-up block."""
    net = PoseNet(cfg.MODEL, build_standin_hand()).train()
    model = DistributedDataParallel(net, broadcast_buffers=False, gradient_as_bucket_view=True)
    batch = _grey_batch(cfg.TRAIN.sample_per_device, cfg.MODEL.img_size)
    apart, together = [], []
    for _ in range(repeat + 1):
        for seconds, context in ((apart, model.no_sync), (together, nullcontext)):
            dist.barrier()
            start = time.perf_counter()
            with context():
                for _ in range(STEP_PER_BLOCK):
                    _step(model, net.hand, batch)
            dist.barrier()
            seconds.append((time.perf_counter() - start) / STEP_PER_BLOCK)
    return statistics.median(apart[1:]), statistics.median(together[1:])


def _network(backbone: str, img_size: int) -> PoseNet:
    overrides = [f"backbone={backbone}", "MODEL.backbone.random_init=true", f"MODEL.img_size={img_size}"]
    cfg = compose_config("stage1-dino_large", "data=demo", *overrides)
    return PoseNet(cfg.MODEL, build_standin_hand()).train()


def _figures(every: list[Series]) -> list[Figure]:
    """One row per size and one for the exponent of each series."""
    figures = []
    for series in every:
        for size, value in zip(series.size, series.value, strict=True):
            figures.append(Figure(f"{series.name}, {size:,.0f} {series.of}", value, series.unit))
        figures.append(Figure(f"{series.name}: exponent of {series.of}", series.exponent, "", note=series.note))
    return figures


def draw(every: Sequence[Series], path: Path) -> None:
    """One log-log panel per series, with its exponent, in one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, axes = plt.subplots(2, 4, figsize=(14.4, 6.0), layout="constrained")
    for axis, series in zip(axes.flat, every, strict=True):
        axis.loglog(series.size, series.value, "o-", color="tab:blue")
        axis.set_title(f"{series.name}\nexponent {series.exponent:.2f}", fontsize=10)
        axis.set_xlabel(series.of)
        axis.set_ylabel(series.unit or "share")
        labels = [EngFormatter(sep="")(float(f"{size:.3g}")) for size in series.size]  # 20000000 -> 20M
        axis.set_xticks(series.size, labels, rotation=30 if len(series.size) > 4 else 0)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.grid(True, alpha=0.25)
        low, high = min(series.value), max(series.value)
        if high < 10 * low:  # less than a decade would look steep and have no tick label
            axis.set_ylim(low / 5, high * 5)
    figure.savefig(path, dpi=110)
    plt.close(figure)
