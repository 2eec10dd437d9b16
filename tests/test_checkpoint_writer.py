"""A checkpoint holds the moment it was begun at, whatever the training does while it is written."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from src.checkpoint import writer as writer_module
from src.checkpoint.save import CheckpointError, TrainState, load_checkpoint
from src.checkpoint.writer import CheckpointWriter, Frozen
from tests.test_checkpoint import make, train


def values(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *moments)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_a_checkpoint_holds_the_moment_it_was_begun_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training continues while the disk is slow: neither its buffers nor its weights reach the file."""
    write = writer_module.save_checkpoint

    def slow_write(*arguments: object, **options: object) -> None:
        time.sleep(0.2)
        write(*arguments, **options)

    monkeypatch.setattr(writer_module, "save_checkpoint", slow_write)
    model, optimizer = make()
    train(model, optimizer, 2)
    writer = CheckpointWriter()
    for step in (1, 2):  # the second checkpoint reuses the buffers of the first one
        expected = values(model, optimizer)
        state = TrainState(step=step)
        writer.save(tmp_path, model=model, optimizer=optimizer, scaler=None, state=state)
        state.step = 99
        train(model, optimizer, 1)
        assert not same(values(model, optimizer), expected)
        assert writer.saved_step != step, "the disk is slower than a training step"
        writer.join()
        assert writer.saved_step == step
        other, other_optimizer = make(seed=1)
        path = tmp_path / "checkpoints" / f"checkpoint-{step}"
        assert load_checkpoint(path, model=other, optimizer=other_optimizer).step == step
        assert same(values(other, other_optimizer), expected)
        assert other.tied.weight is other.first.weight


def test_frozen_states_are_written_unchanged(tmp_path: Path) -> None:
    model, optimizer = make()
    train(model, optimizer, 1)
    frozen = [Frozen(part.state_dict()) for part in (model, optimizer)]
    writer = CheckpointWriter()
    writer.save(tmp_path, model=frozen[0], optimizer=frozen[1], scaler=None, state=TrainState(step=3))
    writer.join()
    other, other_optimizer = make(seed=1)
    load_checkpoint(tmp_path / "checkpoints/checkpoint-3", model=other, optimizer=other_optimizer)
    assert same(values(other, other_optimizer), values(model, optimizer))


def test_a_disk_failure_stops_no_step_and_is_reported(tmp_path: Path) -> None:
    model, optimizer = make()
    train(model, optimizer, 1)
    writer = CheckpointWriter()
    (tmp_path / "checkpoints").write_text("in the way")
    writer.save(tmp_path, model=model, optimizer=optimizer, scaler=None, state=TrainState(step=1))
    train(model, optimizer, 1)
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        writer.join()
    writer.poll()  # reported once
    train(model, optimizer, 1)
    assert writer.saved_step is None


def test_poll_reports_a_disk_failure(tmp_path: Path) -> None:
    model, optimizer = make()
    train(model, optimizer, 1)
    writer = CheckpointWriter()
    (tmp_path / "checkpoints").write_text("in the way")
    writer.save(tmp_path, model=model, optimizer=optimizer, scaler=None, state=TrainState(step=1))
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):  # noqa: PT012  (as the training loop does)
        for _ in range(1000):
            writer.poll()
            time.sleep(0.01)
