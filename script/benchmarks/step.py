"""`script/bench.py step`: what the training loop adds to the bare network, and how near the network is to the machine.

The real loop (a Run with its loader, journal and AIM) and bare steps of the same network take turns in blocks, so that
every ratio compares neighbours in time. Data are the demo's rendered hands; weights are random.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import Progress
from torch.utils.flop_counter import FlopCounterMode

from script.benchmarks.measurement import Figure
from src.config import Config
from src.loss import loss_counts, loss_sums, mean_terms
from src.train.run import Run
from src.train.validation import evaluate

# What is measured unless the command line says otherwise. On a CPU a step of DINOv2-large would take 20 s.
ON_GPU = ["backbone=dinov2_large", "TRAIN.sample_per_device=64", "GENERAL.num_worker=12"]
ON_CPU = ["backbone=dinov2_small", "TRAIN.sample_per_device=4", "GENERAL.num_worker=0"]
MOST_LOOP = {"cuda": 1.03, "cpu": 1.05}  # the loop's step over the bare one
LEAST_VALIDATION = 0.9  # rate of a validation over that of the bare forward pass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--repeat", type=int, default=5, help="blocks of each kind (default 5)")
    parser.add_argument("--block", type=int, default=10, help="steps a block, one log line each block (default 10)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for stage1, e.g. backbone=dinov2_base")


def run(args: argparse.Namespace, say: Callable[[str], None]) -> list[Figure]:
    """Measure everything; `say` is told what is going on."""
    say("rendering hands, building the network")
    with open_bench(args.compose, args.block, args.overrides) as bench:
        return bench.measure(args.repeat, args.block, say)


@contextmanager
def open_bench(compose: Callable[[str, list[str]], Config], log_step: int, overrides: list[str]) -> Iterator[StepBench]:
    """A run in a temporary folder to measure with; closed afterwards."""
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder, Progress(disable=True) as progress:
        cfg = compose("stage1-dino_large", bench_overrides(Path(folder), log_step) + overrides)
        bench = StepBench(Run(cfg, "bench", progress))
        try:
            yield bench
        finally:
            bench.run.close()


def bench_overrides(folder: Path, log_step: int) -> list[str]:
    """The demo's hands at the recipe's size, everything written below `folder`."""
    return [
        "data=demo",
        "DATA.demo.train_sample=512",
        "DATA.demo.val_sample=64",
        "DATA.demo.img_size=320",
        f"DATA.root={folder}/data",
        f"GENERAL.output_root={folder}/run",
        f"AIM.repo={folder}/run",
        f"GENERAL.log_step={log_step}",
        "MODEL.backbone.random_init=true",
        *(ON_GPU if torch.cuda.is_available() else ON_CPU),
    ]


class StepBench:
    """Steps of one run's network in several states of undress."""

    def __init__(self, run: Run) -> None:
        self.run, self.cfg = run, run.cfg
        self.device = run.accelerator.device
        self.trainer = run.trainer
        self.batches = run.micro_batches()
        self.batch = next(self.batches)[0]
        self.waited: list[float] = []  # seconds that each step of the loop waited for its data

    def measure(self, repeat: int, block: int, say: Callable[[str], None]) -> list[Figure]:
        """Warm up, then blocks in turn; every figure is the median of its repetitions."""
        kinds = {
            "loop": self.loop_block,
            "bare": self.bare_block,
            "backbone": self.backbone_block,
            "validation": self.validation_block,
            "forward": self.forward_block,
        }
        for kind in kinds.values():
            say("warming up")
            kind(2)
        self.waited.clear()
        seconds: dict[str, list[float]] = {name: [] for name in (*kinds, "read validation", "product")}
        for number in range(repeat):
            say(f"repetition {number + 1} of {repeat}")
            for name, kind in kinds.items():
                seconds[name].append(self.seconds(kind, block) / block)
            seconds["read validation"].append(self.seconds(self.read_validation, 1) / len(self.run.val_loader))
            seconds["product"].append(1.0 / self.product_rate())
        return self._figures(seconds, self.flops())

    # ---- what is timed ----------------------------------------------------------------------------------------------

    def loop_block(self, num: int) -> None:
        """Steps as script/stage1.py takes them: data, schedules, step, clip, log line, journal."""
        for _ in range(num):
            start = time.perf_counter()
            micro_batches = next(self.batches)
            self.waited.append(time.perf_counter() - start)
            result = self.run.step(micro_batches)
            if self.run.is_due(self.cfg.GENERAL.log_step):
                self.run.log(result)

    def bare_block(self, num: int) -> None:
        """Forward, loss, backward and optimizer step of the same network on a batch that is there already."""
        counts = loss_counts(self.batch).sum(0)
        for _ in range(num):
            with self.run.accelerator.autocast():
                prediction = self.trainer.model(self.batch)
            sums = loss_sums(prediction, self.batch, self.run.net.hand).sum(0)
            (mean_terms(sums, counts) @ self.trainer.loss_weight).backward()
            self._update()

    def backbone_block(self, num: int) -> None:
        """The same of the backbone alone, with a sum for a loss."""
        image = torch.randn(self.batch.patch.shape, device=self.device)
        for _ in range(num):
            with self.run.accelerator.autocast():
                token = self.run.net.backbone(image)
            token.float().mean().backward()
            self._update()

    @torch.no_grad()
    def forward_block(self, num: int) -> None:
        """The forward pass of a validation, with nothing measured."""
        self.run.net.eval()
        for _ in range(num):
            with self.run.accelerator.autocast():
                self.run.net(self.batch)
        self.run.net.train()

    def validation_block(self, num: int) -> None:
        """A validation over batches that are there already: forward pass, metrics and losses."""
        evaluate(self.run.net, [self.batch] * num, self.run.accelerator, self.cfg.LOSS, self.run.mean_hand, draw=False)

    def read_validation(self, _: int) -> None:
        """The run's validation sample, read, cut and measured."""
        evaluate(self.run.net, self.run.val_loader, self.run.accelerator, self.cfg.LOSS, self.run.mean_hand, draw=False)

    def product_rate(self, seconds: float = 0.5) -> float:
        """FLOP/s of a large matrix product in the precision of the run: what this machine can do at best."""
        size = 8192 if self.device.type == "cuda" else 1536
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = precision.get(self.run.accelerator.mixed_precision, torch.float32)
        left, right = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        self.seconds(lambda _: left @ right, 1)
        num = max(1, int(seconds / self.seconds(lambda _: left @ right, 1)))
        return 2 * size**3 * num / self.seconds(lambda n: [left @ right for _ in range(n)], num)

    def flops(self) -> float:
        """Floating-point operations of a bare step, counted by torch from its matrix products and convolutions."""
        with FlopCounterMode(display=False) as counter:
            self.bare_block(1)
        return float(counter.get_total_flops())

    def push_seconds(self, num: int = 2000) -> float:
        """`set_dropout_rate` with a rate that changes at each call, as a ramp does."""
        start = time.perf_counter()
        for index in range(num):
            self.run.net.set_dropout_rate(0.1 + 1e-6 * index)
        self._wait()
        return (time.perf_counter() - start) / num

    def _update(self) -> None:
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad(set_to_none=True)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, func: Callable[[int], object], num: int) -> float:
        """Of `func(num)`, the device's work included."""
        self._wait()
        start = time.perf_counter()
        func(num)
        self._wait()
        return time.perf_counter() - start

    # ---- what is told -----------------------------------------------------------------------------------------------

    def _figures(self, seconds: dict[str, list[float]], flops: float) -> list[Figure]:
        size = len(self.batch)
        loop = _ratio("loop step over bare step", seconds["loop"], seconds["bare"])
        rates = [flops / bare * product for bare, product in zip(seconds["bare"], seconds["product"])]
        bare, push = statistics.median(seconds["bare"]), self.push_seconds()
        shape = (
            f"{self.cfg.MODEL.backbone.num_layer} x {self.cfg.MODEL.backbone.hidden_size}, {self.cfg.MODEL.img_size} px"
        )
        precision = self.run.accelerator.mixed_precision.replace("no", "fp32")
        return [
            _figure("bare step", [1e3 * s for s in seconds["bare"]], "ms", f"{shape}, batch {size}, {precision}"),
            replace(loop, at_most=MOST_LOOP[self.device.type]),
            _ratio("bare step over the backbone's", seconds["bare"], seconds["backbone"]),
            _figure("FLOP utilisation of the bare step", rates, "", f"{flops / 1e9:,.0f} GFLOP a step"),
            _figure("matrix product", [1e-9 / s for s in seconds["product"]], "GFLOP/s", precision),
            Figure(
                "set_dropout_rate, changed",
                1e6 * push,
                "us",
                note=f"{push / bare:.4%} of a step; unchanged: a comparison",
            ),
            _figure("wait for data in a step", [1e3 * s for s in self.waited], "ms", ""),
            replace(
                _ratio("validation rate over forward rate", seconds["forward"], seconds["validation"]),
                at_least=LEAST_VALIDATION,
            ),
            _ratio("the same with reading", seconds["forward"], seconds["read validation"]),
            _figure("the loop's samples", [size / s for s in seconds["loop"]], "samples/s", ""),
            Figure("peak memory", self._peak_megabytes(), "MB", note=self.device.type),
        ]

    def _peak_megabytes(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _figure(name: str, values: list[float], unit: str, note: str) -> Figure:
    """The median, with the span of the repetitions in the note."""
    span = f"{min(values):.4g} to {max(values):.4g} over {len(values)}"
    return Figure(name, statistics.median(values), unit, note=f"{span}; {note}" if note else span)


def _ratio(name: str, above: list[float], below: list[float]) -> Figure:
    """The median of the ratios of neighbouring blocks."""
    return _figure(name, [a / b for a, b in zip(above, below)], "", "")
