"""Gradients are reduced over the processes once a step, not once a micro-batch."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from src.distributed.processes import build_accelerator
from src.hand.standin.build import build_standin_hand
from src.model.net import PoseNet
from src.train.optimizer import build_optimizer
from src.train.step import Trainer
from tests.helpers import random_batch, small_config


@pytest.mark.parametrize("num_micro", [1, 3])
def test_one_reduction_a_step(num_micro: int, group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP reduces as many elements in a step as there are parameters, whatever the number of micro-batches."""
    cfg = small_config("GENERAL.dropout_warmup_step=2")
    accelerator = build_accelerator(cfg)
    net = PoseNet(cfg.MODEL, build_standin_hand()).to(accelerator.device).train()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    reduced: list[int] = []

    def count(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        reduced.append(bucket.buffer().numel())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model.register_comm_hook(None, count)
    trainer = Trainer(cfg, accelerator, model, accelerator.prepare(build_optimizer(net, cfg)))
    # Accelerate ignores `no_sync` in a single process
    monkeypatch.setattr(Accelerator, "use_distributed", property(lambda _: True))
    num_parameter = sum(p.numel() for p in net.parameters() if p.requires_grad)
    for step in range(3):
        reduced.clear()
        trainer.train_step(step, [random_batch(2, 56, seed=i).to(accelerator.device) for i in range(num_micro)])
        assert sum(reduced) == num_parameter
