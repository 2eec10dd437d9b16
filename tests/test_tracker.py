"""The tracker: journals lose no row, and the child process that feeds AIM never blocks or ends the training."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from src.config import AimConfig
from src.tracking.tracker import Tracker, read_object

ROOT = Path(__file__).resolve().parents[1]

QUERY = """
import json, sys
import aim
from aim.storage.context import Context
repo = aim.Repo.from_path(sys.argv[1])
found = []
if sys.argv[2] == "index":
    from aim.sdk.index_manager import RepoIndexManager
    for run_hash in repo.list_all_runs():
        RepoIndexManager.get_index_manager(repo).index(run_hash)
for run in repo.iter_runs():
    points = {}
    for metric in run.metrics():
        steps, (values,) = metric.data.view("val").numpy()
        key = metric.context.to_dict()["subset"] + "/" + metric.name
        points[key] = [[int(s), repr(float(v))] for s, v in sorted(zip(steps, values))]
    images = []
    for info in run.collect_sequence_info("images", skip_last_value=True)["images"]:
        sequence = run.get_image_sequence(info["name"], Context(info["context"]))
        images.append([info["context"]["subset"], info["name"], [int(s) for s in sequence.values.sparse_list()[0]]])
    traces = run.meta_run_tree.get("traces", {}).items()
    last = {run.idx_to_ctx(c).to_dict()["subset"] + "/" + n: [t["last_step"], t.get("max")]
        for c, names in traces for n, t in names.items()}
    found.append(dict(hash=run.hash, last=last, name=run.name, experiment=run.experiment, config=run["config"],
        points=points, images=images, active=run.active))
queried = sum(1 for c in repo.query_metrics("metric.name == 'lr'", report_mode=0).iter_runs())
print(json.dumps(dict(runs=found, queried=queried)))
"""


def in_aim(repo: Path, index: bool = False) -> dict:
    """The content of an AIM repository, read in a new process; `index`: index it first, as a running `aim up` does."""
    command = [sys.executable, "-c", QUERY, str(repo), "index" if index else ""]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def journalled(run: Path) -> dict[str, list]:
    """The journal in the form of QUERY's `points`."""
    points: dict[str, list] = {}
    for row in rows(run):
        step, subset = row.pop("step"), row.pop("subset")
        for name, value in row.items():
            points.setdefault(f"{subset}/{name}", []).append([step, repr(float(value))])
    return points


def tracker_end(run: Path) -> dict[str, int]:
    """The `Tracker.state` at the end of the journals."""
    return {name: (run / name).stat().st_size for name in ("metrics.jsonl", "images.jsonl")}


def start(run: Path, repo: Path, server_url: str | None = None, use_aim: bool = True, **keywords) -> Tracker:
    run.mkdir(exist_ok=True)
    aim, config = AimConfig(server_url=server_url, repo=str(repo), experiment="test"), {"LOSS": {"lambda": [3.0, None]}}
    with contextlib.nullcontext() if use_aim else mock.patch("importlib.util.find_spec", return_value=None):
        return Tracker(run, run_name=run.name, config=config, aim=aim, **keywords)


def fill(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last):
        tracker.log(step, "train", {"lr": 1e-4 / (step + 1), "dropout_rate": 0.0, "loss_total": 1.5 / (step + 1)})
    tracker.log(last, "val", {"mpjpe_cam": float(last)})


@pytest.fixture
def log(caplog, monkeypatch):
    """Log records of the tracker, independent of changes that other tests made to the parent logger."""
    for name in ("stage1.tracker", "stage1.append_file"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "handlers", [caplog.handler])
        caplog.set_level(logging.INFO, logger.name)
        monkeypatch.setattr(logger, "propagate", False)
    return caplog


@pytest.fixture
def silent_server():
    """Accepts every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"aim://127.0.0.1:{server.getsockname()[1]}"


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def test_rows_are_strict_json_with_every_value(tmp_path: Path) -> None:
    tracker = start(tmp_path, tmp_path, use_aim=False)
    tracker.log(0, "val", {"mpjpe_cam": float("nan"), "loss_total": float("inf"), "lr": np.float32(0.5)})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()  # on disk before close
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"step": 0, "subset": "val", "mpjpe_cam": "nan", "loss_total": "inf", "lr": 0.5}
    assert np.isnan(float(row["mpjpe_cam"]))
    tracker.close()
    tracker.close()


def test_cost_of_a_row(tmp_path: Path) -> None:
    tracker = start(tmp_path, tmp_path, use_aim=False)
    begin = time.process_time()
    fill(tracker, 0, 2000)
    assert (time.process_time() - begin) / 2000 < 200e-6  # 7 us on a quiet machine
    tracker.close()


def test_resume_moves_later_rows_to_a_discarded_file(tmp_path: Path) -> None:
    tracker = start(tmp_path, tmp_path, use_aim=False)
    fill(tracker, 0, 5)
    state = tracker.state()
    fill(tracker, 5, 9)
    tracker.close()
    whole = (tmp_path / "metrics.jsonl").read_text()
    for number in (1, 2):
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 99')  # incomplete last line of a killed run
        tracker = start(tmp_path, tmp_path, use_aim=False, resume=state)
        fill(tracker, 5, 9)
        tracker.close()
        assert (tmp_path / "metrics.jsonl").read_text() == whole
        tail = (tmp_path / f"metrics.jsonl.discarded-{number}").read_text()
        assert tail == whole[state["metrics.jsonl"] :] + '{"step": 99'


def test_empty_state_files_after_a_machine_crash(tmp_path: Path, log) -> None:
    for name in ("tracker.json", "aim_state.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    tracker = start(tmp_path, tmp_path / "repo", use_aim=False, resume={"metrics.jsonl": 12})
    tracker.log(2, "train", {"a": 1.0})
    tracker.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert "tracker.json does not parse" in log.text
    assert read_object(tmp_path / "aim_state.json") == {}


def test_without_aim_the_journal_is_kept_with_a_warning(tmp_path: Path, monkeypatch, log) -> None:
    monkeypatch.setattr("src.tracking.tracker.importlib.util.find_spec", lambda name: None)
    tracker = start(tmp_path, tmp_path)
    fill(tracker, 0, 3)
    tracker.close()
    assert len(rows(tmp_path)) == 4
    assert log.text.count("AIM is not installed") == 1


def test_full_disk_delays_rows_and_loses_none(tmp_path: Path, monkeypatch, log) -> None:
    tracker = start(tmp_path, tmp_path, use_aim=False)
    write = os.write
    monkeypatch.setattr("os.write", lambda fd, data: write(fd, data[:9]) if len(data) > 150 else _no_space())
    fill(tracker, 0, 5)
    size = tracker.state()["metrics.jsonl"]
    monkeypatch.undo()
    tracker.close()
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / "metrics.jsonl").stat().st_size == size
    assert log.text.count("cannot be written") == 1


def _no_space() -> int:
    raise OSError(28, "No space left on device")


def test_local_repository_matches_the_journal_after_resumes(tmp_path: Path, log) -> None:
    pytest.importorskip("aim")
    run, repo = tmp_path / "run", tmp_path / "repo"
    tracker = start(run, repo)
    fill(tracker, 0, 20)
    tracker.image(20, "val", "overlay", np.full((32, 48, 3), 200, np.uint8))
    state = tracker.state()
    fill(tracker, 20, 30)
    tracker.log(35, "train", {"lr": 9.0, "only_before_the_resume": 1.0})
    tracker.image(30, "val", "overlay", np.full((32, 48, 3), 9, np.uint8))
    tracker.close()
    hash_before = in_aim(repo)["runs"][0]["hash"]
    tracker = start(run, repo, resume=state)
    fill(tracker, 20, 34)  # other steps: neither 30 of "val" nor 35 of "train" is logged again
    tracker.close()
    tracker = start(run, repo, resume=tracker_end(run))  # nothing is discarded this time
    fill(tracker, 34, 40)
    tracker.log(41, "val", {"mpjpe_cam": float("nan")})
    tracker.close()
    found = in_aim(repo)
    (in_run,) = found["runs"]
    assert in_run["hash"] == hash_before
    assert in_run["points"] == journalled(run)
    assert in_run["images"] == [["val", "overlay", [20]]]
    assert in_run["last"]["val/mpjpe_cam"][0] == 41, "shown in AIM's run table"
    assert in_run["last"]["train/lr"] == [39, max(r["lr"] for r in rows(run) if r["subset"] == "train")]
    assert (in_run["name"], in_run["experiment"], in_run["active"]) == ("run", "test", False)
    assert in_run["config"] == {"LOSS": {"lambda": [3.0, None]}}
    assert found["queried"] == 1
    assert "WARNING" not in log.text


TRAIN_AND_HANG = """
import sys, time
from pathlib import Path
from tests.test_tracker import start, fill
tracker = start(Path(sys.argv[1]), Path(sys.argv[2]), start_timeout=0)
fill(tracker, 0, 1500)
print("filled", flush=True)
time.sleep(60)
"""


def test_sigkill_of_the_trainer_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("aim")
    run, repo = tmp_path / "run", tmp_path / "repo"
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAIN_AND_HANG, str(run), str(repo)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout.readline() == "filled\n"
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()

    def is_finished() -> bool:
        state = json.loads((run / "aim_state.json").read_text()) if (run / "aim_state.json").exists() else {}
        return any(s["offset"]["metrics.jsonl"] == (run / "metrics.jsonl").stat().st_size for s in state.values())

    wait_for(is_finished, 30)
    assert sync(run).returncode == 0  # waits for the child; nothing remains to be sent
    (in_run,) = in_aim(repo)["runs"]
    assert in_run["points"] == journalled(run)


def sync(run: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "script" / "sync_aim.py"), str(run), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_silent_server_costs_at_most_five_seconds_and_sync_completes_aim(tmp_path: Path, log, silent_server) -> None:
    pytest.importorskip("aim")
    run, repo = tmp_path / "run", tmp_path / "repo"
    begin = time.monotonic()
    tracker = start(run, repo, server_url=silent_server)
    assert time.monotonic() - begin < 5.5
    fill(tracker, 0, 50)
    tracker.close()
    assert time.monotonic() - begin < 30
    assert log.text.count("sync_aim.py") == 1
    (in_run,) = in_aim(run / "aim")["runs"]  # the fallback
    assert in_run["points"] == journalled(run)
    assert sync(run).returncode == 1  # still silent
    for _ in range(2):
        assert sync(run, "--repo", str(repo)).returncode == 0
    (in_run,) = in_aim(repo)["runs"]
    assert in_run["points"] == journalled(run)


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_concurrent_runs_create_one_repository(tmp_path: Path, count: int) -> None:
    pytest.importorskip("aim")
    trackers = [start(tmp_path / f"run{i}", tmp_path / "repo", start_timeout=0) for i in range(count)]
    for tracker in trackers:
        fill(tracker, 0, 3)
    for tracker in trackers:
        tracker.close()
    found = in_aim(tmp_path / "repo")
    assert sorted(run["name"] for run in found["runs"]) == [f"run{i}" for i in range(count)]
    assert all(run["points"] == journalled(tmp_path / run["name"]) for run in found["runs"])
    assert found["queried"] == count


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def serve(repo: Path, port: int) -> subprocess.Popen:
    """Start a real `aim server` on loopback and wait until it answers."""
    repo.mkdir(exist_ok=True)
    program = Path(sys.executable).with_name("aim")
    command = [program, "server", "--host", "127.0.0.1", "--port", str(port), "--repo", str(repo), "-y"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=repo
    )

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/status/", timeout=1).status == 200
        except OSError:
            return False

    wait_for(answers, 120)
    return process
