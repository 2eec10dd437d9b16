"""`script/bench.py gpu`: all rows that need a GPU, in one command of at most eight minutes.

DINOv2-large at 224 px in bf16: the training step at several batch sizes, eager and compiled, with data from shards.
After each case its rows are added to `<out>/figures.json`, so an interrupted run keeps them; a profile of the loop goes
to `<out>/profile.txt`. Cases that time or memory does not allow are listed as skipped. `--cpu` runs a tiny network
without a GPU, to try the command; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from script.benchmarks.measurement import Figure, Status, seconds_of, write_figures
from script.benchmarks.step import StepBench, open_bench

LEAST = {"FLOP utilisation of the bare step": 0.55, "the loop's samples": 1500.0}
NUM_PROFILED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--out", type=Path, default=Path("bench-gpu"), help="folder for figures.json and profile.txt")
    parser.add_argument("--minutes", type=float, default=7.5, help="start no further case after this time")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="a tiny network without a GPU, to try the command")


def cases(on_cpu: bool) -> dict[str, list[str]]:
    """Name of each case -> its overrides. Eager cases take some 15 s and come first; compiling takes a minute."""
    if on_cpu:
        tiny = ["backbone=tiny", "MODEL.img_size=56", "MODEL.handec.dim=64", "MODEL.handec.num_layer=1"]
        return {"batch 2": [*tiny, "TRAIN.sample_per_device=2", "GENERAL.num_worker=0"]}
    large = ["backbone=dinov2_large", f"GENERAL.num_worker={max(1, (os.cpu_count() or 2) - 2)}"]
    eager = {f"batch {size}": [*large, f"TRAIN.sample_per_device={size}"] for size in (128, 64, 256)}
    return eager | {f"{name}, compiled": [*eager[name], "TRAIN.compile=true"] for name in ("batch 128", "batch 256")}


def run(args: argparse.Namespace, status: Status) -> list[Figure]:
    """Measure the cases one after the other until the time is up."""
    if not (args.cpu or torch.cuda.is_available()):
        raise SystemExit("bench gpu: torch sees no GPU here; `--cpu` tries the command with a tiny network")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "profile.txt").unlink(missing_ok=True)
    figures: list[Figure] = []
    deadline = time.monotonic() + 60 * args.minutes
    for name, overrides in cases(args.cpu).items():
        if time.monotonic() > deadline:
            figures.append(Figure(f"{name}: skipped", 0.0, "", note="no time left"))
        else:
            try:
                figures += measure_case(name, overrides, args, status)
            except torch.cuda.OutOfMemoryError:
                figures.append(Figure(f"{name}: skipped", 0.0, "", note="out of GPU memory"))
        write_figures(args.out / "figures.json", "gpu", figures)
    return figures


def measure_case(name: str, overrides: list[str], args: argparse.Namespace, status: Status) -> list[Figure]:
    """The rows of one case; the first one that fits in memory also writes the profile."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with open_bench(10, overrides) as bench:
        rows = bench.measure(args.repeat, 10, lambda text: status(f"{name}: {text}"))
        if not (file := args.out / "profile.txt").exists():
            file.write_text(profile_loop(bench), encoding="utf-8")
    least = {} if args.cpu else LEAST
    return [replace(row, name=f"{name}: {row.name}", at_least=least.get(row.name, row.at_least)) for row in rows]


def profile_loop(bench: StepBench) -> str:
    """The loop's operators sorted by time on the device, and the total time that the device was busy."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        seconds = seconds_of(lambda: bench.loop_block(NUM_PROFILED))
    averages = profiler.key_averages()
    busy = busy_seconds(averages, on_gpu)
    table = averages.table(sort_by="self_device_time_total" if on_gpu else "self_cpu_time_total", row_limit=25)
    return f"{NUM_PROFILED} steps of the loop in {seconds:.3f} s; operators busy for {busy:.3f} s\n{table}\n"


def busy_seconds(averages: Iterable[FunctionEventAvg], on_gpu: bool) -> float:
    """How long kernels ran on the device. The profiler attributes the same time to the operators that launched them and
    to annotations around them; these are not counted again."""
    if not on_gpu:
        return sum(event.self_cpu_time_total for event in averages) / 1e6
    kernels = [e for e in averages if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return sum(kernel.self_device_time_total for kernel in kernels) / 1e6
