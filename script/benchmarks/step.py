"""`script/bench.py step`: the training loop's overhead over the bare network, and the network's use of the machine.

The real loop (a Run with its loader, journal and AIM) and bare steps of the same network alternate in blocks, so that
every ratio compares neighbouring blocks. The data are the demo's rendered hands; the weights are random.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from resource import RUSAGE_SELF, getrusage

import torch
from rich.progress import Progress
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from script.benchmarks.measurement import Figure, Status, compose_config, median_figure, ratio_figure, seconds_of
from src.batch import Batch
from src.loss import loss_counts, loss_sums, mean_terms
from src.train.run import Run
from src.train.validation import evaluate

# Defaults that the command line can override. On a CPU a step of DINOv2-large would take 20 s.
ON_GPU = ["backbone=dinov2_large", "TRAIN.sample_per_device=64", "GENERAL.num_worker=12"]
ON_CPU = ["backbone=dinov2_small", "TRAIN.sample_per_device=4", "GENERAL.num_worker=0"]
MOST_LOOP = {"cuda": 1.03, "cpu": 1.05}  # the loop's step over the bare one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this sub-command."""
    parser.add_argument("--repeat", type=int, default=5, help="blocks of each kind (default 5)")
    parser.add_argument("--block", type=int, default=10, help="steps a block, one log line each block (default 10)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for stage1, e.g. backbone=dinov2_base")


def run(args: argparse.Namespace, status: Status) -> list[Figure]:
    """Measure one configuration."""
    status("rendering hands, building the network")
    with open_bench(args.block, args.overrides) as bench:
        return bench.measure(args.repeat, args.block, status)


@contextmanager
def open_run(*overrides: str) -> Iterator[Run]:
    """A run of the recipe with random weights in a temporary folder; closed afterwards."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, Progress(disable=True) as progress:
        places = [f"DATA.root={folder}/data", f"GENERAL.output_root={folder}/run", f"AIM.repo={folder}/run"]
        cfg = compose_config("stage1-dino_large", "MODEL.backbone.random_init=true", *places, *overrides)
        run = Run(cfg, "bench", progress)
        try:
            yield run
        finally:
            run.close()


@contextmanager
def open_bench(log_step: int, overrides: list[str]) -> Iterator[StepBench]:
    """A StepBench on the demo's hands at the recipe's image size."""
    data = ["data=demo", "DATA.demo={train_sample: 512, val_sample: 64, img_size: 320}"]
    defaults = ON_GPU if torch.cuda.is_available() else ON_CPU
    with open_run(*data, f"GENERAL.log_step={log_step}", *defaults, *overrides) as run:
        yield StepBench(run)


def training_step(run: Run, micro_batches: list[Batch]) -> None:
    """A step of the loop of script/stage1.py: schedules, step, clipping, log line, journal."""
    result = run.step(micro_batches)
    if run.is_due(run.cfg.GENERAL.log_step):
        run.log(result)


class StepBench:
    """Steps of one run's network, from the whole training loop down to the backbone alone."""

    def __init__(self, run: Run) -> None:
        self.run, self.cfg = run, run.cfg
        self.device = run.accelerator.device
        self.trainer = run.trainer
        self.batches = run.micro_batches()
        self.batch = next(self.batches)[0]
        self.waited: list[float] = []  # seconds that each step of the loop waited for its data

    def measure(self, repeat: int, block: int, status: Status) -> list[Figure]:
        """Warm up, then alternate the blocks; every figure is the median of its repetitions."""
        kinds = {
            "loop": self.loop_block,
            "bare": self.bare_block,
            "backbone": self.backbone_block,
            "validation": lambda num: self.validate([self.batch] * num),
            "forward": self.forward_block,
        }
        for kind in kinds.values():
            status("warming up")
            kind(2)
        self.waited.clear()
        val_loader = self.run.val_loader
        seconds: dict[str, list[float]] = {name: [] for name in (*kinds, "read validation", "product")}
        for number in range(repeat):
            status(f"repetition {number + 1} of {repeat}")
            for name, kind in kinds.items():
                seconds[name].append(seconds_of(lambda kind=kind: kind(block)) / block)
            seconds["read validation"].append(seconds_of(lambda: self.validate(val_loader)) / len(val_loader))
            seconds["product"].append(1.0 / self.product_rate())
        return self._figures(seconds)

    def loop_block(self, num: int) -> None:
        """Steps of the training loop, with their data."""
        for _ in range(num):
            start = time.perf_counter()
            micro_batches = next(self.batches)
            self.waited.append(time.perf_counter() - start)
            training_step(self.run, micro_batches)

    def bare_block(self, num: int) -> None:
        """Forward, loss, backward and optimizer step of the same network on a batch in memory."""
        counts = loss_counts(self.batch).sum(0)
        for _ in range(num):
            with self.run.accelerator.autocast():
                prediction = self.trainer.model(self.batch)
            sums = loss_sums(prediction, self.batch, self.run.net.hand).sum(0)
            (mean_terms(sums, counts) @ self.trainer.loss_weight).backward()
            self._update()

    def backbone_block(self, num: int) -> None:
        """The same for the backbone alone, with the mean of its tokens as the loss."""
        image = torch.randn(self.batch.patch.shape, device=self.device)
        for _ in range(num):
            with self.run.accelerator.autocast():
                token = self.run.net.backbone(image)
            token.float().mean().backward()
            self._update()

    @torch.no_grad()
    def forward_block(self, num: int) -> None:
        """The forward pass of a validation, without metrics."""
        self.run.net.eval()
        for _ in range(num):
            with self.run.accelerator.autocast():
                self.run.net(self.batch)
        self.run.net.train()

    def validate(self, batches: Iterable[Batch]) -> None:
        """Forward pass, metrics and losses."""
        evaluate(self.run.net, batches, self.run.accelerator, self.cfg.LOSS, self.run.mean_hand, draw=False)

    def product_rate(self) -> float:
        """FLOP/s of a large matrix product in the precision of the run: the best that this machine can do."""
        size = 8192 if self.device.type == "cuda" else 1536
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = precision.get(self.run.accelerator.mixed_precision, torch.float32)
        factor = torch.randn(size, size, device=self.device, dtype=dtype)
        timer = Timer("factor @ factor", globals={"factor": factor}, num_threads=torch.get_num_threads())
        return 2 * size**3 / timer.blocked_autorange(min_run_time=0.5).mean

    def _update(self) -> None:
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad(set_to_none=True)

    def _figures(self, seconds: dict[str, list[float]]) -> list[Figure]:
        with FlopCounterMode(display=False) as counter:  # counts matrix products and convolutions
            self.bare_block(1)
        flops = counter.get_total_flops()
        size, backbone = len(self.batch), self.cfg.MODEL.backbone
        loop, bare, forward = seconds["loop"], seconds["bare"], seconds["forward"]
        utilisation = [flops / step * product for step, product in zip(bare, seconds["product"])]
        rates = [0.1 + 1e-6 * index for index in range(2000)]  # as on a ramp: the rate changes at every call
        push = seconds_of(lambda: [self.run.net.set_dropout_rate(rate) for rate in rates]) / len(rates)
        push_note = f"{push / statistics.median(bare):.4%} of a step; unchanged: a comparison"
        precision = self.run.accelerator.mixed_precision.replace("no", "fp32")
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
        shape = f"{backbone.num_layer} x {backbone.hidden_size}, {self.cfg.MODEL.img_size} px"
        return [
            median_figure("bare step", [1e3 * s for s in bare], "ms", f"{shape}, batch {size}, {precision}"),
            ratio_figure("loop step over bare step", loop, bare, at_most=MOST_LOOP[self.device.type]),
            ratio_figure("bare step over the backbone's", bare, seconds["backbone"]),
            median_figure("FLOP utilisation of the bare step", utilisation, "", f"{flops / 1e9:,.0f} GFLOP a step"),
            median_figure("matrix product", [1e-9 / s for s in seconds["product"]], "GFLOP/s", precision),
            Figure("set_dropout_rate, changed", 1e6 * push, "us", note=push_note),
            median_figure("wait for data in a step", [1e3 * s for s in self.waited], "ms"),
            ratio_figure("validation rate over forward rate", forward, seconds["validation"], at_least=0.9),
            ratio_figure("the same with reading", forward, seconds["read validation"]),
            median_figure("the loop's samples", [size / s for s in loop], "samples/s"),
            Figure("peak memory", peak / 1e6, "MB", note=torch.cuda.get_device_name() if on_gpu else "cpu"),
        ]
