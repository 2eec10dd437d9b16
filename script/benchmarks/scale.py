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
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from script.benchmarks.measurement import Figure, Status, compose_config, seconds_of
from script.benchmarks.scale_network import communication_seconds, step_seconds
from script.benchmarks.scale_plot import Series, draw
from script.benchmarks.shards import bench_dataset, records, shards_of, worker_memory, write_big_indexes
from src.data.loader import build_train_loader
from src.data.shards.build_index import open_indexes
from src.data.shards.writer import write_shard
from src.hand.standin.build import build_standin_hand
from src.model.net import PoseNet

WINDOWS_PER_SHARD = 2_000
LEAST_SHARE = 1e-3  # of communication: reported if the difference of the two times is smaller or negative


@dataclass(frozen=True)
class Sizes:
    """The sizes that are measured."""

    window: list[int]
    worker: list[int]
    process: list[int]
    img_size: list[int]
    backbone: list[str]
    repeat: int


FULL = Sizes(
    window=[10_000, 100_000, 1_000_000, 10_000_000, 20_000_000],
    worker=[1, 2],
    process=[1, 2, 4],
    img_size=[112, 168, 224, 336],
    backbone=["tiny", "dinov2_small", "dinov2_base", "dinov2_large"],
    repeat=5,
)
QUICK = Sizes([10_000, 40_000], [1, 2], [1, 2, 3], [56, 112], ["tiny", "dinov2_small"], 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute")
    parser.add_argument("--out", type=Path, default=None, help="folder for scale.json and scale.png")
    parser.add_argument(
        "--redraw", type=Path, default=None, metavar="JSON", help="only draw scale.png next to this file"
    )


def run(args: argparse.Namespace, status: Status) -> list[Figure]:
    """Measure and plot every series."""
    if args.redraw is not None:
        every = [Series(**row) for row in json.loads(args.redraw.read_text(encoding="utf-8"))]
        draw(every, args.redraw.with_suffix(".png"))
        return _figures(every)
    sizes = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory(prefix="bench-scale-") as folder:
        every = window_series(Path(folder), sizes.window, status)
        every += worker_series(Path(folder), sizes, status)
        every += process_series(sizes, status)
        every += network_series(sizes, status)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "scale.json").write_text(json.dumps([asdict(s) for s in every], indent=1) + "\n", encoding="utf-8")
        draw(every, args.out / "scale.png")
    return _figures(every)


def window_series(folder: Path, num_window: list[int], status: Status) -> list[Series]:
    """Start-up time, memory of a worker and time of a lookup against the number of windows."""
    write_shard(records(64, "jpg", 0), folder / "small" / "000000.tar")
    (shard,) = shards_of(folder / "small")
    start_up, memory, lookup = [], [], []
    for number in num_window:
        status(f"{number:,} windows")
        write_big_indexes(folder / str(number), shard, number, max(1, number // WINDOWS_PER_SHARD))
        start = time.perf_counter()
        dataset = bench_dataset(indexes := open_indexes(shards_of(folder / str(number))))
        dataset.__getitems__(range(32))
        start_up.append(time.perf_counter() - start)
        places = np.random.default_rng(0).integers(0, number, 4000).tolist()
        start = time.perf_counter()
        for place in places:
            dataset.plan.locate(place)
        lookup.append(1e6 * (time.perf_counter() - start) / len(places))
        memory.append(worker_memory(indexes)[0])
    of, size = "windows", [float(number) for number in num_window]
    return [
        Series("start-up to the first batch", of, size, start_up, "s", f"{WINDOWS_PER_SHARD:,} windows a shard"),
        Series("memory of a worker", of, size, memory, "MB", "resident, shared pages included"),
        Series("place of a random position", of, size, lookup, "us", "worst case: training reads in order"),
    ]


def worker_series(folder: Path, sizes: Sizes, status: Status) -> list[Series]:
    """Samples a second of worker processes, without training at the same time."""
    rates = []
    for worker in sizes.worker:
        status(f"{worker} data workers")
        root = folder / "small"
        sources = [f"DATA.{subset}.source=[{root}/*.tar]" for subset in ("train", "val")]
        cfg = compose_config("stage1-dino_large", *sources, f"GENERAL.num_worker={worker}")
        batches = iter(build_train_loader(cfg, "mano", start=0))
        next(batches)
        seconds = [seconds_of(lambda b=batches: list(islice(b, 8))) for _ in range(sizes.repeat)]
        rates.append(8 * cfg.TRAIN.sample_per_device / statistics.median(seconds))
        del batches
    note = f"{os.cpu_count()} cores; 640x480 jpeg to 224 px, all augmentation"
    return [Series("samples of the loader", "workers", [float(w) for w in sizes.worker], rates, "samples/s", note)]


def process_series(sizes: Sizes, status: Status) -> list[Series]:
    """A step of N processes (gloo, one thread and batch 16 each) and the share of it that is communication."""
    cfg = compose_config("stage1-demo")
    step, share = [], []
    for number in sizes.process:
        status(f"{number} processes")
        apart, together = communication_seconds(cfg, number, sizes.repeat)
        step.append(1e3 * together)
        share.append(max(1.0 - apart / together, LEAST_SHARE))
    size = [float(number) for number in sizes.process]
    note = f"the demo's network, batch 16 each, {os.cpu_count()} cores"
    share_note = f"1 - step without all-reduce / with it; {LEAST_SHARE:g} if below the noise"
    return [
        Series("step of all processes", "processes", size, step, "ms", note),
        Series("share of communication", "processes", size[1:], share[1:], "", share_note),
    ]


def network_series(sizes: Sizes, status: Status) -> list[Series]:
    """Forward and backward of the whole network against the number of tokens and of backbone parameters."""
    tokens, by_token, parameters, by_parameter = [], [], [], []
    for img_size in sizes.img_size:
        status(f"{img_size} px")
        net = _network("dinov2_small", img_size)
        tokens.append(float(net.backbone.grid_size**2))
        by_token.append(1e3 * step_seconds(net, 2, sizes.repeat))
    for name in sizes.backbone:
        status(name)
        net = _network(name, 112)
        parameters.append(float(sum(p.numel() for p in net.backbone.parameters())))
        by_parameter.append(1e3 * step_seconds(net, 2, sizes.repeat))
        del net
    return [
        Series("step by patch size", "image tokens", tokens, by_token, "ms", "DINOv2-small, batch 2"),
        Series("step by backbone", "backbone parameters", parameters, by_parameter, "ms", "112 px, batch 2"),
    ]


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
