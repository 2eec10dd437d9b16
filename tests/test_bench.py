"""Every subject of script/bench.py that trains, on a tiny network: it reports all of its figures."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from script.bench import SUBJECTS, main
from script.benchmarks import checkpoint, gpu, scale, shards
from script.benchmarks.measurement import Figure, compose_config
from script.benchmarks.step import MOST_LOOP
from src.config import Config
from src.data.demo.make import make_demo_shards
from src.data.shards.build_index import open_indexes
from src.data.shards.writer import write_shard

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


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a small demo set, rendered once and in this process."""
    root = tmp_path_factory.mktemp("demo")
    make_demo_shards(root, {"train": 16, "val": 4}, seed=0, img_size=96, num_process=1)
    demo = "DATA.demo={train_sample: 16, val_sample: 4, img_size: 96, seed: 0, free_rotation: 0.0}"
    return [f"DATA.root={root}", demo]


def measure(subject: str, *arguments: str) -> dict[str, Figure]:
    """The figures of a subject by name, measured in this process."""
    module = importlib.import_module(SUBJECTS[subject][1])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    args = parser.parse_args(arguments)
    figures = module.run(args, lambda text: None)
    assert len({figure.name for figure in figures}) == len(figures), "duplicate names"
    return {figure.name: figure for figure in figures}


def assert_measured(figures: dict[str, Figure], names: Sequence[str]) -> None:
    """All of `names` are present, and every figure is a positive number."""
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


def test_step(demo: list[str]) -> None:
    figures = measure("step", "--repeat", "2", "--block", "2", *TINY, *demo)
    assert_measured(figures, STEP_FIGURES)
    assert figures["loop step over bare step"].at_most in MOST_LOOP.values()
    assert figures["validation rate over forward rate"].at_least == 0.9


def test_gpu_on_a_cpu(tmp_path: Path, demo: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    case = [*TINY, *demo]
    monkeypatch.setattr(gpu, "cases", lambda on_cpu: {"one": case})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    figures = measure("gpu", "--cpu", "--repeat", "1", "--out", str(tmp_path))
    assert_measured(figures, [f"one: {name}" for name in STEP_FIGURES])
    profile = (tmp_path / "profile.txt").read_text()
    assert "steps of the loop in" in profile
    assert "aten::" in profile


def test_kernel_time_counts_once() -> None:
    """The profiler attributes it to the kernel, to the operator that launched it, and to annotations around both."""

    def event(device: DeviceType, device_us: float, cpu_us: float = 0.0, note: bool = False) -> SimpleNamespace:
        times = {"self_device_time_total": device_us, "self_cpu_time_total": cpu_us}
        return SimpleNamespace(device_type=device, is_user_annotation=note, **times)

    averages = [event(DeviceType.CPU, 3e6, 1e6), event(DeviceType.CUDA, 3e6), event(DeviceType.CUDA, 4e6, note=True)]
    assert gpu.busy_seconds(averages, on_gpu=True) == pytest.approx(3.0)
    assert gpu.busy_seconds(averages, on_gpu=False) == pytest.approx(1.0)


def test_gpu_lists_skipped_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(gpu, "measure_case", out_of_memory)
    late = measure("gpu", "--cpu", "--minutes", "-1", "--out", str(tmp_path))
    large = measure("gpu", "--cpu", "--out", str(tmp_path))
    assert late == {"batch 2: skipped": Figure("batch 2: skipped", 0.0, "", note="no time left")}
    assert large["batch 2: skipped"].note == "out of GPU memory"


def test_interrupted_gpu_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_case(name: str, *_: object) -> list[Figure]:
        if name == "second":
            raise KeyboardInterrupt
        return [Figure(f"{name}: bare step", 1.5, "ms")]

    monkeypatch.setattr(gpu, "cases", lambda on_cpu: {"first": [], "second": []})
    monkeypatch.setattr(gpu, "measure_case", measure_case)
    with pytest.raises(KeyboardInterrupt):
        measure("gpu", "--cpu", "--out", str(tmp_path))
    (row,) = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert (row["name"], row["value"]) == ("first: bare step", 1.5)


def test_gpu_measures_eager_cases_first() -> None:
    is_compiled = ["TRAIN.compile=true" in overrides for overrides in gpu.cases(on_cpu=False).values()]
    assert is_compiled == [False, False, False, True, True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_without_a_gpu_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="torch sees no GPU here"):
        measure("gpu", "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"NUM_WINDOW": [64, 128], "NUM_WORKER": [1, 2], "NUM_PROCESS": [1, 2, 3], "IMG_SIZE": [56, 112]}
    for name, values in {**sizes, "BACKBONE": ["tiny", "dinov2_small"], "NUM_REPEAT": 1}.items():
        monkeypatch.setattr(scale, name, values)
    monkeypatch.setattr(scale, "WINDOWS_PER_SHARD", 32)
    measured = scale.communication_seconds  # starting a process takes seconds: one case starts them
    monkeypatch.setattr(scale, "communication_seconds", lambda *args: measured(*args) if args[1] == 2 else (0.1, 0.2))

    def tiny(name: str, *overrides: str) -> Config:
        """Networks of two sizes."""
        num_layer = 2 if "backbone=dinov2_small" in overrides else 1
        return compose_config(name, *TINY, *overrides, f"MODEL.backbone.num_layer={num_layer}")

    monkeypatch.setattr(scale, "compose_config", tiny)
    figures = measure("scale", "--out", str(tmp_path))
    costs = {name: figure for name, figure in figures.items() if "exponent" not in name}
    assert_measured(costs, ["start-up to the first batch, 64 windows", "step by patch size, 64 image tokens"])
    series = [scale.Series(**row) for row in json.loads((tmp_path / "scale.json").read_text())]
    assert len(series) == 8
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    (tmp_path / "scale.png").unlink()
    assert measure("scale", "--redraw", str(tmp_path / "scale.json")).keys() == figures.keys()
    assert (tmp_path / "scale.png").is_file()


def test_exponent_is_the_slope_of_the_logarithms() -> None:
    series = scale.Series("a", "b", [1.0, 10.0, 100.0], [3.0, 300.0, 30000.0], "s")
    assert series.exponent == pytest.approx(2.0)


def test_peers() -> None:
    figures = measure("peers", "--repeat", "2", "--block", "1", *TINY)
    assert_measured(figures, ["our step", "HaMeR's step", "CS-ViT2's step", "ours over the better peer"])


def test_main_prints_and_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["mano", "--batch", "2", "--seconds", "0", "--device", "cpu", "--json", str(tmp_path / "a.json")]) == 0
    figures = json.loads((tmp_path / "a.json").read_text())["figures"]
    assert len(figures) == 4
    printed = capsys.readouterr().out
    assert all(figure["value"] > 0 and figure["name"] in printed for figure in figures)


def test_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SIZES", {"tiny": ["stage1-demo", *TINY]})
    figures = measure("checkpoint", "--repeat", "2")
    assert_measured(figures, ["tiny: wait", "tiny: wait for the first one", "tiny: write", "tiny: wait / write"])
    assert figures["tiny: wait"].value < figures["tiny: write"].value


def test_big_indexes_share_one_shard(tmp_path: Path) -> None:
    """Shards of millions of windows take no space: they are hard links."""
    write_shard(shards.records(8, "jpg", num_image=1), tmp_path / "small" / "000000.tar")
    (shard,) = shards.shards_of(tmp_path / "small")
    shards.write_big_indexes(tmp_path / "big", shard, 100, 4)
    links = shards.shards_of(tmp_path / "big")
    assert all(link.samefile(shard) for link in links)
    indexes = open_indexes(links)
    assert [index.num_frame() for index in indexes] == [25] * 4
    fetched = shards.bench_dataset(indexes).__getitems__(range(4))
    assert len(fetched.batch) == 4
