"""Every subject of script/bench.py that trains: tiny, it runs and gives all its figures."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from script.bench import SUBJECTS
from script.benchmarks import checkpoint, gpu, scale, shards
from script.benchmarks.measurement import Figure
from script.benchmarks.peers import load_peer
from script.benchmarks.step import MOST_LOOP
from src.data.shards.build_index import open_indexes
from src.data.shards.writer import write_shards
from tests.helpers import ROOT, compose_config

TINY = (
    "backbone=tiny",
    "MODEL.img_size=56",
    "MODEL.handec={dim: 32, num_layer: 1, num_head: 2, dim_head: 16, dim_mlp: 64}",
    "MODEL.backbone.hidden_size=32",
    "MODEL.backbone.num_layer=1",
    "MODEL.backbone.num_head=2",
    "TRAIN.sample_per_device=2",
    "GENERAL.num_worker=0",
)
DEMO = ("DATA.demo.train_sample=16", "DATA.demo.val_sample=4", "DATA.demo.img_size=96")


def measure(subject: str, *arguments: str, shrunk: Sequence[str] = ()) -> dict[str, Figure]:
    """The figures of a subject by name, run in this process; `shrunk` goes before what the subject overrides itself."""
    module = importlib.import_module(SUBJECTS[subject][1])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    args = parser.parse_args(arguments)
    args.compose, args.peer = lambda name, overrides: compose_config(name, *shrunk, *overrides), load_peer
    figures = module.run(args, lambda text: None)
    assert len({figure.name for figure in figures}) == len(figures), "a name of its own for each figure"
    return {figure.name: figure for figure in figures}


def assert_measured(figures: dict[str, Figure], names: Sequence[str]) -> None:
    """All of `names` are there, and every figure is a positive number."""
    assert set(names) <= set(figures), set(names) - set(figures)
    bad = {name: figure.value for name, figure in figures.items() if not 0 < figure.value < math.inf}
    assert not bad


STEP_FIGURES = (
    "bare step",
    "loop step over bare step",
    "bare step over the backbone's",
    "FLOP utilisation of the bare step",
    "matrix product",
    "set_dropout_rate, changed",
    "wait for data in a step",
    "the loop's samples",
    "validation rate over forward rate",
    "the same with reading",
    "peak memory",
)


def test_step() -> None:
    figures = measure("step", "--repeat", "2", "--block", "2", *TINY, *DEMO)
    assert_measured(figures, STEP_FIGURES)
    assert figures["loop step over bare step"].at_most in MOST_LOOP.values()
    assert figures["validation rate over forward rate"].at_least == 0.9


def test_gpu_tried_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = [*TINY, *DEMO]
    monkeypatch.setattr(gpu, "cases", lambda on_cpu: {"one": case})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    figures = measure("gpu", "--cpu", "--repeat", "1", "--out", str(tmp_path))
    assert_measured(figures, [f"one: {name}" for name in STEP_FIGURES])
    profile = (tmp_path / "profile.txt").read_text()
    assert "steps of the loop in" in profile
    assert "aten::" in profile


def test_the_time_of_kernels_counts_once() -> None:
    """The profiler gives it to the kernel, to the operator that launched it, and to annotations around both."""

    def event(device: DeviceType, device_us: float, cpu_us: float = 0.0, note: bool = False) -> SimpleNamespace:
        times = {"self_device_time_total": device_us, "self_cpu_time_total": cpu_us}
        return SimpleNamespace(device_type=device, is_user_annotation=note, **times)

    averages = [event(DeviceType.CPU, 3e6, 1e6), event(DeviceType.CUDA, 3e6), event(DeviceType.CUDA, 4e6, note=True)]
    assert gpu.busy_seconds(averages, on_gpu=True) == pytest.approx(3.0)
    assert gpu.busy_seconds(averages, on_gpu=False) == pytest.approx(1.0)


def test_gpu_without_time_names_what_it_leaves_out(tmp_path: Path) -> None:
    figures = measure("gpu", "--cpu", "--minutes", "-1", "--out", str(tmp_path))
    assert [figure.note for figure in figures.values()] == ["no time was left"] * len(gpu.cases(on_cpu=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_without_a_gpu_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "script" / "bench.py"), "gpu", "--out", str(tmp_path / "out")]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "torch sees no GPU here" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = scale.Sizes([64, 128], [1], [1, 2], [56, 112], ["tiny"], 1)
    monkeypatch.setattr(scale, "QUICK", sizes)
    monkeypatch.setattr(scale, "WINDOWS_PER_SHARD", 32)
    figures = measure("scale", "--quick", "--out", str(tmp_path), shrunk=TINY)
    costs = {name: figure for name, figure in figures.items() if "exponent" not in name}
    assert_measured(costs, ["start-up to the first batch, 64 windows", "step by patch size, 64 image tokens"])
    series = [scale.Series(**row) for row in json.loads((tmp_path / "scale.json").read_text())]
    assert len(series) == 8
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    (tmp_path / "scale.png").unlink()
    assert measure("scale", "--redraw", str(tmp_path / "scale.json")).keys() == figures.keys()
    assert (tmp_path / "scale.png").is_file()


def test_an_exponent_is_a_slope_of_logarithms() -> None:
    series = scale.Series("a", "b", [1.0, 10.0, 100.0], [3.0, 300.0, 30000.0], "s")
    assert series.exponent == pytest.approx(2.0)


def test_peers() -> None:
    figures = measure("peers", "--repeat", "2", "--block", "1", *TINY)
    assert_measured(figures, ["our step", "HaMeR's step", "CS-ViT2's step", "ours over the better peer"])


def test_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SIZES", {"tiny": ("stage1-demo", list(TINY))})
    figures = measure("checkpoint", "--repeat", "2")
    assert_measured(figures, ["tiny: wait", "tiny: wait for the first one", "tiny: write", "tiny: wait / write"])
    assert figures["tiny: wait"].value < figures["tiny: write"].value


def test_many_windows_are_links(tmp_path: Path) -> None:
    """The indexes of millions of windows cost no bytes of pictures."""
    write_shards(shards.records(8, "jpg", 0, num_picture=1), tmp_path / "small", num_per_shard=8)
    (shard,) = shards.shards_of(tmp_path / "small")
    shards.write_big_indexes(tmp_path / "big", shard, 100, 4)
    indexes = open_indexes(shards.shards_of(tmp_path / "big"))
    assert [index.num_frame() for index in indexes] == [25] * 4
    batch = shards.bench_dataset(indexes).__getitems__(range(4))
    assert len(batch.rows) == 4
