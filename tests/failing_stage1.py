"""script/stage1.py with an injected fault: `FAULT=<kind>:<rank>:<step>` fails one process at the start of one step.

Kinds: error (an unexpected exception), data (BadDataError), kill (SIGKILL), busy (as error, while the other process
computes for 3 s before it can notice). Only once: nothing happens after a restart.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.data.health import BadDataError  # noqa: E402  (after the path)
from src.train.run import Run  # noqa: E402

KIND, RANK, STEP = os.environ["FAULT"].split(":")
take_step = Run.step


def step(run: Run, *args: object) -> object:
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    is_here = os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == RANK
    if KIND == "busy" and not is_here and run.state.step == int(STEP):
        end = time.monotonic() + 3.0
        while time.monotonic() < end:
            time.sleep(0.05)
    if first and is_here and run.state.step == int(STEP):
        if KIND == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"error": RuntimeError, "busy": RuntimeError, "data": BadDataError}[KIND]("the fault of this test")
    return take_step(run, *args)


Run.step = step

runpy.run_path(str(ROOT / "script/stage1.py"), run_name="__main__")
