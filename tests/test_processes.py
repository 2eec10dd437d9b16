"""Several processes are one run: the same curve, a restart after a kill, one report of a failure, two nodes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.progress import Progress
from safetensors.torch import load_file

from src.config import ConfigError
from src.data.demo.make import make_demo_data
from src.data.order.plan import SourcePlan
from src.data.shards.build_index import open_indexes
from src.data.shards.index import ShardIndex
from src.data.shards.paths import resolve_source
from src.distributed import exit as exits
from src.distributed.launch import check_launcher, requested_processes, requeue_slurm_job, slurm_variables
from tests.helpers import ROOT, compose_config

SMALL = (
    "--config-name=stage1-demo",
    "backbone=tiny",
    "DATA.demo.train_sample=96",
    "DATA.demo.val_sample=20",
    "DATA.demo.img_size=96",
    "MODEL.img_size=56",
    "MODEL.backbone.hidden_size=32",
    "MODEL.backbone.num_layer=2",
    "MODEL.backbone.num_head=2",
    "MODEL.handec={dim: 32, num_layer: 1, num_head: 2, dim_head: 16, dim_mlp: 64, dropout: 0.0}",
    "GENERAL.total_step=20",
    "GENERAL.warmup_step=5",
    "GENERAL.dropout_warmup_step=8",
    "GENERAL.checkpoint_step=5",
    "GENERAL.log_step=1",
    "GENERAL.vis_step=1000",
)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--mixed_precision=no")
DROPOUT = "MODEL.handec.dropout=0.1"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's shards; one image in each is corrupted after indexing."""
    place = tmp_path_factory.mktemp("processes")
    cfg = compose_config("stage1-demo", *SMALL[1:], f"DATA.root={place}/data")
    make_demo_data(cfg, Progress(disable=True))
    for section, position in ((cfg.DATA.train, 20), (cfg.DATA.val, 7)):  # training reads it in step 3
        (index,) = open_indexes(resolve_source(cfg.DATA.root, section.source))
        corrupt(index, SourcePlan([index], 1, cfg.GENERAL.seed).locate(position)[1])
    return place


def corrupt(index: ShardIndex, row: int) -> None:
    """Flip a bit in the image of a row and keep the shard's modification time."""
    tables, stat, data = index.tables(), index.shard.stat(), bytearray(index.shard.read_bytes())
    data[int(tables.sample["offset"][row]) + int(tables.frame["begin"][row]) + 300] ^= 1
    index.shard.write_bytes(data)
    os.utime(index.shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def command(place: Path, runs: str, *overrides: str, launcher: tuple[str, ...], script: str) -> list[str]:
    places = (f"DATA.root={place}/data", f"GENERAL.output_root={place}/{runs}", f"AIM.repo={place}/{runs}")
    return [*launcher, str(ROOT / script), *SMALL, *places, *overrides]


def start(
    place: Path,
    runs: str,
    *overrides: str,
    launcher: tuple[str, ...] = (sys.executable,),
    script: str = "script/stage1.py",
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Run the script with all folders below `place`; standard error is merged into the output."""
    return subprocess.run(
        command(place, runs, *overrides, launcher=launcher, script=script),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        timeout=400,
        check=False,
    )


def finish(place: Path, runs: str, *overrides: str, **how: object) -> Path:
    """The folder of the only run, which must succeed."""
    done = start(place, runs, *overrides, **how)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "FutureWarning" not in done.stdout  # torch also warns about strides with one sample a process
    (folder,) = (place / runs).glob("*/*_stage1-demo*")
    return folder


def rows(run: Path, subset: str = "train") -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["subset"] == subset]


def assert_same_curve(run: Path, other: Path) -> None:
    """Every loss term within 1e-5 and the learning rate to the last bit, over 20 steps; the same corruption counts."""
    assert len(rows(run)) == len(rows(other)) == 20
    for one, two in zip(rows(run), rows(other), strict=True):
        assert one["lr"] == two["lr"]
        for name in (name for name in one if name.startswith("loss_")):
            assert two[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)
    for each in (run, other):
        assert [row.get("bad_crc_image", 0) for row in rows(each)] == [0] * 2 + [1] * 12 + [2] * 6, "of two epochs"
        assert [row["bad_crc_image"] for row in rows(each, "val")] == [1] * 5
    first, second = (checkpoint_health(each) for each in (run, other))
    assert first == second
    assert bad_frame_lines(run) == bad_frame_lines(other)
    assert len(bad_frame_lines(run)) == 12, "2 of training, 5 of validation, 5 of the training sample"
    assert first["num_read"] == 160
    assert next(text.rpartition(" ")[2] for text in first["example"]) == "20"


def bad_frame_lines(run: Path) -> list[str]:
    """The warnings in log.txt, whichever process read the frame."""
    return sorted(line for line in (run / "log.txt").read_text().splitlines() if line.startswith("bad frame: "))


def checkpoint_health(run: Path) -> dict:
    """The corruption counts in the last checkpoint."""
    return json.loads((run / "checkpoints/checkpoint-20/state.json").read_text())["extra"]["health"]


def torchrun(number: int, *options: str) -> tuple[str, ...]:
    return (*TORCHRUN, "--standalone", f"--nproc_per_node={number}", *options)


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """20 steps of 8 samples in one process."""
    return finish(place, "alone", "TRAIN.sample_per_device=8")


@pytest.mark.parametrize(
    ("launcher", "number", "sample", "accumulate"),
    [
        ("torchrun", 2, 2, 2),
        ("accelerate", 4, 2, 1),
        pytest.param("torchrun", 2, 4, 1, marks=pytest.mark.slow),
        pytest.param("torchrun", 4, 1, 2, marks=pytest.mark.slow),
        pytest.param("accelerate", 2, 1, 4, marks=pytest.mark.slow),
    ],
)
def test_curve_is_the_same_for_any_number_of_processes(
    place: Path, alone: Path, launcher: str, number: int, sample: int, accumulate: int
) -> None:
    """The global batch is 8 samples however it is split. No dropout: each process seeds its own masks."""
    start_with = torchrun(number) if launcher == "torchrun" else (*ACCELERATE, f"--num_processes={number}")
    cut = (f"TRAIN.sample_per_device={sample}", f"TRAIN.grad_accum_step={accumulate}")
    many = finish(place, f"{launcher}-{number}-{sample}", *cut, launcher=start_with)
    assert f"{number} x cpu" in (many / "log.txt").read_text()
    assert_same_curve(alone, many)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_worker_is_restarted(place: Path, rank: int) -> None:
    """SIGKILL at step 13; torchrun restarts both, they resume from step 10 and end with the same result."""
    cut = (DROPOUT, "TRAIN.sample_per_device=4", "GENERAL.resume_path=auto", "GENERAL.num_worker=1")
    undisturbed = finish(place, f"undisturbed-{rank}", *cut, launcher=torchrun(2))
    runs = f"killed-{rank}"
    restarting = torchrun(2, "--max-restarts=2")
    done = start(place, runs, *cut, launcher=restarting, script="tests/failing_stage1.py", FAULT=f"kill:{rank}:13")
    assert done.returncode == 0, done.stdout[-6000:]
    assert "resuming from" in done.stdout
    (killed,) = (place / runs).glob("*/*_stage1-demo*")
    assert (killed / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    weights, expected = (
        load_file(run / "checkpoints/checkpoint-20/model.safetensors") for run in (killed, undisturbed)
    )
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("data", "BadDataError"),
        pytest.param("error", "RuntimeError: the fault of this test", marks=pytest.mark.slow),
        pytest.param("kill", "Signal 9 (SIGKILL) received by PID", marks=pytest.mark.slow),
        pytest.param("busy", "RuntimeError: the fault of this test", marks=pytest.mark.slow),
    ],
)
def test_one_failure_ends_all_processes(place: Path, kind: str, cause: str) -> None:
    """Within 25 s of the fault (torchrun kills after 30), with the cause reported once, in the last lines."""
    how = {"launcher": torchrun(2), "script": "tests/failing_stage1.py", "FAULT": f"{kind}:1:3"}
    cause = "stopped at step 3: the fault of this test" if kind == "data" else cause
    done = start(place, f"fails-{kind}", "TRAIN.sample_per_device=4", **how)
    ended = time.time()
    assert done.returncode == 1
    assert done.stdout.count(cause) == 1, done.stdout
    assert cause in "\n".join(done.stdout.splitlines()[-12:])
    assert done.stdout.count("Traceback") == (2 if kind in ("error", "busy") else 1), "one is the launcher's"
    (run,) = (place / f"fails-{kind}").glob("*/*_stage1-demo*")
    assert ended - (run / "metrics.jsonl").stat().st_mtime < 25
    if kind != "kill":
        assert "the fault of this test" in (run / "log.txt").read_text()


def test_no_wait_for_a_second_signal(as_worker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "_await_termination", lambda _: pytest.fail("it waited"))
    monkeypatch.setattr(exits.os, "_exit", sys.exit)
    (as_worker.parent.parent / "reported").touch()
    with pytest.raises(SystemExit, match="1"):
        exits.exit_after_peer("lost", stop_requested=True)


def test_invalid_configuration_is_reported_once(place: Path) -> None:
    done = start(place, "refused", "TRAIN.lr=fast", launcher=torchrun(2, "--max-restarts=1"))
    assert done.returncode == 1
    assert done.stdout.count("TRAIN.lr=fast") == 1, done.stdout
    assert "TRAIN.lr=fast" in "\n".join(done.stdout.splitlines()[-4:])
    assert not (place / "refused").exists()


# ---- launchers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        (["accelerate", "launch", "--num_processes", "2", "--cpu"], 2),
        (["accelerate", "launch", "--cpu", "--num-processes=4"], 4),
        (["accelerate", "launch", "--cpu"], 1),
        (["accelerate", "launch", "--num_processes"], 1),
    ],
)
def test_requested_processes(launcher: list[str], number: int) -> None:
    assert requested_processes(launcher) == number


def test_accelerate_plugins_are_refused() -> None:
    check_launcher({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_CPU": "true"})
    with pytest.raises(ConfigError, match="ACCELERATE_USE_FSDP=true: Accelerate's plugins are not supported"):
        check_launcher({"ACCELERATE_USE_FSDP": "true"})


def test_the_giant_is_composed() -> None:
    cfg = compose_config("stage1-dino_giant")
    assert (cfg.MODEL.backbone.hidden_size, cfg.MODEL.backbone.swiglu) == (1536, True)
    assert cfg.TRAIN.activation_checkpointing
    assert cfg.TRAIN.sample_per_device * cfg.TRAIN.grad_accum_step == 32, "the recipe's batch on each device"


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake scontrol that knows two nodes and records its arguments."""
    program = tmp_path / "scontrol"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$1" = show ] && printf "gpu07\\ngpu08\\n"; exit 0\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "calls"


STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_tasks_of_srun_find_each_other(scontrol: Path) -> None:
    place = slurm_variables(STEP)
    assert (place["RANK"], place["WORLD_SIZE"], place["LOCAL_RANK"]) == ("3", "4", "1")
    assert (place["MASTER_ADDR"], place["MASTER_PORT"]) == ("gpu07", "24711")
    assert slurm_variables(STEP | {"CUDA_VISIBLE_DEVICES": "1"})["LOCAL_RANK"] == "0", "it sees only its own GPU"
    assert slurm_variables(STEP | {"CUDA_VISIBLE_DEVICES": "0,1"})["LOCAL_RANK"] == "1"


def test_other_processes_under_slurm_keep_their_variables() -> None:
    assert slurm_variables({}) == {}
    assert slurm_variables({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == {}, "the shell of sbatch"
    assert slurm_variables(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    assert slurm_variables(STEP | {"WORLD_SIZE": "8"}) == {}, "torchrun, once on each node"


def test_job_is_requeued_on_request(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "4711", "STAGE1_REQUEUE": "1"}.items():
        monkeypatch.setenv(name, value)
    requeue_slurm_job(None)
    requeue_slurm_job("SIGTERM")  # scancel
    assert not scontrol.exists()
    requeue_slurm_job("SIGUSR1")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    requeue_slurm_job("SIGUSR1")
    monkeypatch.setenv("RANK", "1")
    requeue_slurm_job("SIGUSR1")
    assert scontrol.read_text() == "requeue 4711\nrequeue 4700_2\n"


def test_a_sweep_on_slurm_is_composed() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra [slurm] is not installed")
    with initialize_config_dir(str(ROOT / "config"), version_base="1.3"):
        cfg = compose("stage1-dino_large", ["+launch=slurm", "hydra.launcher.nodes=2"], return_hydra_config=True)
    launcher = OmegaConf.to_container(cfg.hydra.launcher, resolve=False)
    assert launcher["_target_"].endswith("SlurmLauncher")
    assert (launcher["nodes"], launcher["tasks_per_node"], launcher["gpus_per_node"]) == (2, 8, 8)
    assert launcher["additional_parameters"]["signal"] == f"USR1@{launcher['signal_delay_s']}"
    assert "export STAGE1_REQUEUE=1" in launcher["setup"]
    assert cfg.GENERAL.resume_path == "auto"


@pytest.fixture
def as_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes this process a torchrun worker with one restart left."""
    error_file = tmp_path / "attempt_0" / "1" / "error.json"
    error_file.parent.mkdir(parents=True)
    for name, value in {"ERROR_FILE": str(error_file), "RESTART_COUNT": "0", "MAX_RESTARTS": "1"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    return error_file


def test_failure_is_reported_once(
    as_worker: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(exits, "_await_termination", waited.append)
    with pytest.raises(SystemExit, match="3"):
        exits.exit_with_error("first", 3)
    assert capfd.readouterr().err == "first\n", "torchrun restarts it and reports nothing"
    assert not as_worker.exists()
    with pytest.raises(SystemExit):
        exits.exit_with_error("second", 3)
    assert capfd.readouterr().err == ""
    assert waited == [exits.LAUNCHER_GRACE]
    (as_worker.parent.parent / "reported").unlink()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(SystemExit):
        exits.exit_with_error("last", 3)
    assert capfd.readouterr().err == ""
    assert json.loads(as_worker.read_text())["message"]["message"] == "last"


# ---- two nodes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_nodes() -> Iterator[list[tuple[str, str, str]]]:
    """(network namespace, its interface, its address) twice, joined by a cable."""
    names = [f"stage1-{os.getpid()}-{side}" for side in "ab"]
    nodes = [(name, f"veth{side}", f"10.77.0.{side + 1}") for side, name in enumerate(names)]
    cable = ["link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth1", "netns", names[1]]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(*cable)
        for name, interface, address in nodes:
            ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            for each in ("lo", interface):
                ip("-n", name, "link", "set", each, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    else:
        yield nodes
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_two_nodes_are_one_run(place: Path, alone: Path, two_nodes: list[tuple[str, str, str]]) -> None:
    """torchrun in each of two network namespaces that are connected only to each other."""
    master = two_nodes[0][2]
    processes = []
    for rank, (name, interface, address) in enumerate(two_nodes):
        options = (f"--node_rank={rank}", "--rdzv_backend=c10d", f"--rdzv_endpoint={master}:29411", "--rdzv_id=two")
        torch_run = (*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", *options, f"--local_addr={address}")
        launcher = ("ip", "netns", "exec", name, *torch_run, f"--rdzv_conf=is_host={rank == 0}")
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
        arguments = command(place, "nodes", "TRAIN.sample_per_device=4", launcher=launcher, script="script/stage1.py")
        processes.append(
            subprocess.Popen(arguments, env=env, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    for process in processes:
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output.decode()[-4000:]
    (run,) = (place / "nodes").glob("*/*_stage1-demo*")
    assert "2 x cpu" in (run / "log.txt").read_text()
    assert_same_curve(alone, run)
    sent = ip("-n", two_nodes[0][0], "-s", "link", "show", two_nodes[0][1]).split("TX:")[1]
    assert int(re.findall(r"\d+", sent)[0]) > 100_000, "gradients went through the cable"
