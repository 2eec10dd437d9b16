"""Training runs on full, read-only or separate disks end with a clear error and lose nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from src.checkpoint.folder import find_checkpoint, verify
from tests.helpers import ROOT
from tests.test_tracker import free_port, in_aim, journalled, sync
from tests.test_training import SMALL

FEW = (
    "GENERAL.total_step=4",
    "GENERAL.warmup_step=0",
    "GENERAL.dropout_warmup_step=2",
    "GENERAL.checkpoint_step=2",
    "GENERAL.vis_step=100000",
    "GENERAL.num_worker=0",
)


def command(place: Path, runs: Path, *overrides: str) -> list[str]:
    places = (f"DATA.root={place}/data", f"GENERAL.output_root={runs}", f"AIM.repo={place}/aim")
    return [sys.executable, str(ROOT / "script/stage1.py"), *SMALL, *FEW, *places, *overrides]


def start(words: list[str], code: int = 0) -> str:
    """Run to the end; returns the output of both streams."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400, check=False)
    assert done.returncode == code, done.stdout[-4000:]
    assert "Traceback" not in done.stdout
    assert "Logging error" not in done.stdout
    return done.stdout


def only_run(runs: Path) -> Path:
    (run,) = runs.glob("*/*_stage1-demo*")
    return run


def train_steps(run: Path) -> list[int]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows if row["subset"] == "train"]


def check_checkpoints(run: Path, *names: str) -> None:
    """Exactly these checkpoints, each complete, and no remains of one that failed."""
    folders = sorted((run / "checkpoints").iterdir())
    assert [f.name for f in folders] == sorted(names)
    for folder in folders:
        verify(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo data and one run of four steps, read-only."""
    place = tmp_path_factory.mktemp("disk")
    start(command(place, place / "first"))
    return place


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """A copy of the four-step run to resume from."""
    shutil.copytree(only_run(place / "first"), copy := tmp_path / "runs/2026-01-01/00-00-00_stage1-demo")
    return copy


def test_full_disk_ends_the_run_and_it_resumes_later(place: Path, run: Path) -> None:
    """A file size limit simulates a full disk without privileges."""
    resume = command(place, run.parents[1], f"GENERAL.resume_path={run}", "GENERAL.total_step=6")
    weights = (run / "checkpoints/checkpoint-4/model.safetensors").stat().st_size
    said = start(["bash", "-c", f'ulimit -f {weights // 2048}; exec "$@"', "_", *resume], code=1)
    assert f"cannot write checkpoint {run}/checkpoints/checkpoint-6" in said
    assert "File too large" in said
    assert f"GENERAL.resume_path={run}" in said
    check_checkpoints(run, "best", "checkpoint-2", "checkpoint-4")
    assert train_steps(run) == [1, 2, 3, 4, 5, 6]

    said = start([*resume, f"AIM.server_url=aim://127.0.0.1:{free_port()}"])  # no server listens there
    assert train_steps(run) == [1, 2, 3, 4, 5, 6]
    assert find_checkpoint(run).name == "checkpoint-6"
    closing = said[said.index("run folder  ") :]
    assert f"python script/sync_aim.py {run}" in closing
    assert f"aim up --repo {run}/aim " in closing
    assert said.count(" failed: ") == 1
    pytest.importorskip("aim")
    assert sync(run, "--repo", f"{run}/later").returncode == 0
    assert in_aim(run / "later")["runs"][0]["points"] == journalled(run)


NAMESPACE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder where a script in NAMESPACE may mount its own disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    probe = [*NAMESPACE, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs in a namespace is not permitted here")
    return folder


def in_namespace(script: str, *words: str | Path, code: int = 0) -> str:
    return start([*NAMESPACE, "bash", "-c", script, "_", *map(str, words)], code)


# room for two checkpoints of 2.8 MB and three images
FULL = """
disk=$1 out=$2; shift 2
mount -t tmpfs -o size=4m tmpfs "$disk" || exit 99
"$@"; code=$?
cp -a "$disk"/. "$out"; exit $code
"""


@pytest.mark.slow
def test_disk_that_fills_up_during_training(place: Path, disk: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    endless = ("GENERAL.total_step=4000", "GENERAL.keep_checkpoint=100")
    said = in_namespace(FULL, disk, out, *command(place, disk, *endless), code=1)
    assert "No space left on device" in said
    assert f"cannot write checkpoint {disk}/" in said
    assert "(0 MiB free there)" in said or "(1 MiB free there)" in said
    run = only_run(out)
    newest = find_checkpoint(run)
    assert f"resume from the checkpoint at step {newest.name.removeprefix('checkpoint-')} " in said
    check_checkpoints(run, "best", *(p.name for p in (run / "checkpoints").glob("checkpoint-*")))
    for name in ("metrics.jsonl", "log.txt"):
        assert said.count(f"{name} cannot be written") <= 1
    steps = [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines(True) if line[-1:] == "\n"
    ]
    assert steps == sorted(steps)
    resumed = start(command(place, out, f"GENERAL.resume_path={run}", f"GENERAL.total_step={steps[-1] + 2}"))
    assert "cannot" not in resumed
    assert train_steps(run) == list(range(1, steps[-1] + 3))


READ_ONLY = """
folder=$1; shift
"$@" & trainer=$!
until compgen -G "$folder/*/*/checkpoints/checkpoint-20/manifest.json" > /dev/null; do sleep 0.1; done
checkpoints=$(echo "$folder"/*/*/checkpoints)
mount --bind "$checkpoints" "$checkpoints" && mount -o remount,bind,ro "$checkpoints" || exit 99
wait $trainer
"""


@pytest.mark.slow
def test_folder_that_becomes_read_only_during_training(place: Path, disk: Path) -> None:
    words = command(place, disk, "GENERAL.total_step=100000", "GENERAL.checkpoint_step=20", "GENERAL.log_step=20")
    said = in_namespace(READ_ONLY, disk, *words, code=1)
    run = only_run(disk)
    assert f"cannot write checkpoint {run}/checkpoints/" in said
    assert "Read-only file system" in said
    assert "make the folder writable" in said
    check_checkpoints(run, *(p.name for p in (run / "checkpoints").glob("[!.]*")))
    assert find_checkpoint(run).name.startswith("checkpoint-")


@pytest.mark.parametrize(
    ("how", "code", "expected"),
    [
        ("ro", 2, "cannot make a run folder below {disk}: Read-only file system"),
        pytest.param("size=4k", 1, "cannot start: [Errno 28] No space left on device", marks=pytest.mark.slow),
    ],
)
def test_output_root_that_cannot_be_written(place: Path, disk: Path, how: str, code: int, expected: str) -> None:
    script = 'mount -t tmpfs -o "$1" tmpfs "$2" || exit 99; shift 2; exec "$@"'
    assert expected.format(disk=disk) in in_namespace(script, how, disk, *command(place, disk), code=code)


SAME_SECOND = """
import sys, time
from pathlib import Path
from src.checkpoint.run_folder import create_run_folder
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
for _ in range(20):
    print(create_run_folder(Path(sys.argv[1]), "demo"))
"""


def test_processes_that_start_in_the_same_second_get_separate_folders(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SAME_SECOND, str(tmp_path), str(time.time() + 2)]
    started = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)]
    folders = [folder for process in started for folder in process.communicate()[0].split()]
    assert len(folders) == len(set(folders)) == 80


@pytest.fixture
def elsewhere(tmp_path: Path):
    """A folder on another file system than `tmp_path`."""
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            if os.stat(folder).st_dev == os.stat(tmp_path).st_dev:
                pytest.skip("/dev/shm is on the same file system here")
            yield Path(folder)
    except FileNotFoundError:
        pytest.skip("no /dev/shm here")


@pytest.mark.slow
def test_checkpoints_on_another_file_system(place: Path, elsewhere: Path, tmp_path: Path) -> None:
    """A run there with every folder name taken; checkpoints moved behind a symlink; its weights as init_from."""
    for second in range(-1, 1800):
        then = datetime.now() + timedelta(seconds=second)
        taken = elsewhere / f"{then:%Y-%m-%d}/{then:%H-%M-%S}_stage1-demo"
        taken.mkdir(parents=True, exist_ok=True)
        (taken / "mine").write_text("")
    start(command(place, elsewhere))
    (run,) = elsewhere.glob("*/*_stage1-demo-2")
    assert all([f.name for f in p.iterdir()] == ["mine"] for p in elsewhere.glob("*/*_stage1-demo"))
    check_checkpoints(run, "best", "checkpoint-2", "checkpoint-4")

    shutil.move(run / "checkpoints", tmp_path / "moved")
    (run / "checkpoints").symlink_to(tmp_path / "moved")
    start(command(place, elsewhere, f"GENERAL.resume_path={run}", "GENERAL.total_step=6"))
    assert train_steps(run) == [1, 2, 3, 4, 5, 6]
    assert find_checkpoint(run).name == "checkpoint-6"

    decoder = "MODEL.handec={dim: 32, num_layer: 2, num_head: 2, dim_head: 16, dim_mlp: 64, dropout: 0.1}"
    start(command(place, tmp_path / "changed", f"MODEL.init_from={run}/checkpoints/checkpoint-2", decoder))
    log = (only_run(tmp_path / "changed") / "log.txt").read_text()
    assert "tensors loaded" in log
    assert " missing: " in log
