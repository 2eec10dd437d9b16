"""Checkpoints and run folders: bit-exact round trip, atomic writes, corrupt folders skipped, no code executed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from src.checkpoint.folder import find_checkpoint
from src.checkpoint.network import init_from
from src.checkpoint.run_folder import create_run_folder, lock_run_folder
from src.checkpoint.save import (
    CheckpointError,
    TrainState,
    find_newest,
    load_checkpoint,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parents[1]


class Net(nn.Module):
    """Three layers, of which two share one weight, and a buffer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.tied = nn.Linear(width, width)
        self.tied.weight = self.first.weight
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.tied(torch.dropout(self.first(x), 0.2, True)))


def make(seed: int = 0) -> tuple[Net, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: Net, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()


def save(run: Path, step: int, **keywords) -> Path:
    model, optimizer = make()
    train(model, optimizer, 1)
    state = TrainState(step=step, config_name="demo")
    return save_checkpoint(run, model=model, optimizer=optimizer, state=state, **keywords)


@pytest.fixture
def log(caplog, monkeypatch):
    """Log records of the checkpoint logger, whatever another test did to its parent."""
    checkpoint_log = logging.getLogger("stage1.checkpoint")
    monkeypatch.setattr(checkpoint_log, "handlers", [caplog.handler])
    monkeypatch.setattr(checkpoint_log, "propagate", False)
    return caplog


def steps_in(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def test_resumed_training_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    model, optimizer = make()
    train(model, optimizer, 3)
    state = TrainState(step=3, data_position=48, best_metric=0.1 + 0.2, best_step=2, tracker={"metrics.jsonl": 7})
    path = save_checkpoint(tmp_path, model=model, optimizer=optimizer, state=state)
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1, "all files have the same permissions"
    torch.manual_seed(5)  # as each step of a run does
    train(model, optimizer, 4)

    other, other_optimizer = make(seed=1)
    loaded = load_checkpoint(path, model=other, optimizer=other_optimizer)
    torch.manual_seed(5)
    train(other, other_optimizer, 4)

    assert loaded == state
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    assert other.tied.weight is other.first.weight
    for mine, theirs in zip(optimizer.state.values(), other_optimizer.state.values()):
        assert all(torch.equal(mine[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 10):
        save(tmp_path, step, keep=2, is_best=step == 1)
    assert steps_in(tmp_path) == ["best", "checkpoint-10", "checkpoint-4"]
    assert find_checkpoint(tmp_path).name == "checkpoint-10"
    best = find_checkpoint(tmp_path / "checkpoints" / "best")
    model, optimizer = make()
    assert load_checkpoint(best, model=model, optimizer=optimizer).step == 1
    save(tmp_path, 6, keep=2, is_best=True)
    assert steps_in(tmp_path) == ["best", "checkpoint-10", "checkpoint-4", "checkpoint-6"], "later steps are kept"
    save(tmp_path, 6, keep=2)  # the same step again replaces it
    assert steps_in(tmp_path) == ["best", "checkpoint-10", "checkpoint-4", "checkpoint-6"]


def test_newest_is_by_stored_step_not_by_name(tmp_path: Path) -> None:
    save(tmp_path, 9)
    save(tmp_path, 12)
    folder = tmp_path / "checkpoints"
    (folder / "checkpoint-12").rename(folder / "kept")
    (folder / "checkpoint-9").rename(folder / "checkpoint-99")
    assert find_checkpoint(folder).name == "kept"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_corrupt_checkpoint_is_skipped_for_the_previous_one(tmp_path: Path, log, name: str, how: str) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "flip":
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()
    assert find_checkpoint(tmp_path).name == "checkpoint-1"
    assert str(file.parent) in log.text
    assert name in log.text or name == "manifest.json"
    with pytest.raises(ValueError, match=r"corrupt|incomplete|cannot be read"):
        find_checkpoint(file.parent)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = save(tmp_path, 1)
    for write in (lambda f: torch.save(Evil(), f), lambda f: f.write_bytes(pickle.dumps(Evil()))):
        write(path / "optimizer.pt")
        manifest = json.loads((path / "manifest.json").read_text())
        data = (path / "optimizer.pt").read_bytes()
        manifest["optimizer.pt"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (path / "manifest.json").write_text(json.dumps(manifest))
        model, optimizer = make()
        with pytest.raises(ValueError, match=r"optimizer\.pt"):
            load_checkpoint(path, model=model, optimizer=optimizer)
        assert not (tmp_path / "ran").exists()


def run_python(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


SAVE_FOR_EVER = """
import sys, itertools
from pathlib import Path
from tests.test_checkpoint import save
for step in itertools.count(int(sys.argv[2])):
    save(Path(sys.argv[1]), step, keep=2, is_best=step % 2 == 0)
    print(step, flush=True)
"""


def test_sigkill_while_saving_leaves_a_loadable_one(tmp_path: Path) -> None:
    generator = random.Random(0)
    first = 1
    for _ in range(2):
        process = run_python(SAVE_FOR_EVER, tmp_path, first)
        done = [int(process.stdout.readline()) for _ in range(4)]
        time.sleep(generator.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        done += [int(line) for line in process.stdout.read().split()]
        process.wait()
        model, optimizer = make()
        for name in ("", "checkpoints/best"):
            step = load_checkpoint(find_checkpoint(tmp_path / name), model=model, optimizer=optimizer).step
            assert done[-1] - 1 <= step <= done[-1] + 1, name
        first = done[-1] + 2


SAVE_WITHOUT_ROOM = """
import resource, sys
from pathlib import Path
from src.checkpoint.save import CheckpointError
from tests.test_checkpoint import save
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    save(Path(sys.argv[1]), 2)
except CheckpointError as error:
    print("refused", error)
"""


@pytest.mark.parametrize("limit", [600, 2500])
def test_full_disk_is_reported_and_costs_no_older_checkpoint(tmp_path: Path, limit: int) -> None:
    save(tmp_path, 1)
    out, _ = run_python(SAVE_WITHOUT_ROOM, tmp_path, limit).communicate(timeout=60)
    assert out.startswith("refused cannot write checkpoint")
    assert str(tmp_path) in out
    assert steps_in(tmp_path) == ["checkpoint-1"]
    assert find_checkpoint(tmp_path).name == "checkpoint-1"


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"GENERAL\.resume_path"):
        save(tmp_path, 1)


def test_wrong_paths_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint at"):
        find_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)


def test_model_that_does_not_fit(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"MODEL\.init_from"):
        load_checkpoint(path, model=Net(width=9))


def test_init_from_reports_what_does_not_fit(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    report = init_from(nn.ModuleDict({"first": nn.Linear(8, 8), "norm": nn.Linear(3, 8)}), path)
    assert report.loaded == 3
    assert report.misshapen == ["norm.weight: file [8] model [8, 3]"]
    assert "norm.running_mean" in report.unexpected
    same = Net()
    report = init_from(same, path)
    assert (report.missing, report.unexpected, report.misshapen) == ([], [], [])
    with pytest.raises(ValueError, match="no tensor"):
        init_from(nn.ModuleDict({"other": nn.Linear(2, 2)}), path)


def test_run_folders_never_collide(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: create_run_folder(tmp_path, "demo"), range(24)))
    assert len(set(folders)) == 24
    assert all(not list(folder.iterdir()) for folder in folders)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="run folder"):
        create_run_folder(tmp_path / "file", "demo")


def test_auto_finds_the_newest_run_of_its_config(tmp_path: Path) -> None:
    assert find_newest(tmp_path, "demo") is None
    for name in ("2026-01-02/09-00-00_demo", "2026-01-02/09-00-00_demo-2", "2026-01-03/08-00-00_demo_other"):
        run = tmp_path / name
        run.mkdir(parents=True)
        save(run, 5)
    expected = tmp_path / "2026-01-02/09-00-00_demo-2/checkpoints/checkpoint-5"
    assert find_newest(tmp_path, "demo") == expected
    shutil.rmtree(expected)
    assert find_newest(tmp_path, "demo") is None


def test_only_one_process_writes_to_a_run(tmp_path: Path) -> None:
    held = lock_run_folder(tmp_path)
    code = "import sys; from pathlib import Path; from src.checkpoint.run_folder import lock_run_folder as f; "
    out, _ = run_python(code + "\ntry: f(Path(sys.argv[1]))\nexcept ValueError as e: print(e)", tmp_path).communicate()
    assert "another process is training" in out
    held.close()
