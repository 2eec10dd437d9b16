"""The child process that carries a run's journals to AIM: `python -m src.tracking.aim_child RUN_FOLDER`.

The only file that imports aim. It follows `metrics.jsonl` and `images.jsonl` from the offsets that AIM has acknowledged
(`aim_state.json`, per target), until the trainer closes its pipe or dies; then it empties them, closes the AIM run and
ends. AIM's client can block for ever, so it runs in a thread of its own, the feeder, and the main thread watches: a
server that refuses, is silent or dies is left for a local repository, `RUN_FOLDER/aim`, which gets the whole run.
Points are keyed by step in AIM, so that what is sent twice is stored once. Where a resume threw rows away, the AIM run
is emptied and filled again from the journal: their points would stay where no new ones come at the same steps.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from src.tracking.aim_server import probe_server
from src.tracking.aim_state import acknowledge, acknowledged, has_discarded_rows, read_state, size
from src.tracking.tracker import FALLBACK, HEADER, IMAGES, JOURNALS, METRICS, read_rows
from src.utils.files import try_lock

SERVER_STALL = 20.0  # s without progress after which a server is given up
LOCAL_STALL = 120.0  # s, the same for a local repository (slow network disks)
PATIENT_STALL = 120.0  # s, the same for sync_aim.py
DRAIN_LIMIT = 55.0  # s to empty the journals after the trainer ended; it waits 60 s
POLL = 0.25  # s between two looks at the journals

logger = logging.getLogger("aim_child")


class Feeder(threading.Thread):
    """Opens one AIM run at `target` and feeds it the journals until `ending` is set and they are empty."""

    def __init__(self, run_folder: Path, target: str, ending: threading.Event, say: Callable[..., None]) -> None:
        super().__init__(daemon=True)
        self._run_folder, self._ending, self._say = run_folder, ending, say
        self.target = target
        self._header = json.loads((run_folder / HEADER).read_text(encoding="utf-8"))
        self.is_remote = target.startswith("aim://")
        self.beat = time.monotonic()  # last sign of progress
        self.abandoned = False
        self.error: str | None = None
        self.point = 0  # points tracked

    def run(self) -> None:
        try:
            self._feed()
        except Exception as error:
            logger.exception("%s", self.target)
            self.error = f"{type(error).__name__}: {error}"

    def _feed(self) -> None:
        run, offset = self._open()
        self._say(event="tracking", target=self.target, run_hash=run.hash)
        limit: dict[str, int] | None = None
        while True:
            if limit is None and self._ending.is_set():  # a resumed run may append on while we finish
                limit = {name: size(self._run_folder / name) for name in JOURNALS}
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
        """The aim.Run of this run folder at the target, new or continued, and the journal offsets to go on from."""
        if self.is_remote:
            probe_server(self.target)
        import aim

        repo = aim.Repo.from_path(self.target) if self.is_remote else self._local_repo(aim)
        known = read_state(self._run_folder).get(self.target, {})
        if known and not repo.run_exists(known["run_hash"]):
            known = {}
        run = self._aim_run(aim, repo, known.get("run_hash"))
        offset = acknowledged(self._run_folder, known)
        if has_discarded_rows(known, self._header["cuts"]):
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
        """A killed child leaves AIM's lock behind, hence the force; ours (`_only_child`) allows one child a run."""
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
        """The repository in the folder `target`, made by one process at a time: AIM crashes where two make it.

        One that could not be made, as on a full disk, is taken away again: AIM would refuse it for ever.
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
        """Track the next rows of both journals; returns the offsets after them once AIM has them."""
        from aim import Image

        metrics, metrics_end = read_rows(self._run_folder / METRICS, offset[METRICS], limit.get(METRICS))
        for row in metrics:
            step, context = row.pop("step"), {"subset": row.pop("subset")}
            for name, value in row.items():
                run.track(float(value), name=name, step=step, context=context)
                self.point += 1
        images, images_end = read_rows(self._run_folder / IMAGES, offset[IMAGES], limit.get(IMAGES), count=4)
        for row in images:
            file = self._run_folder / row["file"]
            if file.exists():
                picture = Image(str(file), caption=f"step {row['step']}", format="jpeg", quality=90)
                run.track(picture, name=row["name"], step=row["step"], context={"subset": row["subset"]})
                self.point += 1
        if self.is_remote:
            self._wait_for_arrival(run)
        return {METRICS: metrics_end, IMAGES: images_end}

    def _wait_for_arrival(self, run: Any) -> None:
        """Wait until the server has confirmed all that was tracked; each confirmation is a sign of progress.

        AIM has no public call for either.
        """
        queue = run.repo._client.get_queue()._queue
        left = queue.unfinished_tasks
        while left:
            time.sleep(0.01)
            before, left = left, queue.unfinished_tasks
            if left < before:
                self.beat = time.monotonic()

    def _acknowledge(self, run_hash: str, offset: dict[str, int]) -> None:
        if self.abandoned:
            raise RuntimeError("given up by the watchdog")
        acknowledge(self._run_folder, self.target, run_hash, offset, len(self._header["cuts"]))

    def _index(self, run_hash: str) -> None:
        """Make a finished run visible to queries; otherwise only an open `aim up` would do it."""
        if self.is_remote:
            return
        from aim import Repo
        from aim.sdk.index_manager import RepoIndexManager

        try:
            with self._repo_lock():
                RepoIndexManager.get_index_manager(Repo.from_path(self.target)).index(run_hash)
        except Exception as error:  # an `aim up` that holds the index will do it
            logger.warning("run %s is not indexed: %s", run_hash, error)

    @contextmanager
    def _repo_lock(self) -> Iterator[None]:
        Path(self.target).mkdir(parents=True, exist_ok=True)
        with open(Path(self.target) / ".aim_create.lock", "a") as file:
            while not try_lock(file):
                self.beat = time.monotonic()  # waiting for another run is no stall
                time.sleep(0.05)
            yield


def _empty(run: Any) -> None:
    """Take every point out of an aim.Run, and keep its hash, name, tags and notes. AIM has no public call for it."""
    for context, names in run.meta_run_tree.get("traces", {}).items():
        for name in names:
            for tree in run.series_run_trees.values():
                del tree[context, name]
    for key in ("traces", "typed_traces"):
        del run.meta_run_tree[key]


def carry(
    feeder: Feeder,
    ending: threading.Event,
    has_ended: Callable[[], bool],
    stall: float,
    drain_limit: float = DRAIN_LIMIT,
) -> str | None:
    """Run one feeder under the watchdog. None when everything has arrived, otherwise why not.

    Args: stall, drain_limit: seconds without progress, and after the end of the trainer, that give the target up.
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
            return f"did not take everything within {drain_limit:.0f} s"
        feeder.join(0.1)
    return feeder.error


def follow(run_folder: Path, parent: int, say: Callable[..., None]) -> bool:
    """Feed AIM while the trainer lives, falling back from a server to a local repository. True when all arrived."""

    def has_ended() -> bool:
        return os.getppid() != parent or bool(select.select([sys.stdin], [], [], 0)[0])

    wanted = json.loads((run_folder / HEADER).read_text(encoding="utf-8"))["target"]
    targets = [wanted, str(run_folder / FALLBACK)] if wanted.startswith("aim://") else [wanted]
    ending = threading.Event()
    for target in targets:
        feeder = Feeder(run_folder, target, ending, say)
        reason = carry(feeder, ending, has_ended, SERVER_STALL if feeder.is_remote else LOCAL_STALL)
        if reason is None:
            say(event="closed")
            return True
        say(event="failed", target=target, reason=reason)
    return False


def sync(run_folder: Path, target: str | None) -> bool:
    """Bring what is missing of a run into AIM at `target` (default: where the run wanted to go). Prints the outcome."""
    target = target or json.loads((run_folder / HEADER).read_text(encoding="utf-8"))["target"]
    ending = threading.Event()
    ending.set()
    feeder = Feeder(run_folder, target, ending, lambda **_: None)
    reason = carry(feeder, ending, lambda: True, PATIENT_STALL, drain_limit=math.inf)  # nobody waits for us
    if reason is None:
        run_hash = read_state(run_folder)[target]["run_hash"]
        print(f"{feeder.point} points of {run_folder} brought to AIM at {target}, run {run_hash}")
    else:
        print(f"AIM at {target} failed: {reason}. The journal is whole; try again later.", file=sys.stderr)
    return reason is None


@contextmanager
def _only_child(run_folder: Path, patience: float) -> Iterator[bool]:
    """Hold the run folder's AIM lock; False when another child still has it after `patience` seconds."""
    deadline = time.monotonic() + patience
    with open(run_folder / ".aim_child.lock", "a") as file:
        while not (held := try_lock(file)) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield held


def main() -> bool:
    """Parse the command line and feed AIM. Returns True when everything has arrived."""
    parser = argparse.ArgumentParser(description="Carries the journals of a run folder to AIM.")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--parent", type=int, help="process id of the trainer to follow; without it: sync and end")
    parser.add_argument("--target", help="aim://host:port or the folder of a repository; default: the run's own")
    arguments = parser.parse_args()
    run_folder = arguments.run_folder.resolve()
    logging.getLogger("aim.sdk.lock_manager").setLevel(logging.ERROR)  # warns of each force_resume
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
    if arguments.parent is None:
        with _only_child(run_folder, patience=5.0) as held:
            if not held:
                print(f"{run_folder} is being tracked right now; wait until that run has ended", file=sys.stderr)
            return held and sync(run_folder, arguments.target)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # meant for the trainer; we end when it does
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what AIM prints belongs in the log

    def say(**message: str) -> None:
        with suppress(OSError):  # the trainer may be gone
            pipe.write(json.dumps(message) + "\n")

    with _only_child(run_folder, patience=DRAIN_LIMIT + 15) as held:
        if not held:
            say(event="failed", target="the run folder", reason="another process is feeding this run to AIM")
        return held and follow(run_folder, arguments.parent, say)


if __name__ == "__main__":
    code = 0 if main() else 1
    sys.stdout.flush()
    os._exit(code)  # a feeder that hangs in AIM's client would hold up an ordinary exit for ever
