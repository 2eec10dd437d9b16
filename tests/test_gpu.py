"""What only a GPU can show: a step that never syncs, checkpoints beside training, precision, compilation.

    .venv/bin/python -m pytest -m gpu

STAGE1_GPU_TESTS=cpu runs the same code on a machine without a GPU, which only checks the tests themselves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch._dynamo.testing import CompileCounterWithBackend

from src.batch import Batch
from src.checkpoint.save import TrainState, load_checkpoint
from src.checkpoint.writer import CheckpointWriter
from src.data.loader import to_device
from src.distributed.processes import build_accelerator
from src.hand.standin.build import build_standin_hand
from src.model.net import PoseNet
from src.train.optimizer import build_optimizer
from src.train.step import Trainer, prepare_model
from src.train.step_watch import StepWatch
from tests.helpers import random_batch, small_config

DEVICE = os.environ.get("STAGE1_GPU_TESTS", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
IMG_SIZE = 56


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps the precision of the first accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def make_trainer(*overrides: str) -> Trainer:
    cfg = small_config("GENERAL.warmup_step=0", *overrides)
    torch.manual_seed(0)
    accelerator = build_accelerator(cfg)
    assert accelerator.device.type == DEVICE
    net = PoseNet(cfg.MODEL, build_standin_hand()).to(accelerator.device).train()
    model, optimizer = accelerator.prepare(prepare_model(net, cfg), build_optimizer(net, cfg))
    return Trainer(cfg, accelerator, model, optimizer)


def host_batches(num: int) -> list[Batch]:
    """Batches as the loader yields them: in pinned memory if there is a GPU."""
    batches = [random_batch(4, IMG_SIZE, seed=seed) for seed in range(num)]
    return [batch.pin_memory() for batch in batches] if DEVICE == "cuda" else batches


@contextmanager
def no_sync() -> Iterator[None]:
    """Within the block, an operation that makes the host wait for the GPU raises RuntimeError."""
    if DEVICE != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["auto", "no"])
def test_steps_never_sync(precision: str, tmp_path: Path) -> None:
    """Copy to the device, step and StepWatch, across the dropout gate. StepWatch waits for an event of the step before,
    which is not a sync of the device."""
    trainer = make_trainer("GENERAL.dropout_warmup_step=4", f"TRAIN.mixed_precision={precision}")
    state = TrainState()
    watch = StepWatch(tmp_path, trainer, SimpleNamespace(), state)
    rates = []

    def step(number: int, batch: Batch) -> None:
        result = trainer.train_step(number, [batch])
        watch.push(number + 1, [batch], result)
        rates.append(result.dropout_rate)

    batches = to_device(host_batches(8), trainer.accelerator.device)
    for number in range(2):  # the first steps load kernels and create the optimizer's state
        step(number, next(batches))
    with no_sync():
        for number in range(2, 8):
            step(number, next(batches))
    watch.flush()
    assert [rate > 0 for rate in rates] == [False] * 4 + [True] * 4
    assert state.skipped_step == 0
    assert not watch.must_stop


@pytest.mark.skipif(DEVICE != "cuda", reason="a CPU has nothing to sync with")
def test_sync_is_detected() -> None:
    value = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError), no_sync():
        value.sum().item()


def test_checkpoint_holds_the_moment_it_was_started_at(tmp_path: Path) -> None:
    """Steps that run while the checkpoint is written are not in it, neither in the weights nor in the moments."""
    trainer = make_trainer("GENERAL.dropout_warmup_step=0")
    batches = list(to_device(host_batches(6), trainer.accelerator.device))
    writer = CheckpointWriter()
    for number in range(2):
        trainer.train_step(number, [batches[number]])
    for step in (2, 4):  # the second checkpoint reuses the buffers of the first
        expected = weights_and_moments(trainer.net, trainer.optimizer.optimizer)
        state = TrainState(step=step)
        writer.save(tmp_path, model=trainer.net, optimizer=trainer.optimizer, scaler=None, state=state)
        for number in (step, step + 1):
            trainer.train_step(number, [batches[number]])
        assert not same(weights_and_moments(trainer.net, trainer.optimizer.optimizer), expected)
        writer.join()
        net = PoseNet(trainer.cfg.MODEL, build_standin_hand()).to(trainer.accelerator.device)
        optimizer = build_optimizer(net, trainer.cfg)
        load_checkpoint(tmp_path / "checkpoints" / f"checkpoint-{step}", model=net, optimizer=optimizer)
        assert same(weights_and_moments(net, optimizer), expected)


def weights_and_moments(net: PoseNet, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [state[name] for state in optimizer.state.values() for name in sorted(state)]
    return [tensor.detach().cpu().clone() for tensor in (*net.state_dict().values(), *moments)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.skipif(torch.cuda.is_available() and not torch.cuda.is_bf16_supported(), reason="this GPU has no bf16")
def test_auto_precision_is_bf16() -> None:
    """The backbone computes in bf16; weights, hand layer and prediction stay float32."""
    trainer = make_trainer("TRAIN.mixed_precision=auto")
    assert trainer.accelerator.mixed_precision == ("bf16" if DEVICE == "cuda" else "no")
    computed: list[torch.dtype] = []
    linear = trainer.net.backbone.model.encoder.layer[0].mlp.fc1
    linear.register_forward_hook(lambda module, inputs, output: computed.append(output.dtype))
    batch = next(to_device(host_batches(1), trainer.accelerator.device))
    with trainer.accelerator.autocast():
        prediction = trainer.net(batch)
    assert computed == [torch.bfloat16 if DEVICE == "cuda" else torch.float32]
    assert prediction.joint_cam.dtype == torch.float32
    assert {p.dtype for p in trainer.net.parameters()} == {torch.float32}


def test_compiled_step_does_not_recompile(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph without dropout and one with it, whatever the rate, through inductor on a GPU."""
    torch._dynamo.reset()
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    counter, compile_model = CompileCounterWithBackend(backend), torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **options: compile_model(net, backend=counter, **options))
    trainer = make_trainer(
        "TRAIN.compile=true", "GENERAL.dropout_schedule=linear", "GENERAL.dropout_warmup_step=2", "GENERAL.total_step=8"
    )
    results = [
        trainer.train_step(number, [batch])
        for number, batch in enumerate(to_device(host_batches(8), trainer.accelerator.device))
    ]
    assert len({result.dropout_rate for result in results}) == 7
    assert all(math.isfinite(result.metrics()["loss_total"]) for result in results)
    assert counter.frame_count == 2
