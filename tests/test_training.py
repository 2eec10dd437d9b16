"""script/stage1.py on a shrunk demo configuration: it learns, checkpoints, resumes exactly, runs distributed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.loss import LOSS_TERMS
from src.train.resume import changed_settings
from tests.helpers import ROOT, compose_config

SMALL = (
    "--config-name=stage1-demo",
    "backbone=tiny",
    "DATA.demo.train_sample=96",
    "DATA.demo.val_sample=20",
    "DATA.demo.img_size=96",
    "MODEL.img_size=56",
    "MODEL.backbone.hidden_size=32",
    "MODEL.backbone.num_layer=2",
    "MODEL.backbone.num_head=2",
    "MODEL.handec={dim: 32, num_layer: 1, num_head: 2, dim_head: 16, dim_mlp: 64, dropout: 0.1}",
    "TRAIN.sample_per_device=8",
    "TRAIN.lr=2e-3",
    "TRAIN.backbone_lr=2e-3",
    "augmentation=light",
    "GENERAL.total_step=40",
    "GENERAL.warmup_step=5",
    "GENERAL.dropout_warmup_step=20",
    "GENERAL.checkpoint_step=20",
    "GENERAL.log_step=1",
    "GENERAL.vis_step=20",
    "GENERAL.num_worker=1",
)
LINE = re.compile(
    r"^\d+/40 lr=\d\.\d{4}e[+-]\d\d dropout=\d\.\d{3} total=\d+\.\d{4}"
    + "".join(rf" {t}=\d+\.\d{{4}}" for t in LOSS_TERMS)
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


def stage1(place: Path, runs: str, *overrides: str, launcher: tuple[str, ...] = (sys.executable,)) -> Path:
    """Run the script with all folders below `place`; returns the newest run folder."""
    places = (f"DATA.root={place}/data", f"GENERAL.output_root={place}/{runs}", f"AIM.repo={place}/{runs}")
    command = [*launcher, str(ROOT / "script/stage1.py"), *SMALL, *places, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return max((place / runs).glob("*/*_stage1-demo*"), key=lambda p: p.stat().st_mtime)


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """One uninterrupted run of 40 steps."""
    return stage1(place, "runs")


def rows(run: Path, subset: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["subset"] == subset]


def test_it_learns(finished: Path) -> None:
    total = [row["loss_total"] for row in rows(finished, "train")]
    assert sum(total[-10:]) < 0.9 * sum(total[:10]), "batches of 8 are noisy; the fixed validation sample is not"
    first, last = rows(finished, "val")[0], rows(finished, "val")[-1]
    assert last["loss_total"] < 0.85 * first["loss_total"]
    assert [row["step"] for row in rows(finished, "val")] == [0, 20, 40]
    assert [row["step"] for row in rows(finished, "train_eval")] == [0, 20, 40]
    assert last["mpjpe_cam"] < first["mpjpe_cam"]
    expected = {"mpjpe_cam", "mpjpe_rel", "mpjpe_pa", "mpvpe_rel", "root_error", *LOSS_TERMS}
    baseline = {f"{name}_mean_hand" for name in expected - {*LOSS_TERMS}}
    assert expected | baseline <= last.keys()


def test_outputs_of_a_run(finished: Path) -> None:
    lines = [line for line in (finished / "log.txt").read_text().splitlines() if re.match(r"\d+/", line)]
    assert len(lines) == 40
    for line in lines:
        assert LINE.match(line), line
    assert [row["dropout_rate"] for row in rows(finished, "train")] == [0.0] * 20 + [0.1] * 20
    assert "hand_model: standin" in (finished / "config.yaml").read_text()
    assert "hand model: standin" in (finished / "log.txt").read_text()
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["best", "checkpoint-20", "checkpoint-40"]
    assert {p.name for p in (finished / "images").iterdir()} >= {"val_overlay_0000000.jpg", "train_overlay_0000020.jpg"}


def test_same_seed_same_run(place: Path, finished: Path) -> None:
    """A second run with another number of workers writes the same numbers to the last bit."""
    again = stage1(place, "again", "GENERAL.num_worker=0")
    assert (again / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_resume_is_exact(place: Path, finished: Path) -> None:
    """From the checkpoint in the middle, with other workers: the same rows, the same weights, in the same folder."""
    cut = place / "cut" / "2026-01-01" / "00-00-00_stage1-demo"
    shutil.copytree(finished, cut)
    shutil.rmtree(cut / "checkpoints" / "checkpoint-40")
    shutil.rmtree(cut / "checkpoints" / "best")
    resumed = stage1(place, "cut", f"GENERAL.resume_path={cut}", "GENERAL.num_worker=2")
    assert resumed == cut, "it continues in its own folder"
    assert (cut / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    weights, expected = (load_file(run / "checkpoints/checkpoint-40/model.safetensors") for run in (cut, finished))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_older_checkpoint_branches_off(place: Path, finished: Path) -> None:
    before = sorted(p.name for p in finished.rglob("*"))
    branch = stage1(
        place, "branch", f"GENERAL.resume_path={finished}/checkpoints/checkpoint-20", "GENERAL.total_step=21"
    )
    assert finished not in branch.parents
    assert branch != finished
    assert sorted(p.name for p in finished.rglob("*")) == before, "the later steps are untouched"
    assert [row["step"] for row in rows(branch, "train")] == [21]


def test_two_processes_are_one_run(place: Path, finished: Path) -> None:
    """Half the batch on each of two processes: one folder, the same learning rates, the same curve to fp tolerance."""
    launcher = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes=2",
        "--cpu",
        "--mixed_precision=no",
    )
    both = stage1(place, "two", "TRAIN.sample_per_device=4", "GENERAL.num_worker=0", launcher=launcher)
    assert len(list((place / "two").glob("*/*_stage1-demo*"))) == 1
    assert "2 x cpu" in (both / "log.txt").read_text()
    for one, two in zip(rows(finished, "train")[:20], rows(both, "train")[:20], strict=True):
        assert (one["step"], one["lr"], one["dropout_rate"]) == (two["step"], two["lr"], two["dropout_rate"])
        assert two["loss_total"] == pytest.approx(one["loss_total"], rel=2e-3)
    assert rows(both, "train")[0]["loss_total"] == pytest.approx(rows(finished, "train")[0]["loss_total"], rel=1e-5)
    first, reference = rows(both, "val")[0], rows(finished, "val")[0]
    assert first.keys() == reference.keys()
    for name, value in reference.items():
        assert first[name] == pytest.approx(value, rel=1e-5) if name != "subset" else first[name] == value


def refused(place: Path, runs: str, *overrides: str) -> str:
    """The output of a script that fails."""
    with pytest.raises(AssertionError) as error:
        stage1(place, runs, *overrides)
    assert "Traceback" not in str(error.value)
    return str(error.value)


def test_repeated_non_finite_steps_end_the_run(place: Path) -> None:
    """With an absurd learning rate every later step is skipped; the tenth ends the run and can be replayed."""
    said = refused(place, "nan", "TRAIN.lr=1e12", "TRAIN.backbone_lr=1e12")
    assert re.search(r"10 steps in a row .* not finite: .*loss_total.*; every sample: train/\d+\.tar:demo_train", said)
    run = next((place / "nan").glob("*/*_stage1-demo"))
    assert rows(run, "train")[-1]["skipped_step"] == 10
    folder = next(path for path in run.glob("bad_batch-*") if path.is_dir())
    command = [sys.executable, str(ROOT / "script/replay_batch.py"), str(folder), "--device=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
    assert "first module whose output is not finite: backbone" in done.stdout
    assert "loss_total=nan" in done.stdout


def test_auto_resumes_the_newest_complete_checkpoint(place: Path, finished: Path) -> None:
    """If the newest is corrupt it resumes from the one before, in the same folder; a complete run is not touched."""
    run = place / "auto" / "2026-01-01" / "00-00-00_stage1-demo"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "best")  # may be a complete checkpoint of step 40
    weights = run / "checkpoints" / "checkpoint-40" / "model.safetensors"
    expected = weights.read_bytes()
    weights.write_bytes(expected[:-1] + bytes([expected[-1] ^ 1]))
    assert stage1(place, "auto", "GENERAL.resume_path=auto") == run
    assert weights.read_bytes() == expected
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    before = sorted(path.name for path in run.rglob("*"))
    assert stage1(place, "auto", "GENERAL.resume_path=auto") == run
    assert sorted(path.name for path in run.rglob("*")) == before
    said = refused(place, "auto", "GENERAL.resume_path=auto", "DATA.train.source=[val/*]")
    assert f"the newest run, {run}, was trained on different data" in said
    assert "DATA.train.source=['val/*'] in this command, ['train/*'] in the checkpoint" in said
    assert sorted(path.name for path in run.rglob("*")) == before


def test_changed_settings_are_reported(place: Path, finished: Path) -> None:
    """Only those that change what is trained; the number of data workers does not."""
    checkpoint = finished / "checkpoints" / "checkpoint-40"
    overrides = (f"DATA.root={place}/data", "GENERAL.total_step=60", "LOSS.lambda_rel=0.2", "GENERAL.num_worker=0")
    cfg = compose_config("stage1-demo", *SMALL[1:], *overrides)
    assert list(changed_settings(checkpoint, cfg).values()) == [
        "GENERAL.total_step=60 in this command, 40 in the checkpoint",
        "LOSS.lambda_rel=0.2 in this command, 0.1 in the checkpoint",
    ]


def test_another_network_shape_is_refused(place: Path, finished: Path) -> None:
    said = refused(place, "other", f"GENERAL.resume_path={finished}", "MODEL.handec.num_layer=3")
    assert "MODEL.handec.num_layer=3 in this command, 1 in the checkpoint" in said
    assert f"MODEL.init_from={finished}" in said
    assert not (place / "other").exists()
