"""Translates the variables of launchers to those of torchrun, and requeues Slurm jobs. Imports no torch.

torchrun sets RANK, WORLD_SIZE, ... for each process. Slurm's srun uses other names, and `accelerate launch --cpu
--num_processes N` starts one process instead of N; both are translated to torchrun's variables here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping

import psutil

from src.config import ConfigError

_FIRST_PORT, _NUM_PORT = 20_000, 10_000  # below the ephemeral ports of Linux
REQUEUE = "STAGE1_REQUEUE"  # set to 1 in a Slurm job that may be requeued, as script/train.sbatch does


def check_launcher(env: Mapping[str, str]) -> None:
    """Raises ConfigError for the sharding plugins of Accelerate: a checkpoint would hold one process's shard only."""
    for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if env.get(variable, "").lower() == "true":
            raise ConfigError(
                f"{variable}=true: Accelerate's plugins are not supported. Launch without them and shard the "
                f"weights with TRAIN.shard_weights=true; TRAIN.activation_checkpointing=true and a smaller "
                f"TRAIN.sample_per_device with a larger TRAIN.grad_accum_step also save memory (docs/CLUSTER.md)"
            )


def requested_processes(command: list[str]) -> int:
    """N of `--num_processes N` in a launcher's command line, else 1."""
    match = re.search(r"(?:^|\s)--num[_-]processes[= ](\d+)(?:\s|$)", " ".join(command))
    return int(match[1]) if match else 1


def start_missing_processes() -> None:
    """Replace this process by torchrun with the number of processes that Accelerate was asked for; else do nothing.

    Accelerate (1.15) leaves several CPU processes to MPI: without a host file it silently runs the script once. It then
    sets MASTER_ADDR without the WORLD_SIZE that a real launcher sets, which is how the case is recognised.
    """
    env = os.environ
    is_single = env.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in env and "WORLD_SIZE" not in env
    parent = psutil.Process().parent()
    if not is_single or parent is None or (number := requested_processes(parent.cmdline())) < 2:
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    os.execv(sys.executable, [*torchrun, *sys.argv])


def slurm_variables(env: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for one of several tasks that `srun` started.

    Empty outside of Slurm, for a single task, and for the processes of a torchrun that srun started once on each node.
    Only a step's own variables count: the shell of `sbatch` and `salloc` also has SLURM_NTASKS.
    """
    number = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if "WORLD_SIZE" in env or number < 2:
        return {}
    nodes = subprocess.run(
        ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
    )
    visible = [device for device in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    local = int(env["SLURM_LOCALID"])
    port = _FIRST_PORT + (int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % _NUM_PORT
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": str(number),
        "LOCAL_RANK": str(local % len(visible) if visible else local),  # --gpus-per-task shows each task its own GPU
        "MASTER_ADDR": nodes.stdout.split()[0],
        "MASTER_PORT": str(port),
    }


def requeue_slurm_job(signal_name: str | None) -> None:
    """Requeue this Slurm job if it may be (REQUEUE) and SIGUSR1 has warned of its time limit; else do nothing.

    SIGTERM does not requeue: it comes from `scancel`, or from a preemption after which Slurm itself requeues.
    """
    env = os.environ
    if signal_name != "SIGUSR1" or env.get(REQUEUE) != "1" or env.get("RANK", "0") != "0" or "SLURM_JOB_ID" not in env:
        return
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    print(f"stage1: queueing job {job} again", file=sys.stderr, flush=True)
    subprocess.run(["scontrol", "requeue", job], check=False)
