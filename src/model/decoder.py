"""The hand decoder: learned queries read the image tokens by cross-attention, knowing how the camera sees each token.

Shapes: B batch, N image tokens, Q queries, C backbone width, D decoder width, H heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from src.config import HandDecoderConfig
from src.model.attention import attend
from src.model.dropout import Dropout

EVIDENCE_WIDTH = 256  # of the layer between the evidence and what each query takes from it


class Attention(nn.Module):
    """Multi-head attention.

    Both dropouts are modules, the one on the attention weights too, so that whoever walks the network's modules to set
    a rate meets every place that drops.
    """

    def __init__(self, dim: int, num_head: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        inner = num_head * dim_head
        self.num_head = num_head
        self.to_query = nn.Linear(dim, inner, bias=False)
        self.to_key_value = nn.Linear(dim, 2 * inner, bias=False)
        self.weight_dropout = Dropout(dropout)
        self.to_out = nn.Linear(inner, dim)
        self.out_dropout = Dropout(dropout)

    def forward(self, query: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """query [B, Q, D] attends to context [B, N, D] -> [B, Q, D]."""
        q = self._split_heads(self.to_query(query))
        k, v = (self._split_heads(t) for t in self.to_key_value(context).chunk(2, dim=-1))
        drop = self.weight_dropout if self.weight_dropout.is_active else None
        out = attend(q, k, v, drop)
        return self.out_dropout(self.to_out(out.transpose(1, 2).flatten(2)))  # out: [B, H, Q, E]

    def _split_heads(self, token: torch.Tensor) -> torch.Tensor:
        return token.unflatten(-1, (self.num_head, -1)).transpose(1, 2)


class DecoderLayer(nn.Module):
    """Pre-norm: queries look at each other, then at the image, then think."""

    def __init__(self, cfg: HandDecoderConfig) -> None:
        super().__init__()
        attention = (cfg.dim, cfg.num_head, cfg.dim_head, cfg.dropout)
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(cfg.dim) for _ in range(3))
        self.self_attention = Attention(*attention)
        self.cross_attention = Attention(*attention)
        self.mlp = nn.Sequential(
            nn.Linear(cfg.dim, cfg.dim_mlp),
            nn.GELU(),
            Dropout(cfg.dropout),
            nn.Linear(cfg.dim_mlp, cfg.dim),
            Dropout(cfg.dropout),
        )

    def forward(self, query: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """query [B, Q, D], context [B, N, D] -> [B, Q, D]."""
        normed = self.self_norm(query)
        query = query + self.self_attention(normed, normed)
        query = query + self.cross_attention(self.cross_norm(query), context)
        return query + self.mlp(self.mlp_norm(query))


class HandDecoder(nn.Module):
    """Image tokens, their camera features and the joints seen in the patch -> one refined token per query.

    Each query takes from the joints what it needs, by a map of its own: a finger's query is about other joints than the
    root's.
    """

    def __init__(
        self,
        cfg: HandDecoderConfig,
        dim_token: int,
        query_joint: Sequence[tuple[int, int]],
        dim_camera: int,
        dim_evidence: int,
    ) -> None:
        """query_joint: the two of the 21 joints whose image features each query starts from."""
        super().__init__()
        num_query = len(query_joint)
        self.query = nn.Parameter(0.02 * torch.randn(num_query, cfg.dim))
        self.register_buffer("query_joint", torch.tensor(query_joint), persistent=False)
        self.from_joint = nn.Sequential(nn.LayerNorm(dim_token), nn.Linear(dim_token, 2 * cfg.dim))
        self.from_token = nn.Linear(dim_token, cfg.dim)
        self.from_camera = nn.Sequential(nn.Linear(dim_camera, cfg.dim), nn.GELU(), nn.Linear(cfg.dim, cfg.dim))
        self.from_evidence = nn.Sequential(
            nn.Linear(dim_evidence, EVIDENCE_WIDTH),
            nn.GELU(),
            nn.Linear(EVIDENCE_WIDTH, num_query * cfg.dim),
            nn.Unflatten(1, (num_query, cfg.dim)),
        )
        self.context_norm = nn.LayerNorm(cfg.dim)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.num_layer))
        self.out_norm = nn.LayerNorm(cfg.dim)

    def forward(
        self, token: torch.Tensor, at_joint: torch.Tensor, camera: torch.Tensor, evidence: torch.Tensor
    ) -> torch.Tensor:
        """Refine the queries.

        Args: token [B, N, C]; at_joint [B, 21, C] the image features where each joint was located; camera
        [B, N, dim_camera]; evidence [B, dim_evidence]. Returns: [B, Q, D].
        """
        context = self.context_norm(self.from_token(token) + self.from_camera(camera))
        here, beyond = self.from_joint(at_joint).chunk(2, dim=-1)
        query = self.query + self.from_evidence(evidence)
        query = query + here[:, self.query_joint[:, 0]] + beyond[:, self.query_joint[:, 1]]
        for layer in self.layers:
            query = layer(query, context)
        return self.out_norm(query)
