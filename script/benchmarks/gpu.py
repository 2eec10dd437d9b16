"""`script/bench.py gpu`: the rows that need a GPU, in one command of at most eight minutes.

DINOv2-large at 224 px in bf16: the step at several batch sizes, eager and compiled, with data from shards, and a
profile of the loop (`<out>/profile.txt`). What no time is left for is named. `--cpu` goes through the same motions with
a tiny network where there is no GPU, to try the command; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from script.benchmarks.measurement import Figure
from script.benchmarks.step import StepBench, open_bench

LEAST = {"FLOP utilisation of the bare step": 0.55, "the loop's samples": 1500.0}
NUM_PROFILED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--out", type=Path, default=Path("bench-gpu"), help="folder for profile.txt")
    parser.add_argument("--minutes", type=float, default=7.5, help="start no further row after this time")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="a tiny network without a GPU, to try the command")


def cases(on_cpu: bool) -> dict[str, list[str]]:
    """Name of each row -> its overrides, the most wanted first."""
    if on_cpu:
        tiny = ["backbone=tiny", "MODEL.img_size=56", "MODEL.handec.dim=64", "MODEL.handec.num_layer=1"]
        return {"batch 2": [*tiny, "TRAIN.sample_per_device=2", "GENERAL.num_worker=0"]}
    feed = ["backbone=dinov2_large", f"GENERAL.num_worker={max(1, (os.cpu_count() or 2) - 2)}"]
    return {
        "batch 128": [*feed, "TRAIN.sample_per_device=128"],
        "batch 128, compiled": [*feed, "TRAIN.sample_per_device=128", "TRAIN.compile=true"],
        "batch 256, compiled": [*feed, "TRAIN.sample_per_device=256", "TRAIN.compile=true"],
        "batch 64": [*feed, "TRAIN.sample_per_device=64"],
        "batch 256": [*feed, "TRAIN.sample_per_device=256"],
    }


def run(args: argparse.Namespace, say: Callable[[str], None]) -> list[Figure]:
    """Measure every case that time is left for."""
    if not (args.cpu or torch.cuda.is_available()):
        raise SystemExit("bench gpu: torch sees no GPU here; `--cpu` tries the command with a tiny network")
    args.out.mkdir(parents=True, exist_ok=True)
    figures, start = [], time.monotonic()
    for name, overrides in cases(args.cpu).items():
        if time.monotonic() - start > 60 * args.minutes:
            say(f"no time left for {name}")
            figures.append(Figure(f"{name}: left out", 0.0, "", note="no time was left"))
            continue
        with open_bench(args.compose, 10, overrides) as bench:
            rows = bench.measure(args.repeat, 10, lambda text, name=name: say(f"{name}: {text}"))
            if not figures:
                (args.out / "profile.txt").write_text(profile_loop(bench), encoding="utf-8")
        least = {} if args.cpu else LEAST
        figures += [replace(row, name=f"{name}: {row.name}", at_least=least.get(row.name)) for row in rows]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return figures


def profile_loop(bench: StepBench) -> str:
    """The loop's operators by time on the device, and how much of the time the device was at work."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        seconds = bench.seconds(bench.loop_block, NUM_PROFILED)
    averages = profiler.key_averages()
    busy = busy_seconds(averages, on_gpu)
    table = averages.table(sort_by="self_device_time_total" if on_gpu else "self_cpu_time_total", row_limit=25)
    return f"{NUM_PROFILED} steps of the loop in {seconds:.3f} s; operators at work {busy:.3f} s\n{table}\n"


def busy_seconds(averages: Iterable[FunctionEventAvg], on_gpu: bool) -> float:
    """How long kernels ran on the device. The operators that launched them are told the same time once more, and
    annotations span both; neither counts."""
    if not on_gpu:
        return sum(event.self_cpu_time_total for event in averages) / 1e6
    kernels = [e for e in averages if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return sum(kernel.self_device_time_total for kernel in kernels) / 1e6
