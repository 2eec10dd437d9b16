"""Between a launcher and the run: who am I among the processes, and may this job be queued again. Imports no torch.

torchrun tells each process its place (RANK, WORLD_SIZE, ...). Slurm's srun uses other names, and `accelerate launch
--cpu --num_processes N` starts one process where N were asked for; both are brought to torchrun's terms here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping

import psutil

from src.config import ConfigError

_NUM_PROCESSES = re.compile(r"--num[_-]processes(?:=(\d+))?$")
_FIRST_PORT, _NUM_PORT = 20_000, 10_000  # below the range that Linux hands out by itself
REQUEUE = "STAGE1_REQUEUE"  # set to 1 in a Slurm job that may be queued again, as script/train.sbatch does


_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def check_launcher(env: Mapping[str, str]) -> None:
    """Refuse what `accelerate launch` can ask for and this trainer does in its own way: to share out the weights.

    Raises:
        ConfigError: naming it, and what to use in its place. A checkpoint would hold one process's part alone.
    """
    for variable, name in _SHARDING.items():
        if env.get(variable, "").lower() == "true":
            raise ConfigError(
                f"{variable}=true: {name} is not supported as a plugin of Accelerate. Launch without it and spread the "
                f"weights with TRAIN.shard_weights=true; memory is saved by TRAIN.activation_checkpointing=true and a "
                f"smaller TRAIN.sample_per_device with a larger TRAIN.grad_accum_step, too (docs/CLUSTER.md)"
            )


def asked_processes(launcher: list[str]) -> int:
    """N of `--num_processes N` in a launcher's command line, else 1."""
    for index, argument in enumerate(launcher):
        if match := _NUM_PROCESSES.match(argument):
            value = match[1] or (launcher[index + 1] if index + 1 < len(launcher) else "")
            return int(value) if value.isdigit() else 1
    return 1


def start_missing_processes() -> None:
    """Replace this process by torchrun with the number of processes that Accelerate was asked for; else do nothing.

    Accelerate (1.15) leaves several CPU processes to MPI: without a host file it runs the script once and says nothing.
    It does set MASTER_ADDR then, without the WORLD_SIZE that a real launcher sets; that is how it is recognised here.
    """
    env = os.environ
    forgotten = env.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in env and "WORLD_SIZE" not in env
    parent = psutil.Process().parent()
    if not forgotten or parent is None or (number := asked_processes(parent.cmdline())) < 2:
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    os.execv(sys.executable, [*torchrun, *sys.argv])


def adopt_slurm_step() -> None:
    """Give a task that `srun` started, one of several, the variables that torchrun would have given it."""
    os.environ.update(slurm_step(os.environ))


def slurm_step(env: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for a task of a Slurm step.

    Empty outside of Slurm, for a single task, and for the processes of a torchrun that srun started once on each node.
    Only a step's own variables count: the shell of `sbatch` and `salloc` has SLURM_NTASKS, too.
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
        "LOCAL_RANK": str(local % len(visible) if visible else local),  # with --gpus-per-task each sees its own alone
        "MASTER_ADDR": nodes.stdout.split()[0],
        "MASTER_PORT": str(port),
    }


def requeue_slurm_job(signal_name: str | None) -> None:
    """Queue this Slurm job again, if it may be (REQUEUE) and SIGUSR1 has warned it of its end; else do nothing.

    SIGTERM is left alone: it comes from `scancel`, or from a preemption after which Slurm itself queues again.
    """
    env = os.environ
    if signal_name != "SIGUSR1" or env.get(REQUEUE) != "1" or env.get("RANK", "0") != "0" or "SLURM_JOB_ID" not in env:
        return
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    print(f"stage1: queueing job {job} again", file=sys.stderr, flush=True)
    subprocess.run(["scontrol", "requeue", job], check=False)
