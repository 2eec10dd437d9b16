"""Scaled dot-product attention: PyTorch's fused kernels, or explicit matrix products where those do not fit.

Shapes: B batch, H heads, Q queries, N keys, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, drop: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """q [B, H, Q, E], k and v [B, H, N, E] -> [B, H, Q, E]; `drop` is applied to the weights [B, H, Q, N].

    Computed explicitly in two cases: with dropout, because the fused kernels take the rate as a Python number, which a
    compiled graph would freeze; in bfloat16 on a CPU, because the fused kernel's backward pass is slower.
    """
    if drop is None and not (q.device.type == "cpu" and q.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v)
    weight = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1).to(v.dtype)
    return (weight if drop is None else drop(weight)) @ v
