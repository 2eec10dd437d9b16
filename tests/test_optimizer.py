"""Muon beside AdamW: what it computes, that it resumes and skips as AdamW does, and that the recipe does not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from src.hand.standin.build import build_standin_hand
from src.model.net import PoseNet
from src.train.optimizer import MuonAdamW, build_optimizer, orthogonalised
from tests.helpers import random_batch, small_config

CFG = small_config("TRAIN.optimizer=muon", "TRAIN.lr=1e-3", "MODEL.handec.dropout=0.0")


def network(seed: int = 0) -> PoseNet:
    torch.manual_seed(seed)
    return PoseNet(CFG.MODEL, build_standin_hand())


def backward(net: PoseNet, seed: int) -> None:
    net.zero_grad()
    output = net(random_batch(2, 56, seed))
    (output.joint_cam.square().mean() + output.joint_seen.square().mean()).backward()


@pytest.mark.parametrize("shape", [(24, 24), (16, 64), (64, 16)])
def test_orthogonalised(shape: tuple[int, int]) -> None:
    """Against the singular value decomposition: the same singular vectors, singular values near 1."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix)
    diagonal = left.T @ found @ right.T
    assert torch.allclose(diagonal - diagonal.diag().diag(), torch.zeros_like(diagonal), atol=1e-4)
    assert ((diagonal.diag() > 0.5) & (diagonal.diag() < 1.3)).all()


def test_muon_takes_the_matrices_of_the_blocks_alone() -> None:
    net = network()
    optimizer = build_optimizer(net, CFG)
    by_muon = {id(p) for g in optimizer.param_groups if g["muon"] for p in g["params"]}
    names = {name for name, p in net.named_parameters() if id(p) in by_muon}
    assert all(".layer." in name or "decoder.layers." in name for name in names)
    assert any(name.startswith("backbone.") for name in names)
    every = [p for g in optimizer.param_groups for p in g["params"]]
    trained = [p for p in net.parameters() if p.requires_grad]
    assert {id(p) for p in every} == {id(p) for p in trained}, "each parameter has one optimizer"
    assert len(every) == len(trained)


def test_size_of_a_first_step() -> None:
    """The update of each matrix is lr times 0.6 sqrt(longer side) times an orthogonal matrix of its own, though
    matrices of one shape are stepped together."""
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((8, 32), (32, 8), (8, 32))]
    optimizer = MuonAdamW([{"params": weights, "lr": 0.01, "weight_decay": 0.0, "muon": True}], lr=0.01)
    for seed, weight in enumerate(weights):
        weight.grad = 10**seed * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()
    for weight in weights:
        assert torch.allclose(weight, -0.01 * 0.6 * 32**0.5 * orthogonalised(weight.grad), atol=1e-6)


def test_resumes_exactly() -> None:
    def train(net: PoseNet, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            backward(net, step)
            optimizer.step()

    whole = network()
    train(whole, build_optimizer(whole, CFG), range(4))
    first = network()
    optimizer = build_optimizer(first, CFG)
    train(first, optimizer, range(2))
    second = network(seed=1)
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second, CFG)
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, range(2, 4))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_bad_step_changes_nothing() -> None:
    net = network()
    optimizer = build_optimizer(net, CFG)
    backward(net, 0)
    optimizer.step()
    before, state = copy_of(net.state_dict()), copy_of(optimizer.state_dict()["state"])
    backward(net, 1)
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(value, state[i][name]) for i, each in after.items() for name, value in each.items())


def copy_of(tree: Any) -> Any:
    return {k: copy_of(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.clone()


def test_the_recipe_trains_with_adamw() -> None:
    assert type(build_optimizer(network(), small_config())) is torch.optim.AdamW
