"""Kill and resume a small demo run again and again, and compare it bit by bit with an undisturbed run.

    python script/torture.py                     20 kills, minutes on two cores
    python script/torture.py --kills 3 --seed 1 --markdown table.md

Each attempt is started by the same command with GENERAL.resume_path=auto and ended by a signal at a seeded random
moment: during start-up, a step, a validation or a checkpoint write. After each kill metrics.jsonl must be a prefix of
the undisturbed run's, and the checkpoint resumed from must equal the undisturbed run's of that step; at the end
metrics, image journal, weights, optimizer and state must be equal. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout, whatever the working directory

import src.utils.environment  # noqa: F401  (checks that required packages are installed)

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT_STEP = 8
STEP_PER_ATTEMPT = 9  # average steps between kills
TIMEOUT = 240.0  # s without progress
STOP_TIMEOUT = 30.0  # s that a stop on request may take
SMALL = (
    "--config-name=stage1-demo",
    "backbone=tiny",
    "DATA.demo={train_sample: 96, val_sample: 40, img_size: 96}",
    "MODEL.img_size=56",
    "MODEL.backbone={hidden_size: 32, num_layer: 2, num_head: 2}",
    "MODEL.handec={dim: 32, num_layer: 1, num_head: 2, dim_head: 16, dim_mlp: 64, dropout: 0.1}",
    "TRAIN.sample_per_device=8",
    "augmentation=light",
    "GENERAL.log_step=1",
    "GENERAL.vis_step=5",
    "GENERAL.warmup_step=5",
    "GENERAL.dropout_warmup_step=10",
    "GENERAL.num_worker=1",
    f"GENERAL.checkpoint_step={CHECKPOINT_STEP}",
)
BY_VALIDATION = {"validation_due", "best_metric", "best_step", "tracker"}  # state that a validation changes
PLACES = ("start-up", "step", "validation", "checkpoint write")
COLUMNS = ("kill", "signal", "interrupted", "resumed from", "ended in", "ok")


class Torture:
    """A reference run and one that is killed, below the folder `work`."""

    def __init__(self, work: Path, kills: int, seed: int) -> None:
        self.work, self.kills, self.rng = work, kills, random.Random(seed)
        self.start_time = 0.0  # of the current attempt
        self.started = 0  # runs so far
        self.total = STEP_PER_ATTEMPT * (kills + 1)
        self.reference = self.run_to_end("reference", "GENERAL.keep_checkpoint=1000")
        self.journal = (self.reference / "metrics.jsonl").read_bytes()

    # ---- processes --------------------------------------------------------------------------------------------------

    def start(self, name: str, *overrides: str) -> tuple[subprocess.Popen, Path]:
        """Start a run with its folders below `work/name`; its output goes to the file that is returned."""
        places = (f"DATA.root={self.work}/data", f"GENERAL.output_root={self.work}/{name}", f"AIM.repo={self.work}")
        settings = (*SMALL, *places, *overrides, f"GENERAL.total_step={self.total}")
        command = [sys.executable, str(ROOT / "script/stage1.py"), *settings]
        self.started += 1
        output = self.work / f"{name}-{self.started}.log"
        where = {"cwd": self.work, "start_new_session": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
        with open(output, "w") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **where), output

    def run_to_end(self, name: str, *overrides: str) -> Path:
        """Run without interruption; returns the run folder."""
        process, output = self.start(name, *overrides)
        if process.wait(TIMEOUT * 2) != 0:
            raise SystemExit(f"the run {name} failed:\n{output.read_text()[-3000:]}")
        return self.folder(name)

    def folder(self, name: str) -> Path | None:
        """The newest run folder below `work/name`."""
        return max((self.work / name).glob("*/*_stage1-demo*"), key=lambda p: p.stat().st_mtime_ns, default=None)

    # ---- one attempt ------------------------------------------------------------------------------------------------

    def attempt(self, number: int) -> tuple[str, ...]:
        """Start, wait for the moment, send the signal, check what is left; returns a cell for each of COLUMNS."""
        place = self.rng.choice(PLACES[1:] if number == 0 else PLACES)
        name = self.rng.choice(("SIGKILL", "SIGKILL", "SIGKILL", "SIGTERM", "SIGUSR1"))
        before, self.start_time = self.steps_done(), time.time()
        process, output = self.start("tortured", "GENERAL.resume_path=auto")
        try:
            self.await_moment(process, place, before)
        finally:
            sent = time.monotonic()
            if process.poll() is None:
                process.send_signal(signal.Signals[name])
            code = process.wait(TIMEOUT)
        seconds, text = time.monotonic() - sent, output.read_text()
        where = self.where(text)
        found = re.search(r"resuming from .*checkpoint-(\d+)", text)
        faults = self.faults(found and found[1])
        if name != "SIGKILL":
            # a signal before Python installs its handlers
            is_early = where == "start-up" and code == -signal.Signals[name]
            if seconds > STOP_TIMEOUT or (code not in (0, 75) and not is_early):
                faults.append(f"ended with {code} after {seconds:.0f} s")
            if "Traceback" in text:  # after SIGKILL data workers may print one: the trainer is gone
                faults.append("a traceback was printed")
        resumed = f"step {found[1]}" if found else "new run"
        return str(number + 1), name, where, resumed, f"{seconds:.1f} s", "; ".join(faults) or "yes"

    def await_moment(self, process: subprocess.Popen, place: str, before: int) -> None:
        """Return at the moment for the signal, or when the run has ended."""
        if place == "start-up":
            time.sleep(self.rng.uniform(0.05, 4.0))
            return
        deadline = time.monotonic() + TIMEOUT
        due = (before // CHECKPOINT_STEP + 1) * CHECKPOINT_STEP
        target = before + self.rng.randint(1, STEP_PER_ATTEMPT) if place == "step" else due
        delay = self.rng.uniform(0.0, 0.02 if place == "step" else 0.003)
        while process.poll() is None:
            if self.writing() if place == "checkpoint write" else self.steps_done() >= target:
                break
            if time.monotonic() > deadline:
                raise SystemExit(f"no progress for {TIMEOUT:.0f} s; see {self.work}/tortured-{self.started}.log")
            time.sleep(0.0005)
        time.sleep(delay)

    def journal_so_far(self) -> bytes:
        """metrics.jsonl of the tortured run."""
        run = self.folder("tortured")
        path = run / "metrics.jsonl" if run else None
        return path.read_bytes() if path and path.exists() else b""

    def rows(self) -> list[dict]:
        """The complete rows of the journal."""
        return [json.loads(line) for line in self.journal_so_far().split(b"\n")[:-1]]

    def writing(self) -> str | None:
        """Name of the checkpoint that this attempt is, or was, writing."""
        run = self.folder("tortured")
        for path in (run / "checkpoints").glob(".tmp-*") if run else ():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime > self.start_time:
                    return path.name.removeprefix(".tmp-")
        return None

    def steps_done(self) -> int:
        """The last step in the journal of the tortured run."""
        return max((row["step"] for row in self.rows()), default=0)

    def where(self, text: str) -> str:
        """What the run was doing when it ended, judged by its files."""
        rows = self.rows()
        if "network:" not in text or not rows:
            return "start-up"
        step = rows[-1]["step"]
        if writing := self.writing():
            return f"write of {writing}, step {step + 1}"
        if rows[-1]["subset"] == "train" and step % CHECKPOINT_STEP == 0 and f"{step}/" in text:
            return f"validation at step {step}"
        return f"step {step + 1}"

    # ---- comparisons ------------------------------------------------------------------------------------------------

    def faults(self, resumed: str | None) -> list[str]:
        """Differences from the undisturbed run: in the journal, and in the checkpoint of the step resumed from."""
        faults = [] if self.journal.startswith(self.journal_so_far()) else ["metrics.jsonl differs"]
        checkpoint = f"checkpoints/checkpoint-{resumed}"
        mine, theirs = self.folder("tortured"), self.reference / checkpoint
        if resumed and (mine / checkpoint).exists() and theirs.exists():
            faults += self.differences(mine / checkpoint, theirs)
        return faults

    def differences(self, mine: Path, theirs: Path) -> list[str]:
        """What differs between two checkpoints: weights, optimizer, state."""
        import torch

        names = []
        if (mine / "model.safetensors").read_bytes() != (theirs / "model.safetensors").read_bytes():
            names.append("weights differ")
        first, second = (torch.load(each / "optimizer.pt", weights_only=True) for each in (mine, theirs))
        if not _equal(first, second):
            names.append("optimizer differs")
        first, second = (json.loads((each / "state.json").read_text()) for each in (mine, theirs))
        if first["validation_due"]:  # written by a stop before a validation that the other one includes
            first, second = ({k: v for k, v in each.items() if k not in BY_VALIDATION} for each in (first, second))
        if first != second:
            names.append(f"state differs: {first} {second}")
        return names

    def final_faults(self) -> list[str]:
        """What differs between the two finished runs."""
        run = self.run_to_end("tortured", "GENERAL.resume_path=auto")
        names = ("metrics.jsonl", "images.jsonl")
        faults = [f"{n} differs" for n in names if (run / n).read_bytes() != (self.reference / n).read_bytes()]
        last = f"checkpoints/checkpoint-{self.total}"
        return faults + self.differences(run / last, self.reference / last)


def _equal(first: object, second: object) -> bool:
    import torch

    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_equal, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and signals (default 0)")
    parser.add_argument("--work", type=Path, help="folder for the runs; default: a temporary one, removed at the end")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        torture = Torture(work, args.kills, args.seed)
        print(f"undisturbed run: {torture.total} steps, {time.monotonic() - start:.0f} s", flush=True)
        attempts = []
        for number in range(args.kills):
            attempts.append(torture.attempt(number))
            print(row(attempts[-1]), flush=True)
        faults = torture.final_faults()
    verdict = "; ".join(faults) or "equal to the undisturbed run, bit by bit"
    summary = f"{args.kills} kills, seed {args.seed}, {time.monotonic() - start:.0f} s: metrics, image journal, "
    summary += f"weights, optimizer and state {verdict}"
    print(summary)
    if args.markdown:
        lines = [row(COLUMNS), "|---" * len(COLUMNS) + "|", *map(row, attempts), "", summary]
        args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if faults or any(attempt[-1] != "yes" for attempt in attempts) else 0


if __name__ == "__main__":
    raise SystemExit(main())
