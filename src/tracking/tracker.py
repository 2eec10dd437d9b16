"""Rank 0's tracker: metrics and images go to journals in the run folder; a child process copies them to AIM.

    metrics.jsonl   one JSON object per line: `step`, `subset`, then metric names. Subsets: "train" (a training step),
                    "val" (validation), "train_eval" (training frames evaluated like validation frames)
    images.jsonl    one JSON object per line: `step`, `subset`, `name`, `file` (relative to the run folder)
    tracker.json    for the child: run name, experiment, config, target, and where resumes have cut the journals
    aim_state.json  written by the child: for each target the AIM run and the journal offsets that have arrived
    aim.log         output of the child and of AIM

The journals are authoritative; AIM holds a copy. Each row is written with a single unbuffered `write`, so a killed
trainer loses nothing, and the trainer never imports aim, whose client can block forever. Non-finite values are written
as the strings "nan", "inf" and "-inf": each line is strict JSON, and `float(value)` reads any metric back.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from src.config import AimConfig
from src.utils.append_file import AppendFile
from src.utils.files import encode_image, write_atomic

logger = logging.getLogger("stage1.tracker")  # below the logger of src/utils/console.py

METRICS, IMAGES = "metrics.jsonl", "images.jsonl"
JOURNALS = (METRICS, IMAGES)
HEADER, CHILD_STATE, CHILD_LOG = "tracker.json", "aim_state.json", "aim.log"
FALLBACK = "aim"  # local repository in the run folder, used when the server fails
_ROOT = Path(__file__).resolve().parents[2]
# overrides that do not describe the run: not part of its name
_UNNAMED = ("AIM.", "GENERAL.seed=", "GENERAL.resume_path=", "GENERAL.output_root=", "GENERAL.description=", "launch=")


def name_run(config_name: str, overrides: Sequence[str], seed: int) -> str:
    """The run's name in AIM, by config, command-line overrides and seed: `stage1-demo TRAIN.lr=1e-3 seed 3`."""
    shown = [text for override in overrides if not (text := override.lstrip("+")).startswith(_UNNAMED)]
    return " ".join([config_name, *shown, f"seed {seed}"])


class Tracker:
    """Journals of one run and the child that feeds AIM; on rank 0 only."""

    def __init__(
        self,
        run_folder: Path,
        *,
        run_name: str,
        config: dict[str, Any],
        aim: AimConfig,
        description: str = "",
        resume: dict[str, int] | None = None,
        start_timeout: float = 5.0,
    ) -> None:
        """Open or continue the journals of `run_folder` and start the child.

        run_name: the name in AIM of a new run; a run folder keeps its first one.
        resume: `Tracker.state()` from the checkpoint that the run resumes from. Rows written after it are moved to
            `<journal>.discarded-<n>` and written again by the resumed run, which continues its AIM run.
        start_timeout: seconds to wait for the child's first message; training starts without it.
        """
        self._run_folder = run_folder = run_folder.resolve()
        before = read_object(run_folder / HEADER)
        self.run_name, cuts = before.get("run_name", run_name), before.get("cuts", [])
        if resume is not None:
            end = {name: resume.get(name, 0) for name in JOURNALS}
            if any(file_size(run_folder / name) > at for name, at in end.items()):
                cuts = [*cuts, end]
        header = {
            "run_name": self.run_name,
            "experiment": aim.experiment,
            "description": description,
            "target": aim.server_url or str(Path(aim.repo).resolve()),
            "config": config,
            "cuts": cuts,
        }
        write_atomic(run_folder / HEADER, json.dumps(header, indent=1, default=str))
        if resume is not None:  # after the header: after a crash in between, the next resume cuts
            for name, at in end.items():
                _cut(run_folder / name, at)
        self._child = None
        if importlib.util.find_spec("aim") is None:
            version = ".".join(map(str, sys.version_info[:2]))
            logger.warning("AIM is not installed (Python %s): metrics are kept in %s alone", version, METRICS)
        else:
            self._child = _Child(run_folder)
            self._child.poll(start_timeout)
        self._journal = {name: AppendFile(run_folder / name) for name in JOURNALS}

    def log(self, step: int, subset: str, metrics: dict[str, float]) -> None:
        """Append one row (about 7 us). `subset` is one of those above; values are Python or numpy numbers."""
        row: dict[str, Any] = {"step": step, "subset": subset}
        for name, value in metrics.items():
            value = float(value)
            row[name] = value if math.isfinite(value) else str(value)
        self._append(METRICS, row)

    def image(self, step: int, subset: str, name: str, image: np.ndarray) -> None:
        """Write `image` [H, W, 3] uint8 RGB as a JPEG to `images/` and append its row."""
        file = Path("images") / f"{subset}_{name}_{step:07d}.jpg"
        encoded = encode_image(image, jpeg_quality=90)
        try:
            (self._run_folder / "images").mkdir(exist_ok=True)
            (self._run_folder / file).write_bytes(encoded)
        except OSError as error:
            logger.warning("image %s could not be written: %s", file, error)
            return
        self._append(IMAGES, {"step": step, "subset": subset, "name": name, "file": str(file)})

    @property
    def is_behind(self) -> bool:
        """Whether AIM has failed and `script/sync_aim.py` is needed to complete it."""
        return self._child is not None and self._child.warned

    def state(self) -> dict[str, int]:
        """Length of each journal in bytes, saved in checkpoints for `resume`."""
        for journal in self._journal.values():
            journal.flush()
        return {name: journal.size for name, journal in self._journal.items()}

    def close(self, timeout: float = 60.0) -> None:
        """Wait up to `timeout` seconds for the child to send the rest to AIM, then end it. Safe to call twice."""
        for journal in self._journal.values():
            journal.close()
        child, self._child = self._child, None
        if child is not None:
            child.close(timeout)

    def _append(self, journal: str, row: dict[str, Any]) -> None:
        self._journal[journal].append(json.dumps(row).encode() + b"\n")
        if self._child is not None:
            self._child.poll(0.0)


class _Child:
    """The process that copies the journals to AIM: polled without blocking, ended in bounded time."""

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder
        self._text = b""
        self.warned = False
        self._closed = False  # the child has reported that everything arrived
        command = [sys.executable, "-m", "src.tracking.aim_child", str(run_folder), str(os.getpid())]
        with open(run_folder / CHILD_LOG, "ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is meant for the trainer
            )

    def poll(self, timeout: float) -> bool:
        """Log the child's messages, waiting at most `timeout` seconds for the first. False once it has ended."""
        if self._process.stdout.closed:
            return False
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            return True
        data = os.read(self._process.stdout.fileno(), 1 << 16)
        if not data:
            self._process.stdout.close()
            if not self._closed:
                self._warn(f"the AIM process ended (see {self._run_folder / CHILD_LOG})")
            return False
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            self._handle(json.loads(line))
        return True

    def _handle(self, message: dict[str, str]) -> None:
        if message["event"] == "tracking":
            logger.info("AIM: tracking to %s as run %s", message["target"], message["run_hash"])
        elif message["event"] == "failed":
            self._warn(f"AIM at {message['target']} failed: {message['reason']}")
        elif message["event"] == "closed":
            self._closed = True

    def _warn(self, reason: str) -> None:
        """Warn once that AIM is incomplete, with the command that completes it."""
        if not self.warned:
            command = f"python script/sync_aim.py {shlex.quote(str(self._run_folder))}"
            logger.warning("%s. %s is complete; copy it to AIM later with: %s", reason, METRICS, command)
        self.warned = True

    def close(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with suppress(OSError):  # the child may have ended already
            self._process.stdin.write(b"end\n")  # closing is not enough: forked data workers hold the pipe open
            self._process.stdin.close()
        while self.poll(max(0.0, deadline - time.monotonic())) and time.monotonic() < deadline:
            pass
        try:
            self._process.wait(max(0.5, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()  # it ignores weaker signals, which are meant for the trainer
            self._process.wait()
            self._warn(f"AIM did not receive everything within {timeout:.0f} s")


def read_rows(path: Path, offset: int, limit: int | None = None, count: int = 256) -> tuple[list[dict], int]:
    """Up to `count` complete lines of a journal from byte `offset` (to byte `limit`), and the offset after them."""
    rows = []
    if path.exists():
        with open(path, "rb") as file:
            file.seek(offset)
            while len(rows) < count and (line := file.readline()).endswith(b"\n"):
                if limit is not None and offset + len(line) > limit:
                    break
                offset += len(line)
                rows.append(json.loads(line))
    return rows, offset


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file, or if a machine crash left one that does not parse."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning("%s does not parse (%s): ignored", path, error)
        return {}
    return value if isinstance(value, dict) else {}


def file_size(path: Path) -> int:
    """Bytes; 0 if there is no file."""
    return path.stat().st_size if path.exists() else 0


def _cut(path: Path, offset: int) -> None:
    """Truncate a journal to `offset` bytes; the rest moves to `<journal>.discarded-<n>`."""
    length = file_size(path)
    if length < offset:
        logger.warning("%s has %d bytes but had %d at the checkpoint: earlier rows are lost", path, length, offset)
    if length <= offset:
        return
    with open(path, "rb+") as file:
        file.seek(offset)
        tail = file.read()
        number = 1
        while (kept := path.with_name(f"{path.name}.discarded-{number}")).exists():
            number += 1
        kept.write_bytes(tail)
        file.truncate(offset)
