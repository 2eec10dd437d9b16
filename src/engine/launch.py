"""Starts the processes that `accelerate launch --cpu --num_processes N` was asked for and does not start.

Accelerate (1.15) leaves several CPU processes to MPI: without a host file it runs the script once and says nothing. It
does set MASTER_ADDR then, without the WORLD_SIZE that a real launcher sets; that is how it is recognised here.
"""

from __future__ import annotations

import os
import re
import sys

import psutil

_NUM_PROCESSES = re.compile(r"--num[_-]processes(?:=(\d+))?$")


def asked_processes(launcher: list[str]) -> int:
    """N of `--num_processes N` in a launcher's command line, else 1."""
    for index, argument in enumerate(launcher):
        if match := _NUM_PROCESSES.match(argument):
            value = match[1] or (launcher[index + 1] if index + 1 < len(launcher) else "")
            return int(value) if value.isdigit() else 1
    return 1


def start_missing_processes() -> None:
    """Replace this process by torchrun with the number of processes that Accelerate was asked for; else do nothing."""
    env = os.environ
    forgotten = env.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in env and "WORLD_SIZE" not in env
    parent = psutil.Process().parent()
    if not forgotten or parent is None or (number := asked_processes(parent.cmdline())) < 2:
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    os.execv(sys.executable, [*torchrun, *sys.argv])
