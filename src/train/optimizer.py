"""AdamW with the recipe's parameter groups, and optionally Muon for the matrices of the transformer blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from src.config import Config
from src.model.net import PoseNet

MOMENTUM = 0.95
STACK = 2**22  # elements that are orthogonalised together
# Coefficients of the quintic iteration (Jordan et al., "Muon", 2024), and the RMS of an update in units of the learning
# rate. 0.2 would match AdamW's (Liu et al., arXiv 2502.16982), so that one rate serves both; 0.6 worked better here.
_QUINTIC, _NUM_ITERATION, _RMS = (3.4445, -4.7750, 2.0315), 5, 0.6


def build_optimizer(model: PoseNet, cfg: Config) -> torch.optim.AdamW:
    """The optimizer of a run, fused."""
    train = cfg.TRAIN
    groups = model.parameter_groups(train.lr, train.backbone_lr, train.weight_decay)
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr, fused=True)
    blocks = {id(p) for layers in model.transformer_blocks() for p in layers.parameters() if p.ndim == 2}
    # the orthogonalisation needs few digits: bfloat16 if the run sets it explicitly
    precision = torch.bfloat16 if train.mixed_precision == "bf16" else torch.float32
    return MuonAdamW([part for group in groups for part in _split(group, blocks)], train.lr, precision)


def _split(group: dict[str, Any], blocks: set[int]) -> list[dict[str, Any]]:
    """Split a group into the parameters for Muon and those for AdamW; empty groups are dropped."""
    parts = [
        {**group, "params": [p for p in group["params"] if (id(p) in blocks) == muon], "muon": muon}
        for muon in (True, False)
    ]
    return [part for part in parts if part["params"]]


class MuonAdamW(torch.optim.AdamW):
    """Fused AdamW, except that groups with `muon` true take orthogonalised momentum steps (Muon).

    Like fused AdamW it skips the step if `found_inf`, a tensor that the caller sets, is not zero, without waiting for
    the device.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, precision: torch.dtype = torch.float32) -> None:
        super().__init__(groups, lr=lr, fused=True)
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step for the parameters that have a gradient."""
        assert closure is None
        muon = [group for group in self.param_groups if group["muon"]]
        taken = [(p, p.grad) for group in muon for p in group["params"] if p.grad is not None]
        for parameter, _ in taken:
            parameter.grad = None  # AdamW skips parameters without one
        super().step()
        for parameter, gradient in taken:
            parameter.grad = gradient
        for group in muon:
            for parameters in _stacks([p for p in group["params"] if p.grad is not None]):
                self._orthogonal_step(group, parameters)

    def _orthogonal_step(self, group: dict[str, Any], parameters: Sequence[torch.Tensor]) -> None:
        """One step for several matrices of one shape [M, N]."""
        for parameter in parameters:
            if not self.state[parameter]:  # AdamW expects a `step` in every state that it loads
                step = torch.zeros((), device=parameter.device)
                self.state[parameter].update(step=step, momentum=torch.zeros_like(parameter))
        momenta, bad = [self.state[p]["momentum"] for p in parameters], getattr(self, "found_inf", None)
        gradient, momentum = torch.stack([p.grad for p in parameters]), torch.stack(momenta)
        moved = torch.lerp(gradient, momentum, MOMENTUM)
        ahead = torch.lerp(gradient, moved, MOMENTUM)  # Nesterov's momentum
        update = orthogonalised(ahead, self.precision).to(gradient.dtype)
        update *= group["lr"] * _RMS * max(update.shape[1:]) ** 0.5
        decay = group["lr"] * group["weight_decay"]
        if bad is not None:
            is_bad = bad > 0
            moved, update = torch.where(is_bad, momentum, moved), torch.where(is_bad, 0.0, update)
            decay = torch.where(is_bad, 0.0, decay)
        for parameter, kept, new_momentum, step in zip(parameters, momenta, moved, update, strict=True):
            kept.copy_(new_momentum)
            parameter.mul_(1.0 - decay).sub_(step)


def _stacks(parameters: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Group matrices by shape, at most STACK elements a group: one small matrix does not keep a device busy, and many
    large ones together would need as much memory again as the network."""
    alike: dict[torch.Size, list[torch.Tensor]] = {}
    for parameter in parameters:
        alike.setdefault(parameter.shape, []).append(parameter)
    for shape, of_shape in alike.items():
        count = max(1, STACK // shape.numel())
        for begin in range(0, len(of_shape), count):
            yield of_shape[begin : begin + count]


def orthogonalised(matrix: torch.Tensor, precision: torch.dtype = torch.float32) -> torch.Tensor:
    """Approximate U V^T of matrices U S V^T [..., M, N], with singular values in 0.7 to 1.2, by five Newton-Schulz
    steps."""
    a, b, c = _QUINTIC
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(precision)
    for _ in range(_NUM_ITERATION):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
