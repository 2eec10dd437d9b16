"""Dropout whose rate may change every step under `torch.compile`."""

from __future__ import annotations

import torch
from torch import nn


class Dropout(nn.Dropout):
    """`nn.Dropout` that keeps its rate in a tensor.

    `torch.compile` bakes the number `nn.Dropout.p` into the graph: each new value recompiles, and after eight it
    silently falls back to eager mode. Here the graph depends only on whether the rate is 0: two graphs at most.
    """

    @property
    def p(self) -> float:
        """The rate, 0 <= p < 1. Setting it fills the tensor in place, on its device."""
        return self._p

    @p.setter
    def p(self, rate: float) -> None:
        self._p, self.drops = rate, rate > 0.0
        if "rate" in self._buffers:
            self.rate.fill_(rate)
        else:
            self.register_buffer("rate", torch.tensor(float(rate)), persistent=False)

    @property
    def is_active(self) -> bool:
        """Whether the forward pass drops anything."""
        return self.training and self.drops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero a random share of the elements of x, of any shape, and scale the rest by 1 / (1 - rate)."""
        if not self.is_active:
            return x
        # drawn in float32: bfloat16 has 256 values between 0 and 1 and would round the rate
        kept = torch.rand(x.shape, device=x.device) >= self.rate
        return torch.where(kept, x / (1.0 - self.rate), 0.0)
