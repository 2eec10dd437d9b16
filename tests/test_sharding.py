"""`TRAIN.shard_weights`: the same steps as with whole weights, the same checkpoints, and what it does not go with.

Two processes on the CPU (gloo). tests/sharded_steps.py takes the steps; the runs are those of script/stage1.py.
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
    """What tests/sharded_steps.py found."""
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


def assert_same_curves(whole: list[dict], sharded: list[dict]) -> None:
    for one, two in zip(whole, sharded, strict=True):
        for name in (name for name in one if name.startswith("loss_") or name in ("lr", "grad_norm")):
            assert two[name] == pytest.approx(one[name], rel=1e-5), name


def test_the_curve_is_that_of_whole_weights(steps: dict[str, Any]) -> None:
    """10 steps of two micro-batches, activations computed again, on from moments made with whole weights."""
    assert steps["start_is_equal"]
    assert len(steps["whole"]) == 10
    assert_same_curves(steps["whole"], steps["sharded"])
    losses = [row["loss_total"] for row in steps["sharded"]]
    assert max(losses) > 1.01 * min(losses), "a curve, not a constant"


def test_a_frozen_backbone_and_bf16_too(steps: dict[str, Any]) -> None:
    assert_same_curves(*steps["frozen"])
    assert_same_curves(*steps["bf16"])
    assert steps["bf16"][0] != steps["float32"]


def test_each_process_holds_its_part(steps: dict[str, Any]) -> None:
    """Half of weights and moments; a layer's last row or two make it a little more on the first process."""
    for whole, part in (steps["numbers_held"], steps["moments_held"]):
        assert 0.5 * whole <= part < 0.52 * whole


def test_a_bad_step_leaves_no_trace(steps: dict[str, Any]) -> None:
    """As in tests/test_bad_numbers.py: weights, moments and count, to the last bit; the NaN is one process's."""
    bad = steps["bad"]
    assert bad["left_out"]
    assert bad["without_trace"]
    assert bad["skipped"] == [[1, 1], [1, 2], [2, 3]]
    assert bad["stays_halted"], "no update after the last bad step that is allowed"


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded-runs")


@pytest.fixture(scope="module")
def sharded(place: Path) -> Path:
    """10 steps with overlays and two validations, checkpoints at 5 and 10."""
    return finish(place, "sharded", *OPTIONS, SHARDED, launcher=torchrun(2))


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    return finish(place, "whole", *OPTIONS, launcher=torchrun(2))


def assert_same_rows(run: Path, other: Path, number: int) -> None:
    assert [row["step"] for row in rows(run)[-number:]] == [row["step"] for row in rows(other)[-number:]]
    assert_same_curves(rows(run)[-number:], rows(other)[-number:])


@pytest.mark.slow
def test_a_run_is_that_of_whole_weights(whole: Path, sharded: Path) -> None:
    """The same curve, validations, pictures and files of a checkpoint."""
    assert_same_rows(whole, sharded, 10)
    for one, two in zip(rows(whole, "val"), rows(sharded, "val"), strict=True):
        assert all(two[name] == pytest.approx(value, rel=1e-4) for name, value in one.items() if name != "subset")
    pictures = [sorted(file.name for file in (run / "images").iterdir()) for run in (whole, sharded)]
    assert pictures[0] == pictures[1] != []
    one, two = (load_file(run / "checkpoints/checkpoint-10/model.safetensors") for run in (whole, sharded))
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
    one, two = (
        torch.load(run / "checkpoints/checkpoint-10/optimizer.pt", weights_only=True)["optimizer"]
        for run in (whole, sharded)
    )
    assert one["param_groups"] == two["param_groups"]
    for index, state in one["state"].items():
        for name, value in state.items():
            assert torch.allclose(value, two["state"][index][name], rtol=1e-3, atol=1e-6), (index, name)


@pytest.mark.slow
@pytest.mark.parametrize(("written", "goes_on"), [("sharded", ()), ("whole", (SHARDED,))])
def test_either_goes_on_from_the_others_checkpoint(
    place: Path, request: pytest.FixtureRequest, written: str, goes_on: tuple[str, ...]
) -> None:
    origin: Path = request.getfixturevalue(written)
    resume = f"GENERAL.resume_path={origin}/checkpoints/checkpoint-5"
    run = finish(place, f"on-from-{written}", *OPTIONS, *goes_on, resume, launcher=torchrun(2))
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
def test_the_network_is_read_from_a_sharded_runs_checkpoint(sharded: Path) -> None:
    net = load_network(sharded, hand_model=build_standin_hand()).network
    with torch.no_grad():
        assert torch.isfinite(net(random_batch(2, net.img_size)).joint_cam).all()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["TRAIN.compile=true", "TRAIN.mixed_precision=fp16"])
def test_what_it_does_not_go_with(other: str) -> None:
    with pytest.raises(ConfigError, match=f"shard_weights=true: does not go together with {other}"):
        compose_config("stage1-demo", SHARDED, other)


def test_one_process_has_nobody_to_share_with(place: Path) -> None:
    check_processes({"WORLD_SIZE": "2"})
    done = start(place, "alone", SHARDED)
    assert done.returncode == 2
    assert "TRAIN.shard_weights=true: there is one process" in done.stdout
    assert not (place / "alone").exists()
