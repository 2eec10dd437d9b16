"""The dropout schedule, from the function to every dropout module.

Runs under pytest, and alone to check an installation: `python -m tests.test_progressive_dropout`.
"""

from __future__ import annotations

import sys
import time
import traceback

import pytest
import torch
from torch import nn

from src.hand.standin.build import build_standin_hand
from src.model.net import PoseNet
from src.utils.train_utils import DROPOUT_SCHEDULES, get_progressive_dropout
from tests.helpers import compose_config, random_batch, small_config


def build_net(*overrides: str) -> PoseNet:
    torch.manual_seed(0)
    return PoseNet(small_config(*overrides).MODEL, build_standin_hand())


def dropout_rates(net: nn.Module) -> list[float]:
    return [module.p for module in net.modules() if isinstance(module, nn.Dropout)]


def test_dropout_function() -> None:
    """0 for the first 10000 steps, then 0.1; ramps rise from the gate to the target; bad values are refused."""
    for schedule in DROPOUT_SCHEDULES:
        rates = [get_progressive_dropout(s, 100_000, 10_000, 0.1, schedule) for s in range(0, 100_001, 500)]
        assert rates[:20] == [0.0] * 20, "no dropout before the gate"
        assert rates == sorted(rates), "the rate never falls"
        assert get_progressive_dropout(9_999, 100_000, 10_000, 0.1, schedule) == 0.0
        assert get_progressive_dropout(99_999, 100_000, 10_000, 0.1, schedule) == pytest.approx(0.1)
        assert get_progressive_dropout(200_000, 100_000, 10_000, 0.1, schedule) == pytest.approx(0.1)
    assert get_progressive_dropout(10_000, 100_000, 10_000, 0.1) == 0.1
    assert get_progressive_dropout(54_999, 100_000, 10_000, 0.1, "linear") == pytest.approx(0.05)
    assert get_progressive_dropout(54_999, 100_000, 10_000, 0.1, "cosine") == pytest.approx(0.05)
    assert get_progressive_dropout(0, 100, 0, 0.2) == 0.2, "no warm-up, dropout at once"
    for bad in [(-1, 100, 10, 0.1), (0, 0, 10, 0.1), (0, 100, -1, 0.1), (0, 100, 10, 1.0), (0, 100, 10, -0.1)]:
        with pytest.raises(ValueError, match=r"steps|dropout"):
            get_progressive_dropout(*bad)
    with pytest.raises(ValueError, match="gate, linear, cosine"):
        get_progressive_dropout(0, 100, 10, 0.1, "step")


def test_model_interface() -> None:
    """Rate 0 makes a training forward deterministic, another rate does not, evaluation never drops."""
    net, batch = build_net().train(), random_batch(2, 56)

    def joints() -> torch.Tensor:
        return net(batch).joint_cam.detach()

    net.set_dropout_rate(0.0)
    assert torch.equal(joints(), joints()), "rate 0 drops nothing"
    net.set_dropout_rate(0.5)
    assert not torch.equal(joints(), joints()), "rate 0.5 drops in training"
    net.eval()
    dropped = joints()
    net.set_dropout_rate(0.0)
    assert torch.equal(dropped, joints()), "evaluation never drops"
    for bad in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            net.set_dropout_rate(bad)


def test_every_dropout_updated() -> None:
    """Every nn.Dropout gets the rate of each step, attention weights included; the backbone has no dropout."""
    net = build_net()
    assert len(dropout_rates(net)) == 2 * (2 * 2 + 2), "two per attention, two per MLP, in each layer"
    for step in (0, 9_999, 10_000, 99_999):
        rate = get_progressive_dropout(step, 100_000, 10_000, 0.1)
        net.set_dropout_rate(rate)
        assert set(dropout_rates(net)) == {rate}
    assert dropout_rates(net.backbone) == []
    backbone_rates = {v for k, v in net.backbone.model.config.to_dict().items() if "drop" in k and "prob" in k}
    assert backbone_rates == {0.0}

    attention = net.decoder.layers[0].cross_attention.train()
    query, context = torch.randn(2, 3, 32), torch.randn(2, 9, 32)
    attention.out_dropout.p = 0.0
    attention.weight_dropout.p = 0.5
    assert not torch.equal(attention(query, context), attention(query, context)), "attention weights are dropped"
    attention.weight_dropout.p = 0.0
    assert torch.equal(attention(query, context), attention(query, context))


def test_every_dropout_updated_dinov2_large() -> None:
    """The same in the network of stage1-dino_large, built in seconds on the meta device: no weights, no memory."""
    model = compose_config("stage1-dino_large", "MODEL.backbone.random_init=true").MODEL
    with torch.device("meta"):
        net = PoseNet(model, build_standin_hand())
    assert 3.0e8 < sum(p.numel() for p in net.backbone.parameters()) < 3.1e8, "this is DINOv2-large"
    assert len(dropout_rates(net)) == 4 * 6
    assert set(dropout_rates(net)) == {0.1}
    net.set_dropout_rate(0.0)
    assert set(dropout_rates(net)) == {0.0}


def test_dropout_cost() -> None:
    """Computing and setting the rate costs at most 20 us a step if it does not change."""
    net = build_net()
    net.set_dropout_rate(0.1)

    def microseconds(calls: int = 2000) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            net.set_dropout_rate(get_progressive_dropout(50_000, 100_000, 10_000, 0.1))
        return (time.perf_counter() - start) / calls * 1e6

    assert min(microseconds() for _ in range(5)) < 20.0


CHECKS = (
    ("dropout function", test_dropout_function),
    ("model interface", test_model_interface),
    ("every Dropout updated", test_every_dropout_updated),
    ("every Dropout updated in DINOv2-large", test_every_dropout_updated_dinov2_large),
    ("cost of a step", test_dropout_cost),
)


def main() -> int:
    """Run the checks without pytest; returns the number of failures."""
    failed = 0
    for name, check in CHECKS:
        try:
            check()
            print(f"✅ {name}: {check.__doc__.splitlines()[0]}")
        except Exception:
            failed += 1
            print(f"❌ {name}")
            traceback.print_exc()
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
