"""Steps whose loss or gradient is not finite: left out without a trace, counted, named, kept, replayed."""

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


class Place:
    """A data set of one shard in which every sample stands where its key says."""

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


def everything(trainer: Trainer) -> list[torch.Tensor]:
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return [t.clone() for t in (*trainer.net.state_dict().values(), *moments)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_step_leaves_no_trace(value: float) -> None:
    """Weights, moments and the optimizer's own count are those of a run that never saw it."""
    one, other = make_trainer(), make_trainer()
    for trainer in (one, other):
        trainer.train_step(0, good(0))
    before = everything(one)
    result = one.train_step(1, bad(1, value))
    assert same(everything(one), before)
    assert not torch.isfinite(result.total)
    assert result.skipped.tolist() == [1, 1]
    for trainer in (one, other):
        result = trainer.train_step(2, good(2))
    assert same(everything(one), everything(other))
    assert not same(everything(one), before)
    assert one.skipped.tolist() == [0, 1]
    assert result.metrics()["skipped_step"] == 0


def test_a_gradient_that_is_not_finite_is_enough() -> None:
    """The loss is finite, its derivative is not."""
    trainer = make_trainer()
    trainer.train_step(0, good(0))
    before = everything(trainer)
    trainer.net.shape_head.register_forward_hook(lambda m, i, out: out + 0 * (out - out.detach()).abs().sqrt())
    result = trainer.train_step(1, good(1))
    assert torch.isfinite(result.total)
    assert not torch.isfinite(result.grad_norm)
    assert same(everything(trainer), before)


def watch(trainer: Trainer, folder: Path, state: TrainState) -> StepWatch:
    return StepWatch(folder, trainer, Place(), state)


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    """The weights that are kept are those that met the batch, though a good step came before the news."""
    trainer, state = make_trainer(), TrainState()
    steps = watch(trainer, tmp_path, state)
    batches = [good(0), bad(1), good(2), bad(3), bad(4), bad(5), good(6)]
    for step, batch in enumerate(batches[:-1]):
        steps.push(step + 1, batch, trainer.train_step(step, batch))
    before = everything(trainer)
    result = trainer.train_step(6, batches[6])
    with pytest.raises(NumbersError, match=r"3 steps in a row .*loss_joint_rel.*a\.tar:noise/1"):
        steps.push(7, batches[6], result)
    assert same(everything(trainer), before), "no update after the last of them"
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


def test_the_count_goes_on_after_a_resume(tmp_path: Path) -> None:
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
    """A sample that stands in for a damaged one is found where it really comes from."""
    place = Place()
    place.sources = ((SimpleNamespace(shard=Path("a.tar")), SimpleNamespace(shard=Path("b.tar"))),)
    place.plan = SimpleNamespace(
        locate=lambda position: SimpleNamespace(source=0, shard=0, row=0),
        substitute=lambda position, attempt: SimpleNamespace(source=0, shard=1, row=attempt),
    )
    assert find_shard(place, 5, "noise/0") == "a.tar"
    assert find_shard(place, 5, "noise/2") == "b.tar"
    assert find_shard(place, 5, "noise/99") == "?"


def test_no_number_is_asked_for_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tensor would wait for the device: no step does, a log line does."""
    trainer = make_trainer()
    asked = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _m=method, _n=name, **k: (asked.append(_n), _m(self, *a, **k))[1]
        )
    result = trainer.train_step(0, good(0))
    result = trainer.train_step(1, good(1))
    assert asked == []
    assert isinstance(result, StepResult)
    assert set(result.metrics()) >= {*LOSS_TERMS, "loss_total", "grad_norm", "skipped_step"}
    assert asked != []


def test_replay_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report\.json cannot be read"):
        replay(tmp_path, "cpu")
    assert network_texts(replace(CFG), make_trainer().net).keys() == {"config.yaml", "backbone.json"}
