"""Checkpoints that are written beside the training hold the moment they were begun at, whatever the training does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from src.checkpoint.save import CheckpointError, TrainState, load_checkpoint
from src.checkpoint.writer import CheckpointWriter, Frozen
from tests.test_checkpoint import make, train


def values(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *moments)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_the_next_step_waits_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_wrapped: bool) -> None:
    """With a copy that takes 0.2 s: a forward pass changes the buffers, a step the weights, and neither is in it."""
    copy_all = torch._foreach_copy_

    def slow_copy(*arguments: object, **how: object) -> None:
        time.sleep(0.2)
        copy_all(*arguments, **how)

    monkeypatch.setattr(torch, "_foreach_copy_", slow_copy)
    model, optimizer = make()
    train(model, optimizer, 2)
    writer = CheckpointWriter()
    given = (
        type("Wrapper", (), {"optimizer": optimizer, "state_dict": optimizer.state_dict})() if is_wrapped else optimizer
    )
    for step in (1, 2):  # the second checkpoint uses the buffers of the first one
        expected = values(model, optimizer)
        state = TrainState(step=step)
        writer.save(tmp_path, model=model, optimizer=given, scaler=None, state=state)
        state.step = 99
        train(model, optimizer, 1)
        assert not same(values(model, optimizer), expected)
        writer.join()
        assert writer.saved_step == step
        other, other_optimizer = make(seed=1)
        path = tmp_path / "checkpoints" / f"checkpoint-{step}"
        assert load_checkpoint(path, model=other, optimizer=other_optimizer).step == step
        assert same(values(other, other_optimizer), expected)
        assert other.tied.weight is other.first.weight
    assert len(optimizer._optimizer_step_pre_hooks) == 1


def test_what_is_frozen_already_is_taken_as_it_is(tmp_path: Path) -> None:
    model, optimizer = make()
    train(model, optimizer, 1)
    frozen = [Frozen(part.state_dict()) for part in (model, optimizer)]
    writer = CheckpointWriter()
    writer.save(tmp_path, model=frozen[0], optimizer=frozen[1], scaler=None, state=TrainState(step=3))
    writer.join()
    other, other_optimizer = make(seed=1)
    load_checkpoint(tmp_path / "checkpoints/checkpoint-3", model=other, optimizer=other_optimizer)
    assert same(values(other, other_optimizer), values(model, optimizer))


@pytest.mark.parametrize("fails", ["disk", "copy"])
def test_a_failure_is_told_and_holds_up_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    model, optimizer = make()
    train(model, optimizer, 1)
    writer = CheckpointWriter()
    if fails == "disk":
        (tmp_path / "checkpoints").write_text("in the way")
    else:
        monkeypatch.setattr("src.checkpoint.writer.HostCopy._host", lambda *_: 1 / 0)
    with pytest.raises((CheckpointError, ZeroDivisionError)):  # noqa: PT012  (whichever call comes to know of it)
        writer.save(tmp_path, model=model, optimizer=optimizer, scaler=None, state=TrainState(step=1))
        train(model, optimizer, 1)
        writer.join()
    train(model, optimizer, 1)
