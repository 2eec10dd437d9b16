"""The network under torch.compile: one graph, two compilations over any schedule, the right dropout rate."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from src.distributed.processes import build_accelerator
from src.hand.standin.build import build_standin_hand
from src.model.dropout import Dropout
from src.model.net import PoseNet
from src.train.optimizer import build_optimizer
from src.train.step import Trainer, prepare_model
from src.train.validation import evaluate
from src.utils.train_utils import get_progressive_dropout
from tests.helpers import random_batch, small_config


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps the precision of the first accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def net() -> PoseNet:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return PoseNet(small_config().MODEL, build_standin_hand()).train()


@pytest.mark.parametrize("schedule", ["gate", "linear", "cosine"])
def test_two_compilations_over_a_run(net: PoseNet, schedule: str) -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    batch = random_batch(2, 56)
    rates = [get_progressive_dropout(step, 40, 10, 0.2, schedule) for step in range(0, 40, 2)]
    assert len(set(rates)) == 2 or schedule != "gate"
    assert len(set(rates)) > 8 or schedule == "gate"
    for rate in rates:
        net.set_dropout_rate(rate)
        compiled(batch).joint_cam.sum().backward()
    assert counter.frame_count == 2


def test_compiled_agrees_with_eager(net: PoseNet) -> None:
    """Up to rounding; with dropout the same seed gives the same masks (aot_eager keeps torch's kernels)."""
    compiled, batch = torch.compile(net, backend="aot_eager", fullgraph=True), random_batch(2, 56)
    for rate in (0.0, 0.3):
        net.set_dropout_rate(rate)
        outputs, gradients = [], []
        for forward in (net, compiled):
            torch.manual_seed(3)
            net.zero_grad()
            output = forward(batch)
            (output.joint_cam.mean() + output.joint_seen.mean()).backward()
            outputs.append(output.joint_cam.detach())
            gradients.append(net.decoder.query.grad.clone())
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*gradients)


def test_compiled_agrees_under_ddp(net: PoseNet, group: None) -> None:
    """DDP around the compiled network, as Accelerate wraps it: the eager gradients, two compilations."""
    counter, batch = CompileCounterWithBackend("eager"), random_batch(2, 56)
    wrapped = DistributedDataParallel(torch.compile(net, backend=counter, fullgraph=True))
    for rate in (0.0, 0.1, 0.2):
        net.set_dropout_rate(rate)
        gradients = []
        for forward in (net, wrapped):
            torch.manual_seed(3)
            net.zero_grad()
            prediction = forward(batch)
            (prediction.joint_cam.mean() + prediction.joint_seen.mean()).backward()
            gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
        torch.testing.assert_close(*gradients)
    assert counter.frame_count == 2


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_the_dropped_share_is_the_rate(rate: float) -> None:
    """Share of zeros, and the mean is preserved, eager and compiled, while the rate changes at every call."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    dropout = Dropout(0.3)
    ones = torch.ones(400, 1000)
    for forward in (dropout, torch.compile(dropout, backend="aot_eager", fullgraph=True)):
        for value in (0.2, rate):
            dropout.p = value
            out = forward(ones)
            assert (out == 0).float().mean().item() == pytest.approx(value, abs=0.005)
            assert out.mean().item() == pytest.approx(1.0, abs=0.01)
            assert forward(ones.bfloat16()).dtype == torch.bfloat16
        dropout.eval()
        torch.testing.assert_close(forward(ones), ones)
        dropout.train()


def test_rate_zero_is_the_identity() -> None:
    dropout = Dropout(0.0)
    x = torch.randn(3, 4)
    assert dropout(x) is x


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_trainer_compiles_twice_and_validates_eagerly(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Accelerate's wrapping, autocast and accumulation included; `prepare_model` requires a single graph."""
    torch._dynamo.reset()
    counter, real = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **how: real(net, backend=counter, **how))
    cfg = small_config(
        "GENERAL.dropout_schedule=linear", "GENERAL.dropout_warmup_step=2", "GENERAL.total_step=8",
        "GENERAL.warmup_step=1", f"TRAIN.mixed_precision={precision}", "TRAIN.compile=true",
    )  # fmt: skip
    net = PoseNet(cfg.MODEL, build_standin_hand()).train()
    accelerator = build_accelerator(cfg)
    prepared = accelerator.prepare(prepare_model(net, cfg), build_optimizer(net, cfg))
    trainer = Trainer(cfg, accelerator, *prepared)
    assert trainer.net is net
    batches = [random_batch(2, 56, seed=i).to(accelerator.device) for i in range(2)]
    results = [trainer.train_step(step, batches) for step in range(8)]
    assert len({result.dropout_rate for result in results}) > 4
    assert all(math.isfinite(result.metrics()["loss_total"]) for result in results)
    assert int(results[-1].skipped[1]) == 0
    assert counter.frame_count == 2, "one graph without dropout, one with it"
    assert math.isfinite(evaluate(net, batches, accelerator, cfg.LOSS, draw=False)[0]["loss_total"])
    assert counter.frame_count == 2, "validation runs the uncompiled network"


def test_activation_checkpointing_changes_no_gradient(net: PoseNet) -> None:
    """Every layer of the backbone runs twice, and the gradients are the same to the last bit."""
    batch, calls = random_batch(2, 56), []
    net.set_dropout_rate(0.0)
    net.backbone.model.encoder.layer[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for expected in (1, 2):
        net.zero_grad()
        net(batch).joint_cam.mean().backward()
        gradients.append([p.grad.clone() for p in net.backbone.parameters() if p.grad is not None])
        assert len(calls) == expected
        calls.clear()
        net.backbone.checkpoint_activations()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
