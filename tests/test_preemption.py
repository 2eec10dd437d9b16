"""Signals sent to script/stage1.py: it finishes the step, writes a checkpoint and exits with the resumable code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from src.distributed.signals import RESUMABLE
from tests.helpers import ROOT
from tests.test_training import SMALL

GRACE = 30.0  # s that a stop may take
LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preemption")


def start(
    place: Path, runs: str, *overrides: str, launcher: tuple[str, ...] = (sys.executable,)
) -> tuple[subprocess.Popen, Path]:
    """Start a long run in its own session; its output goes to the file that is returned."""
    places = (f"DATA.root={place}/data", f"GENERAL.output_root={place}/{runs}", f"AIM.repo={place}/{runs}")
    command = [*launcher, str(ROOT / "script/stage1.py"), *SMALL, "GENERAL.total_step=100000", *places, *overrides]
    output = place / f"{runs}.txt"
    with open(output, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=place, start_new_session=True, env=environment()
        )
    return process, output


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def await_text(process: subprocess.Popen, output: Path, pattern: str) -> None:
    deadline = time.monotonic() + 180
    while not re.search(pattern, output.read_text(), re.MULTILINE):
        assert process.poll() is None, output.read_text()[-3000:]
        assert time.monotonic() < deadline, f"{pattern} never came:\n{output.read_text()[-3000:]}"
        time.sleep(0.005)


def stop(process: subprocess.Popen, send: Callable[[], None]) -> int:
    sent = time.monotonic()
    send()
    code = process.wait(120)
    assert time.monotonic() - sent < GRACE
    return code


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("SIGTERM", r"^25/"),  # in a step
        ("SIGUSR1", r"^20/"),  # in validation, or in the checkpoint write after it
        ("SIGINT", r"^3/"),  # Ctrl-C reaches the data workers and AIM's child too
        ("SIGTERM", r"^run folder"),  # while starting
    ],
)
def test_a_signal_stops_the_run_with_a_checkpoint(place: Path, name: str, moment: str) -> None:
    runs = f"{name}-{re.sub('[^0-9a-z]', '', moment)}"
    process, output = start(place, runs)
    await_text(process, output, moment)
    number = signal.Signals[name]
    group = name == "SIGINT"
    code = stop(process, lambda: os.killpg(process.pid, number) if group else process.send_signal(number))
    text = output.read_text()
    assert code == RESUMABLE, text[-3000:]
    assert "Traceback" not in text
    assert name in text.splitlines()[-1] or "stopped" in text
    if "stopped before the first step" in text:
        assert moment == "^run folder"
        return
    step = int(re.search(r"stopped after step (\d+)", text)[1])
    run = next((place / runs).glob("*/*_stage1-demo"))
    assert f"GENERAL.resume_path={run}" in text
    assert (run / "checkpoints" / f"checkpoint-{step}" / "manifest.json").exists()


def test_signal_to_one_of_two_processes_stops_both(place: Path) -> None:
    """Both stop at the same step, though only one received the signal."""
    process, output = start(place, "two", "GENERAL.num_worker=0", launcher=LAUNCHER)
    await_text(process, output, r"^25/")
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    worker = next(p for p in ranks if any("stage1.py" in part for part in p.cmdline()))
    stop(process, lambda: worker.send_signal(signal.SIGUSR1))
    text = output.read_text()
    step = int(re.search(r"stopped after step (\d+)", text)[1])
    assert len(list((place / "two").glob(f"*/*_stage1-demo/checkpoints/checkpoint-{step}/manifest.json"))) == 1
    assert set(re.findall(r"exitcode\s*:\s*(\d+)", text)) <= {str(RESUMABLE)}, "no process failed for another reason"


TWICE = """
import time
from src.distributed.signals import StopSignals
signals = StopSignals()
signals.install()
signals.defer()
print("ready", flush=True)
while not signals.requested:
    time.sleep(0.01)
print(signals.requested, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(second: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", TWICE], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    if second == signal.SIGINT:  # the same one soon after is an echo
        time.sleep(0.05)
        process.send_signal(second)
        time.sleep(0.8)
        assert process.poll() is None
    process.send_signal(second)
    assert process.wait(30) == 128 + second


def test_signal_during_start_up_raises() -> None:
    code = TWICE.replace("signals.defer()", "").replace("time.sleep(60)", "")
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert "StopRequested: SIGTERM" in process.communicate(timeout=30)[1]


def test_kill_and_resume_is_exact(tmp_path: Path) -> None:
    """A short run of script/torture.py, which prints the table of docs/RELIABILITY.md."""
    command = [sys.executable, str(ROOT / "script/torture.py"), "--kills", "3", "--seed", "5", "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("| yes |") == 3
    assert "equal to the undisturbed run, bit by bit" in done.stdout


def test_signal_is_held_during_imports() -> None:
    """Raised inside a C extension that is being loaded it would become an ImportError with a traceback."""
    code = """
import os, signal
from src.distributed.signals import StopRequested, StopSignals
signals = StopSignals()
signals.install()
try:
    with signals.hold():
        os.kill(os.getpid(), signal.SIGTERM)
        print("imported")
except StopRequested as stop:
    print("stopped by", stop)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split("\n") == ["imported", "stopped by SIGTERM", ""]
