"""`TRAIN.shard_weights`: the same steps and checkpoints as without it; incompatible options are refused.

Two processes on the CPU (gloo). tests/sharded_steps.py takes the steps; whole runs use script/stage1.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from src.checkpoint.network import load_network
from src.config import ConfigError
from src.hand.standin.build import build_standin_hand
from src.train.sharding import check_processes
from tests.helpers import ROOT, compose_config, random_batch
from tests.test_processes import DROPOUT, finish, rows, start, torchrun

SHARDED = "TRAIN.shard_weights=true"
GATED = "MODEL.backbone.swiglu=true"  # as in DINOv2-giant
OPTIONS = ("TRAIN.sample_per_device=4", "GENERAL.total_step=10", "GENERAL.vis_step=4", GATED)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of tests/sharded_steps.py."""
    file = tmp_path_factory.mktemp("sharding") / "result.json"
    done = subprocess.run(
        [*torchrun(2), str(ROOT / "tests/sharded_steps.py"), str(file)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Warning" not in done.stderr
    return json.loads(file.read_text())


def assert_same_curves(unsharded: list[dict], sharded: list[dict]) -> None:
    for one, two in zip(unsharded, sharded, strict=True):
        for name in (name for name in one if name.startswith("loss_") or name in ("lr", "grad_norm")):
            assert two[name] == pytest.approx(one[name], rel=1e-5), name


def test_curve_equals_unsharded(steps: dict[str, Any]) -> None:
    """10 steps of two micro-batches with activation checkpointing, starting from moments of unsharded steps."""
    assert steps["start_is_equal"]
    assert len(steps["unsharded"]) == 10
    assert_same_curves(steps["unsharded"], steps["sharded"])
    losses = [row["loss_total"] for row in steps["sharded"]]
    assert max(losses) > 1.01 * min(losses), "a curve, not a constant"


def test_curve_equals_unsharded_frozen_and_bf16(steps: dict[str, Any]) -> None:
    assert_same_curves(*steps["frozen"])
    assert_same_curves(*steps["bf16"])
    assert steps["bf16"][0] != steps["float32"]


def test_each_process_holds_its_shard(steps: dict[str, Any]) -> None:
    """Half of weights and moments; a layer's last row or two make it slightly more on the first process."""
    for unsharded, part in (steps["numbers_held"], steps["moments_held"]):
        assert 0.5 * unsharded <= part < 0.52 * unsharded


def test_skipped_step_changes_nothing(steps: dict[str, Any]) -> None:
    """As in tests/test_bad_numbers.py: weights, moments and count, to the last bit; one process has the NaN."""
    bad = steps["bad"]
    assert bad["is_skipped"]
    assert bad["changes_nothing"]
    assert bad["skipped"] == [[1, 1], [1, 2], [2, 3]]
    assert bad["stays_halted"], "no update after max_skipped_step bad steps"


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded-runs")


@pytest.fixture(scope="module")
def sharded(place: Path) -> Path:
    """10 steps with overlays and two validations, checkpoints at 5 and 10."""
    return finish(place, "sharded", *OPTIONS, SHARDED, launcher=torchrun(2))


@pytest.fixture(scope="module")
def unsharded(place: Path) -> Path:
    return finish(place, "unsharded", *OPTIONS, launcher=torchrun(2))


def assert_same_rows(run: Path, other: Path, number: int) -> None:
    assert [row["step"] for row in rows(run)[-number:]] == [row["step"] for row in rows(other)[-number:]]
    assert_same_curves(rows(run)[-number:], rows(other)[-number:])


@pytest.mark.slow
def test_run_equals_unsharded(unsharded: Path, sharded: Path) -> None:
    """The same curve, validations, images and checkpoint files."""
    assert_same_rows(unsharded, sharded, 10)
    for one, two in zip(rows(unsharded, "val"), rows(sharded, "val"), strict=True):
        assert all(two[name] == pytest.approx(value, rel=1e-4) for name, value in one.items() if name != "subset")
    images = [sorted(file.name for file in (run / "images").iterdir()) for run in (unsharded, sharded)]
    assert images[0] == images[1] != []
    one, two = (load_file(run / "checkpoints/checkpoint-10/model.safetensors") for run in (unsharded, sharded))
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
    one, two = (
        torch.load(run / "checkpoints/checkpoint-10/optimizer.pt", weights_only=True)["optimizer"]
        for run in (unsharded, sharded)
    )
    assert one["param_groups"] == two["param_groups"]
    for index, state in one["state"].items():
        for name, value in state.items():
            assert torch.allclose(value, two["state"][index][name], rtol=1e-3, atol=1e-6), (index, name)


@pytest.mark.slow
@pytest.mark.parametrize(("written", "resumed"), [("sharded", ()), ("unsharded", (SHARDED,))])
def test_sharded_and_unsharded_resume_from_each_other(
    place: Path, request: pytest.FixtureRequest, written: str, resumed: tuple[str, ...]
) -> None:
    origin: Path = request.getfixturevalue(written)
    resume = f"GENERAL.resume_path={origin}/checkpoints/checkpoint-5"
    run = finish(place, f"on-from-{written}", *OPTIONS, *resumed, resume, launcher=torchrun(2))
    assert len(rows(run)) == 5
    assert_same_rows(origin, run, 5)


@pytest.mark.slow
def test_a_resume_is_exact(place: Path) -> None:
    """With dropout, from the checkpoint in the middle: journal and files equal to the last bit."""
    runs = finish(place, "exact", *OPTIONS, DROPOUT, SHARDED, launcher=torchrun(2))
    resume = f"GENERAL.resume_path={runs}/checkpoints/checkpoint-5"
    again = finish(place, "exact-again", *OPTIONS, DROPOUT, SHARDED, resume, launcher=torchrun(2))
    assert rows(again) == rows(runs)[5:]
    one, two = (load_file(run / "checkpoints/checkpoint-10/model.safetensors") for run in (runs, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_network_loads_from_a_sharded_checkpoint(sharded: Path) -> None:
    net = load_network(sharded, hand_model=build_standin_hand()).network
    with torch.no_grad():
        assert torch.isfinite(net(random_batch(2, net.img_size)).joint_cam).all()


# ---- refused options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["TRAIN.compile=true", "TRAIN.mixed_precision=fp16"])
def test_incompatible_options_are_refused(other: str) -> None:
    with pytest.raises(ConfigError, match=f"shard_weights=true: cannot be combined with {other}"):
        compose_config("stage1-demo", SHARDED, other)


def test_single_process_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes()
    monkeypatch.delenv("WORLD_SIZE")
    done = start(place, "alone", SHARDED)
    assert done.returncode == 2
    assert "TRAIN.shard_weights=true: there is one process only" in done.stdout
    assert not (place / "alone").exists()
