"""The child process that copies a run's journals to AIM: `python -m src.tracking.aim_child RUN_FOLDER TRAINER_PID`.

The only file that imports aim. The child follows `metrics.jsonl` and `images.jsonl` from the offsets that AIM has
acknowledged (`aim_state.json`, per target) until the trainer closes its pipe or dies, sends the remaining rows, closes
the AIM run and exits. AIM's client can block forever, so it runs in a thread, the feeder, which the main thread
watches: if a server refuses, stalls or dies, the whole run goes to a local repository, `RUN_FOLDER/aim`, instead.
AIM keys points by step, so sending a point twice stores it once. If a resume has discarded rows, the AIM run is emptied
and filled again from the journal, since new rows need not overwrite the old points.
"""

from __future__ import annotations

import json
import logging
import math
import os
import select
import shutil
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from src.tracking.tracker import (
    CHILD_STATE,
    FALLBACK,
    HEADER,
    IMAGES,
    JOURNALS,
    METRICS,
    file_size,
    read_object,
    read_rows,
)
from src.utils.files import try_lock, write_atomic

PROBE_TIMEOUT = 3.0  # s for a server's first answer
SERVER_STALL = 20.0  # s without progress after which a server counts as failed
PATIENT_STALL = 120.0  # s, the same for a local repository (slow network disks) and for sync_aim.py
DRAIN_LIMIT = 55.0  # s to send the remaining rows after the trainer has ended; it waits 60 s
POLL = 0.25  # s between two reads of the journals

logger = logging.getLogger("aim_child")


class Feeder(threading.Thread):
    """Opens one AIM run at `target` and sends it the journals until `ending` is set and no rows remain."""

    def __init__(self, run_folder: Path, target: str, ending: threading.Event, report: Callable[..., None]) -> None:
        super().__init__(daemon=True)
        self._run_folder, self._ending, self._report = run_folder, ending, report
        self._state_file = run_folder / CHILD_STATE
        self.target = target
        self._header = json.loads((run_folder / HEADER).read_text(encoding="utf-8"))
        self.is_remote = target.startswith("aim://")
        self.beat = time.monotonic()  # last sign of progress
        self.abandoned = False
        self.error: str | None = None
        self.num_point = 0  # points tracked

    def run(self) -> None:
        try:
            self._feed()
        except Exception as error:
            logger.exception("%s", self.target)
            self.error = f"{type(error).__name__}: {error}"

    def _feed(self) -> None:
        run, offset = self._open()
        self._report(event="tracking", target=self.target, run_hash=run.hash)
        limit: dict[str, int] | None = None
        while True:
            if limit is None and self._ending.is_set():  # a resumed run may already append
                limit = {name: file_size(self._run_folder / name) for name in JOURNALS}
            arrived = self._feed_rows(run, offset, limit or {})
            self.beat = time.monotonic()
            if arrived != offset:
                offset = arrived
                self._acknowledge(run.hash, offset)
            elif limit is not None:
                break
            else:
                self._ending.wait(POLL)
        run_hash = run.hash
        run.close()
        self._index(run_hash)

    def _open(self) -> tuple[Any, dict[str, int]]:
        """The aim.Run of this run folder at the target, new or continued, and the journal offsets to continue from."""
        if self.is_remote:
            probe_server(self.target)
        import aim

        repo = aim.Repo.from_path(self.target) if self.is_remote else self._local_repo(aim)
        known = read_object(self._state_file).get(self.target, {})
        if known and not repo.run_exists(known["run_hash"]):
            known = {}
        run = self._aim_run(aim, repo, known.get("run_hash"))
        offset = {name: known.get("offset", {}).get(name, 0) for name in JOURNALS}
        for name in JOURNALS:
            if offset[name] > file_size(self._run_folder / name):  # the journal has lost rows
                offset[name] = 0
        if known and len(self._header["cuts"]) > known["cuts_seen"]:  # AIM may hold rows that a resume has discarded
            _empty(run)
            run.close()
            run, offset = self._aim_run(aim, repo, known["run_hash"]), dict.fromkeys(JOURNALS, 0)
        if not known:
            run.name = self._header["run_name"]
            run.description = self._header["description"]
        run["config"] = self._header["config"]
        run["run_folder"] = str(self._run_folder)
        self._acknowledge(run.hash, offset)
        return run, offset

    def _aim_run(self, aim: Any, repo: Any, run_hash: str | None) -> Any:
        """`force_resume` because a killed child leaves AIM's lock behind; `_only_child` ensures one child per run."""
        run = aim.Run(
            run_hash=run_hash,
            repo=repo,
            experiment=self._header["experiment"],
            force_resume=run_hash is not None,
            system_tracking_interval=None,
            capture_terminal_logs=False,
            log_system_params=False,
        )
        self.beat = time.monotonic()
        return run

    def _local_repo(self, aim: Any) -> Any:
        """The repository in the folder `target`, created under a lock: AIM crashes if two processes create it.

        A partial one (full disk) is removed, because AIM would never open it.
        """
        with self._repo_lock():
            is_new = not aim.Repo.exists(self.target)
            try:
                return aim.Repo.from_path(self.target, init=is_new)
            except Exception:
                if is_new:
                    shutil.rmtree(Path(self.target) / ".aim", ignore_errors=True)
                raise

    def _feed_rows(self, run: Any, offset: dict[str, int], limit: dict[str, int]) -> dict[str, int]:
        """Send the next rows of both journals; returns the offsets after them once AIM has them."""
        from aim import Image

        metrics, metrics_end = read_rows(self._run_folder / METRICS, offset[METRICS], limit.get(METRICS))
        for row in metrics:
            step, context = row.pop("step"), {"subset": row.pop("subset")}
            for name, value in row.items():
                run.track(float(value), name=name, step=step, context=context)
                self.num_point += 1
        images, images_end = read_rows(self._run_folder / IMAGES, offset[IMAGES], limit.get(IMAGES), count=4)
        for row in images:
            file = self._run_folder / row["file"]
            if file.exists():
                image = Image(str(file), caption=f"step {row['step']}", format="jpeg", quality=90)
                run.track(image, name=row["name"], step=row["step"], context={"subset": row["subset"]})
                self.num_point += 1
        if self.is_remote:
            self._wait_for_arrival(run)
        return {METRICS: metrics_end, IMAGES: images_end}

    def _wait_for_arrival(self, run: Any) -> None:
        """Wait until the server has confirmed every point; each confirmation counts as progress."""
        queue = run.repo._client.get_queue()._queue  # AIM has no public API for this
        left = queue.unfinished_tasks
        while left:
            time.sleep(0.01)
            before, left = left, queue.unfinished_tasks
            if left < before:
                self.beat = time.monotonic()

    def _acknowledge(self, run_hash: str, offset: dict[str, int]) -> None:
        """Record in `aim_state.json` that AIM has every row before `offset` and reflects every cut so far."""
        if self.abandoned:
            raise RuntimeError("stopped by the watchdog")
        known = {"run_hash": run_hash, "offset": offset, "cuts_seen": len(self._header["cuts"])}
        state = read_object(self._state_file) | {self.target: known}
        write_atomic(self._state_file, json.dumps(state, indent=1))

    def _index(self, run_hash: str) -> None:
        """Index a finished run so that queries find it; otherwise only a running `aim up` would do so."""
        if self.is_remote:
            return
        from aim import Repo
        from aim.sdk.index_manager import RepoIndexManager

        try:
            with self._repo_lock():
                RepoIndexManager.get_index_manager(Repo.from_path(self.target)).index(run_hash)
        except Exception as error:  # a running `aim up` that holds the index will index it
            logger.warning("run %s was not indexed: %s", run_hash, error)

    @contextmanager
    def _repo_lock(self) -> Iterator[None]:
        Path(self.target).mkdir(parents=True, exist_ok=True)
        with open(Path(self.target) / ".aim_create.lock", "a") as file:
            while not try_lock(file):
                self.beat = time.monotonic()  # waiting for another run is not a stall
                time.sleep(0.05)
            yield


def _empty(run: Any) -> None:
    """Delete every point of an aim.Run but keep its hash, name, tags and notes. AIM has no public API for this."""
    for context, names in run.meta_run_tree.get("traces", {}).items():
        for name in names:
            for tree in run.series_run_trees.values():
                del tree[context, name]
    for key in ("traces", "typed_traces"):
        del run.meta_run_tree[key]


def probe_server(target: str) -> None:
    """Request the status of the server at `aim://host:port`, since AIM's own client can wait forever for an answer.

    Raises OSError if the connection is refused, or if there is no answer within PROBE_TIMEOUT.
    """
    for scheme in ("http", "https"):
        try:
            urllib.request.urlopen(target.replace("aim", scheme, 1).rstrip("/") + "/status/", timeout=PROBE_TIMEOUT)
            return
        except urllib.error.HTTPError:
            return  # it answers, whatever the status
        except OSError as error:  # URLError among them
            failure = getattr(error, "reason", error)
            if isinstance(failure, TimeoutError):
                raise TimeoutError(f"no answer within {PROBE_TIMEOUT:.0f} s") from error
    raise OSError(str(failure))


def watch(
    feeder: Feeder,
    ending: threading.Event,
    has_ended: Callable[[], bool],
    stall: float,
    drain_limit: float = DRAIN_LIMIT,
) -> str | None:
    """Run one feeder under a watchdog. Returns None once everything has arrived, else the reason for giving up.

    Args: stall, drain_limit: maximum seconds without progress, and after the end of the trainer.
    """
    feeder.start()
    deadline = None
    while feeder.is_alive():
        if not ending.is_set() and has_ended():
            ending.set()
        if ending.is_set() and deadline is None:
            deadline = time.monotonic() + drain_limit
        if time.monotonic() - feeder.beat > stall:
            feeder.abandoned = True
            return f"no answer for {stall:.0f} s"
        if deadline is not None and time.monotonic() > deadline:
            feeder.abandoned = True
            return f"did not receive everything within {drain_limit:.0f} s"
        feeder.join(0.1)
    return feeder.error


def follow(run_folder: Path, parent: int, report: Callable[..., None]) -> bool:
    """Feed AIM while the trainer runs; a failed server is replaced by a local repository. True if all rows arrived."""

    def has_ended() -> bool:
        return os.getppid() != parent or bool(select.select([sys.stdin], [], [], 0)[0])

    wanted = json.loads((run_folder / HEADER).read_text(encoding="utf-8"))["target"]
    targets = [wanted, str(run_folder / FALLBACK)] if wanted.startswith("aim://") else [wanted]
    ending = threading.Event()
    for target in targets:
        feeder = Feeder(run_folder, target, ending, report)
        reason = watch(feeder, ending, has_ended, SERVER_STALL if feeder.is_remote else PATIENT_STALL)
        if reason is None:
            report(event="closed")
            return True
        report(event="failed", target=target, reason=reason)
    return False


def sync(run_folder: Path, target: str | None) -> bool:
    """Send the missing rows of a run to AIM at `target` (default: the run's own) and print the outcome.

    Returns True if everything has arrived. End the process with `exit_now` afterwards.
    """
    target = target or json.loads((run_folder / HEADER).read_text(encoding="utf-8"))["target"]
    ending = threading.Event()
    ending.set()
    with _only_child(run_folder, patience=5.0) as held:
        if not held:
            print(f"{run_folder} is being tracked by its run; wait until that run has ended", file=sys.stderr)
            return False
        feeder = Feeder(run_folder, target, ending, lambda **_: None)
        reason = watch(feeder, ending, lambda: True, PATIENT_STALL, drain_limit=math.inf)  # no process waits for us
    if reason is None:
        run_hash = read_object(run_folder / CHILD_STATE)[target]["run_hash"]
        print(f"{feeder.num_point} points of {run_folder} copied to AIM at {target}, run {run_hash}")
    else:
        print(f"AIM at {target} failed: {reason}. The journal is complete; try again later.", file=sys.stderr)
    return reason is None


@contextmanager
def _only_child(run_folder: Path, patience: float) -> Iterator[bool]:
    """Hold the run folder's AIM lock; yields False if another child still holds it after `patience` seconds."""
    deadline = time.monotonic() + patience
    with open(run_folder / ".aim_child.lock", "a") as file:
        while not (held := try_lock(file)) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield held


def main(run_folder: Path, trainer: int) -> bool:
    """Feed AIM until the process `trainer` closes our stdin or ends. Returns True if everything has arrived."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # meant for the trainer; this process ends with it
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # AIM's output goes to the log

    def report(**message: str) -> None:
        with suppress(OSError):  # the trainer may have died
            pipe.write(json.dumps(message) + "\n")

    with _only_child(run_folder, patience=DRAIN_LIMIT + 15) as held:
        if not held:
            report(event="failed", target="the run folder", reason="another process is feeding this run to AIM")
        return held and follow(run_folder, trainer, report)


def exit_now(is_complete: bool) -> NoReturn:
    """Exit with code 0 or 1. A normal exit would wait forever for a feeder that hangs in AIM's client."""
    sys.stdout.flush()
    os._exit(0 if is_complete else 1)


logging.getLogger("aim.sdk.lock_manager").setLevel(logging.ERROR)  # warns about each force_resume
if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
    exit_now(main(Path(sys.argv[1]), int(sys.argv[2])))
