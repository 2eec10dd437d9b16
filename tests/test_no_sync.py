"""A training step never waits for the device: no value of a tensor is read between two log lines.

A CPU never waits, so every way to read a value raises an error instead: the operator behind `item`, `bool` and `float`,
operators with a value-dependent output shape, methods that copy to the host, and tensors created on the host, which are
copied to the device. tests/test_gpu.py checks a real GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from src.batch import Batch
from src.checkpoint.save import TrainState
from src.data.loader import to_device
from src.distributed.processes import build_accelerator
from src.hand.standin.build import build_standin_hand
from src.model.net import PoseNet
from src.train.optimizer import build_optimizer
from src.train.step import Trainer
from src.train.step_watch import DelayedRead, StepWatch
from tests.helpers import random_batch, small_config

READING_OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2")
COPYING_OPERATORS = ("lift_fresh",)  # torch.tensor(...) or an index that is a list: a host tensor, copied to the GPU
READING_METHODS = ("item", "tolist", "numpy", "cpu")


class SyncError(AssertionError):
    """A value of a tensor was read."""


class _NoReading(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in COPYING_OPERATORS:
            raise SyncError(f"aten::{name} creates a tensor on the host, whose copy waits for the device")
        if name in READING_OPERATORS or (name == "index" and any(_is_mask(index) for index in args[1])):
            raise SyncError(f"aten::{name} waits for the device")
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


@contextmanager
def no_reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reading a value of any tensor raises SyncError."""

    def refuse(name: str) -> Any:
        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            raise SyncError(f"Tensor.{name} waits for the device")

        return method

    with monkeypatch.context() as patch, _NoReading():
        for name in READING_METHODS:
            patch.setattr(torch.Tensor, name, refuse(name))
        yield


def make_trainer(*overrides: str) -> Trainer:
    cfg = small_config("GENERAL.dropout_warmup_step=2", *overrides)
    torch.manual_seed(0)
    accelerator = build_accelerator(cfg)
    net = PoseNet(cfg.MODEL, build_standin_hand()).to(accelerator.device).train()
    return Trainer(cfg, accelerator, *accelerator.prepare(net, build_optimizer(net, cfg)))


def make_batches(trainer: Trainer, num: int) -> list[Batch]:
    return [random_batch(2, 56, seed=i).to(trainer.accelerator.device) for i in range(num)]


@pytest.mark.parametrize("num_micro", [1, 2])
def test_step_never_syncs(num_micro: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does StepWatch, apart from reading the step before: tests/test_bad_numbers.py covers that."""
    trainer = make_trainer()
    watch = StepWatch(tmp_path, trainer, SimpleNamespace(), TrainState())
    monkeypatch.setattr(DelayedRead, "_read", lambda self, keep: [])
    micro_batches = make_batches(trainer, num_micro)
    results = []
    with no_reading(monkeypatch):
        for step in range(4):  # across the dropout gate
            results.append(trainer.train_step(step, micro_batches))
            watch.push(step + 1, micro_batches, results[-1])
    assert [result.dropout_rate > 0 for result in results] == [False, False, True, True]
    assert results[-1].metrics()["loss_total"] > 0


def test_step_uses_fused_kernels() -> None:
    """One kernel for AdamW, one for all norms, and one call for each attention without dropout."""
    trainer, called = make_trainer(), Counter()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    with Record():
        trainer.train_step(0, make_batches(trainer, 1))
    num_group = len(trainer.optimizer.param_groups)
    assert called["_fused_adamw_"] == num_group
    assert called["_foreach_norm"] == 1
    attentions = {name: number for name, number in called.items() if name.startswith("_scaled_dot_product")}
    forward = sum(number for name, number in attentions.items() if "backward" not in name)
    assert forward == 2 + 2 * 2, f"2 layers of the backbone, 2 x 2 of the decoder: {attentions}"


@pytest.mark.parametrize(
    ("precision", "autocast", "products"),
    [("auto", "no", "highest"), ("no", "no", "highest"), ("tf32", "no", "high"), ("bf16", "bf16", "highest")],
)
def test_precision(precision: str, autocast: str, products: str) -> None:
    """`auto` is float32 without a GPU; `tf32` applies to all float32 matrix products."""
    if precision == "auto" and torch.cuda.is_available():
        pytest.skip("auto is bf16 on a GPU")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = build_accelerator(small_config(f"TRAIN.mixed_precision={precision}"))
        assert (accelerator.mixed_precision, torch.get_float32_matmul_precision()) == (autocast, products)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_float32_matmul_precision("highest")


class _Streams:
    """Fake CUDA streams and batches that record every call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.inside = "main"
        main = SimpleNamespace(wait_stream=lambda stream: self.calls.append(f"main waits for {stream}"), name="main")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
        monkeypatch.setattr(torch.cuda, "stream", self.entered)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)

    @contextmanager
    def entered(self, stream: str) -> Iterator[None]:
        self.inside = stream
        yield
        self.inside = "main"

    def batch(self, name: str) -> Any:
        def to(device: torch.device, non_blocking: bool = False) -> Any:
            self.calls.append(f"{name} copied in {self.inside}, {'no wait' if non_blocking else 'waits'}")
            return SimpleNamespace(name=name, record_stream=lambda s: self.calls.append(f"{name} kept for {s.name}"))

        return SimpleNamespace(to=to)


def test_next_batch_is_copied_beside_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a separate stream, without blocking the host, and not before it is requested."""
    streams = _Streams(monkeypatch)
    batches = to_device([streams.batch("first"), streams.batch("second")], torch.device("cuda"))
    for name in ("first", "second"):
        streams.calls.clear()
        assert next(batches).name == name
        assert streams.calls == [f"{name} copied in side, no wait", "main waits for side", f"{name} kept for main"]


def test_every_tensor_of_a_batch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from unpinned memory blocks the host even with non_blocking=True."""
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(id(self)) or self)
    batch = random_batch(2, 56)
    batch.pin_memory()
    assert sorted(pinned) == sorted(id(v) for v in vars(batch).values() if isinstance(v, torch.Tensor))


def test_reading_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.ones(3)
    for read in (
        lambda: value.sum().item(),
        lambda: bool(value[0] > 0),
        lambda: float(value[0]),
        lambda: value.tolist(),
        lambda: value[value > 0],
        lambda: torch.nonzero(value),
        lambda: value[[0, 2]],
        lambda: torch.tensor([1.0]),
    ):
        with pytest.raises(SyncError), no_reading(monkeypatch):
            read()
