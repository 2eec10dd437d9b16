"""Steps whose loss or gradient is not finite: skipped without side effects, counted, reported, saved, replayed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from src.batch import Batch, Sample
from src.checkpoint.save import TrainState, network_texts
from src.hand.standin.build import build_standin_hand
from src.loss import LOSS_TERMS
from src.model.net import PoseNet
from src.train.bad_batch import NumbersError, find_shard
from src.train.optimizer import build_optimizer
from src.train.replay import replay
from src.train.step import StepResult, Trainer
from src.train.step_watch import DelayedRead, StepWatch
from tests.helpers import random_batch, small_config

CFG = small_config("TRAIN.max_skipped_step=3", "MODEL.backbone.random_init=true")


class FakeDataset:
    """One shard; the sample at position N has the key noise/N."""

    sources = ((SimpleNamespace(shard=Path("shards/a.tar")),),)
    plan = SimpleNamespace(
        locate=lambda position: SimpleNamespace(source=0, shard=0, row=position),
        substitute=lambda position, attempt: SimpleNamespace(source=0, shard=0, row=position),
    )

    def read(self, place: SimpleNamespace) -> Sample:
        return SimpleNamespace(key=f"noise/{place.row}")


def make_trainer() -> Trainer:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    net = PoseNet(CFG.MODEL, build_standin_hand())
    return Trainer(CFG, accelerator, *accelerator.prepare(net, build_optimizer(net, CFG)))


def good(seed: int) -> list[Batch]:
    return [random_batch(2, 56, seed), random_batch(2, 56, seed + 100)]


def bad(seed: int, value: float = float("nan")) -> list[Batch]:
    """The second micro-batch has one sample whose target is `value`."""
    first, second = good(seed)
    second.joint_cam[1, 5, 0] = value
    return [first, second]


def weights_and_moments(trainer: Trainer) -> list[torch.Tensor]:
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return [t.clone() for t in (*trainer.net.state_dict().values(), *moments)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skipped_step_changes_nothing(value: float) -> None:
    """Weights, moments and the optimizer's step count equal those of a run without that step."""
    one, other = make_trainer(), make_trainer()
    for trainer in (one, other):
        trainer.train_step(0, good(0))
    before = weights_and_moments(one)
    result = one.train_step(1, bad(1, value))
    assert same(weights_and_moments(one), before)
    assert not torch.isfinite(result.total)
    assert result.skipped.tolist() == [1, 1]
    for trainer in (one, other):
        result = trainer.train_step(2, good(2))
    assert same(weights_and_moments(one), weights_and_moments(other))
    assert not same(weights_and_moments(one), before)
    assert one.skipped.tolist() == [0, 1]
    assert result.metrics()["skipped_step"] == 0


def test_non_finite_gradient_is_skipped() -> None:
    """The loss is finite, its derivative is not."""
    trainer = make_trainer()
    trainer.train_step(0, good(0))
    before = weights_and_moments(trainer)
    trainer.net.shape_head.register_forward_hook(lambda m, i, out: out + 0 * (out - out.detach()).abs().sqrt())
    result = trainer.train_step(1, good(1))
    assert torch.isfinite(result.total)
    assert not torch.isfinite(result.grad_norm)
    assert same(weights_and_moments(trainer), before)


def watch(trainer: Trainer, folder: Path, state: TrainState) -> StepWatch:
    return StepWatch(folder, trainer, FakeDataset(), state)


def test_too_many_skipped_steps_end_the_run(tmp_path: Path) -> None:
    """The saved weights are those before the bad step, although a good step was launched before it was noticed."""
    trainer, state = make_trainer(), TrainState()
    steps = watch(trainer, tmp_path, state)
    batches = [good(0), bad(1), good(2), bad(3), bad(4), bad(5), good(6)]
    for step, batch in enumerate(batches[:-1]):
        steps.push(step + 1, batch, trainer.train_step(step, batch))
    before = weights_and_moments(trainer)
    result = trainer.train_step(6, batches[6])
    with pytest.raises(NumbersError, match=r"3 steps in a row .*loss_joint_rel.*a\.tar:noise/1"):
        steps.push(7, batches[6], result)
    assert same(weights_and_moments(trainer), before), "no update after the last of them"
    assert (state.skipped_in_row, state.skipped_step) == (3, 4)
    assert sorted(p.name for p in tmp_path.glob("*.json")) == [f"bad_batch-{step}.json" for step in (2, 4, 5, 6)]

    report = json.loads((tmp_path / "bad_batch-6.json").read_text())
    assert len(report["samples"]) == 4
    assert [each["key"] for each in report["samples"] if each["terms"]] == ["noise/1"]
    assert report["samples"][3]["shard"] == "shards/a.tar"
    lines = replay(tmp_path / "bad_batch-6", "cpu")
    terms = report["terms"]
    assert f"loss_theta={terms['loss_theta']:.4g}" in lines[0]
    assert [line.split(": ")[1].split(" ")[1] for line in lines if ", not finite" in line] == ["noise/1"]
    assert any("gradients that are not finite" in line for line in lines)


def test_count_continues_after_resume(tmp_path: Path) -> None:
    state = TrainState(skipped_in_row=2, skipped_step=7)
    trainer = make_trainer()
    steps = watch(trainer, tmp_path, state)
    steps.push(1, bad(0), trainer.train_step(0, bad(0)))
    with pytest.raises(NumbersError):
        steps.flush()
    assert (state.skipped_in_row, state.skipped_step) == (3, 8)


def test_results_are_read_a_step_late() -> None:
    reads: DelayedRead[str] = DelayedRead()
    assert reads.push(torch.tensor([1.0, 2.0]), "first") == []
    assert reads.push(torch.tensor([3.0, 4.0]), "second") == [([1.0, 2.0], "first")]
    assert reads.flush() == [([3.0, 4.0], "second")]
    assert reads.flush() == []


def test_shard_of_a_substitute() -> None:
    """A sample that replaces a corrupt one is found in its own shard."""
    dataset = FakeDataset()
    dataset.sources = ((SimpleNamespace(shard=Path("a.tar")), SimpleNamespace(shard=Path("b.tar"))),)
    dataset.plan = SimpleNamespace(
        locate=lambda position: SimpleNamespace(source=0, shard=0, row=0),
        substitute=lambda position, attempt: SimpleNamespace(source=0, shard=1, row=attempt),
    )
    assert find_shard(dataset, 5, "noise/0") == "a.tar"
    assert find_shard(dataset, 5, "noise/2") == "b.tar"
    assert find_shard(dataset, 5, "noise/99") == "?"


def test_step_reads_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor waits for the device: a step does not, a log line does."""
    trainer = make_trainer()
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _m=method, _n=name, **k: (reads.append(_n), _m(self, *a, **k))[1]
        )
    result = trainer.train_step(0, good(0))
    result = trainer.train_step(1, good(1))
    assert reads == []
    assert isinstance(result, StepResult)
    assert set(result.metrics()) >= {*LOSS_TERMS, "loss_total", "grad_norm", "skipped_step"}
    assert reads != []


def test_replay_without_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report\.json cannot be read"):
        replay(tmp_path, "cpu")
    assert network_texts(replace(CFG), make_trainer().net).keys() == {"config.yaml", "backbone.json"}
