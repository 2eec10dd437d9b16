"""Scaled dot-product attention: the fused kernels of PyTorch, or written out where those are absent or slow.

Shapes: B batch, H heads, Q queries, N tokens that they look at, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

ATTENTION = "attend"  # the name under which transformers finds `attend`


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, drop: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.Tensor:
    """q [B, H, Q, E], k and v [B, H, N, E] -> [B, H, Q, E]; `drop` is applied to the weights [B, H, Q, N].

    With dropped weights it is written out because the fused kernels take the rate as a number, which a compiled graph
    would keep; in bfloat16 on a CPU because the fused kernel's backward pass takes there ten times as long.
    """
    if drop is None and not (q.device.type == "cpu" and q.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v)
    weight = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1).to(v.dtype)
    return (weight if drop is None else drop(weight)) @ v


def _attend_for_transformers(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, **_: Any
) -> tuple[torch.Tensor, None]:
    """`attend` as transformers calls it and wants it back, [B, Q, H, E]; a ViT has no mask."""
    assert mask is None
    return attend(q, k, v).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attend_for_transformers)
