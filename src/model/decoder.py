"""The hand decoder: learned queries cross-attend to the image tokens, which carry features of the camera.

Shapes: B batch, N image tokens, Q queries, C backbone width, D decoder width, H heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from src.config import HandDecoderConfig
from src.model.attention import attend
from src.model.dropout import Dropout

INIT_WIDTH = 256  # hidden width of the MLP from the predicted keypoints to the initial queries


class Attention(nn.Module):
    """Multi-head attention.

    Dropout on the attention weights is a module too, so that `PoseNet.set_dropout_rate` finds every dropout.
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
    """Pre-norm layer: self-attention, cross-attention to the image tokens, MLP."""

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
    """Image tokens, their camera features and the predicted 2D keypoints -> one refined token per query.

    The keypoints initialise the queries through a projection per query: a finger depends on other joints than the root.
    """

    def __init__(
        self,
        cfg: HandDecoderConfig,
        dim_token: int,
        query_joint: Sequence[tuple[int, int]],
        dim_camera: int,
        dim_init: int,
    ) -> None:
        """
        Args:
            dim_token: width of the image tokens, C.
            query_joint: for each query the two of the 21 joints whose image features initialise it.
            dim_camera: number of camera features per token.
            dim_init: number of features of the predicted keypoints that initialise the queries.
        """
        super().__init__()
        num_query = len(query_joint)
        self.query = nn.Parameter(0.02 * torch.randn(num_query, cfg.dim))
        self.register_buffer("query_joint", torch.tensor(query_joint), persistent=False)
        self.from_joint = nn.Sequential(nn.LayerNorm(dim_token), nn.Linear(dim_token, 2 * cfg.dim))
        self.from_token = nn.Linear(dim_token, cfg.dim)
        self.from_camera = nn.Sequential(nn.Linear(dim_camera, cfg.dim), nn.GELU(), nn.Linear(cfg.dim, cfg.dim))
        self.from_evidence = nn.Sequential(  # the name is part of the checkpoint format
            nn.Linear(dim_init, INIT_WIDTH),
            nn.GELU(),
            nn.Linear(INIT_WIDTH, num_query * cfg.dim),
            nn.Unflatten(1, (num_query, cfg.dim)),
        )
        self.context_norm = nn.LayerNorm(cfg.dim)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.num_layer))
        self.out_norm = nn.LayerNorm(cfg.dim)

    def forward(
        self, token: torch.Tensor, at_joint: torch.Tensor, camera: torch.Tensor, query_init: torch.Tensor
    ) -> torch.Tensor:
        """Initialise and refine the queries.

        Args: token [B, N, C] image tokens; at_joint [B, 21, C] image features at each predicted keypoint; camera
        [B, N, dim_camera] of each token; query_init [B, dim_init] features of the keypoints. Returns: [B, Q, D].
        """
        context = self.context_norm(self.from_token(token) + self.from_camera(camera))
        first, second = self.from_joint(at_joint).chunk(2, dim=-1)
        query = self.query + self.from_evidence(query_init)
        query = query + first[:, self.query_joint[:, 0]] + second[:, self.query_joint[:, 1]]
        for layer in self.layers:
            query = layer(query, context)
        return self.out_norm(query)
