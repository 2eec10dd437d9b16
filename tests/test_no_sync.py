"""A training step never waits for the device: no value of a tensor is read between two log lines.

On a CPU nothing waits, so the ways to read a value are forbidden instead: the operator behind `item`, `bool` and
`float`, those whose output's shape depends on values, and the methods that copy to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.engine.processes import build_accelerator
from src.engine.step import Trainer, build_optimizer
from src.hand.standin import build_standin_hand
from src.model.net import PoseNet
from tests.helpers import random_batch, small_config

READING_OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2")
READING_METHODS = ("item", "tolist", "numpy", "cpu")


class SyncError(AssertionError):
    """A value of a tensor was read."""


class _NoReading(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
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
    net = PoseNet(cfg.MODEL, build_standin_hand()).train()
    accelerator = build_accelerator(cfg)
    return Trainer(cfg, accelerator, *accelerator.prepare(net, build_optimizer(net, cfg)))


@pytest.mark.parametrize("num_micro", [1, 2])
def test_a_step_reads_nothing(num_micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    micro_batches = [random_batch(2, 56, seed=i) for i in range(num_micro)]
    with no_reading(monkeypatch):
        results = [trainer.train_step(step, micro_batches) for step in range(4)]  # across the dropout gate
    assert [result.dropout_rate > 0 for result in results] == [False, False, True, True]
    assert results[-1].metrics()["loss_total"] > 0


def test_reading_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.ones(3)
    for read in (
        lambda: value.sum().item(),
        lambda: bool(value[0] > 0),
        lambda: float(value[0]),
        lambda: value.tolist(),
        lambda: value[value > 0],
        lambda: torch.nonzero(value),
    ):
        with pytest.raises(SyncError), no_reading(monkeypatch):
            read()
