"""Takes steps with unsharded and with sharded weights and writes the results as JSON. Runs under torchrun.

torchrun --nproc_per_node=2 tests/sharded_steps.py RESULT.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from src.batch import Batch
from src.config import Config
from src.distributed.processes import build_accelerator, shut_down
from src.hand.standin.build import build_standin_hand
from src.model.net import PoseNet
from src.train import sharding
from src.train.optimizer import build_optimizer
from src.train.step import Trainer, prepare_model
from tests.helpers import random_batch, small_config

CFG = small_config(
    *("MODEL.backbone.swiglu=true", "TRAIN.max_skipped_step=2", "MODEL.handec.dropout=0.0"),
    *("GENERAL.total_step=10", "GENERAL.warmup_step=3", "TRAIN.activation_checkpointing=true"),
)


def make_trainer(cfg: Config, is_sharded: bool, warm: int = 0) -> Trainer:
    """`warm`: number of unsharded steps first, so that there are moments to shard."""
    accelerator = build_accelerator(cfg)
    torch.manual_seed(0)
    net = PoseNet(cfg.MODEL, build_standin_hand())
    optimizer = build_optimizer(net, cfg)
    for step in range(warm):
        net(random_batch(2, 56, step)).joint_cam.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model = prepare_model(net, cfg)
    if is_sharded:
        sharding.shard(net, optimizer, accelerator)
        return Trainer(cfg, accelerator, model, accelerator.prepare(optimizer))
    return Trainer(cfg, accelerator, *accelerator.prepare(model, optimizer))


def batches(step: int, rank: int, bad: bool = False) -> list[Batch]:
    """Two micro-batches of this process; in a bad step the second one of rank 1 contains a NaN."""
    both = [random_batch(2, 56, 1000 * rank + 10 * step + index) for index in range(2)]
    if bad and rank == 1:
        both[1].joint_cam[1, 5, 0] = float("nan")
    return both


def weights_and_moments(trainer: Trainer) -> list[torch.Tensor]:
    """Weights and moments, unsharded."""
    model, optimizer = (sharding.gather(each, keep=True).state_dict() for each in (trainer.net, trainer.optimizer))
    return [*model.values(), *(value for state in optimizer["state"].values() for value in state.values())]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def curve(trainer: Trainer, steps: int = 10) -> list[dict[str, float]]:
    rank = trainer.accelerator.process_index
    return [trainer.train_step(step, batches(step, rank)).metrics() for step in range(steps)]


def both_ways(cfg: Config) -> list[list[dict[str, float]]]:
    """Three steps with unsharded weights, three with sharded ones."""
    return [curve(make_trainer(cfg, is_sharded), 3) for is_sharded in (False, True)]


def bad_steps() -> dict[str, object]:
    """A run with a bad step and one without it; then more bad steps than allowed, and a good one."""
    one, other = make_trainer(CFG, True), make_trainer(CFG, True)
    rank = one.accelerator.process_index
    for trainer in (one, other):
        trainer.train_step(0, batches(0, rank))
    before = weights_and_moments(one)
    skipped = [one.train_step(1, batches(1, rank, bad=True)).skipped.tolist()]
    is_skipped = same(weights_and_moments(one), before)
    for trainer in (one, other):
        trainer.train_step(2, batches(2, rank))
    after = weights_and_moments(one)
    changes_nothing = same(after, weights_and_moments(other)) and not same(after, before)
    for step in (3, 4):
        skipped.append(one.train_step(step, batches(step, rank, bad=True)).skipped.tolist())
    halted = weights_and_moments(one)
    one.train_step(5, batches(5, rank))
    return {
        "is_skipped": is_skipped,
        "changes_nothing": changes_nothing,
        "skipped": skipped,
        "stays_halted": same(weights_and_moments(one), halted),
    }


def main(file: Path) -> None:
    unsharded, sharded = make_trainer(CFG, False, warm=2), make_trainer(CFG, True, warm=2)
    result = {
        "start_is_equal": same(weights_and_moments(unsharded), weights_and_moments(sharded)),
        "numbers_held": [sum(sharding_size(p) for p in each.parameters) for each in (unsharded, sharded)],
        "moments_held": [moments_size(each) for each in (unsharded, sharded)],
        "unsharded": curve(unsharded),
        "sharded": curve(sharded),
        "bad": bad_steps(),
    }
    frozen, bf16 = replace(CFG.TRAIN, backbone_lr=None), replace(CFG.TRAIN, mixed_precision="bf16")
    result["frozen"] = both_ways(replace(CFG, TRAIN=frozen))
    result["float32"] = curve(make_trainer(CFG, False), 3)
    AcceleratorState._reset_state()  # it keeps the first precision for the whole process
    result["bf16"] = both_ways(replace(CFG, TRAIN=bf16))
    accelerator = unsharded.accelerator
    if accelerator.is_main_process:
        file.write_text(json.dumps(result))
    shut_down(accelerator)


def sharding_size(tensor: torch.Tensor) -> int:
    """Elements of a tensor that this process holds."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()


def moments_size(trainer: Trainer) -> int:
    return sum(
        sharding_size(value) for state in trainer.optimizer.state.values() for value in state.values() if value.ndim
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
