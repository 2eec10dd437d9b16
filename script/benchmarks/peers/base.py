"""What the peers share: our backbone, hand model and Prediction. Only decoder and losses differ.

Shapes: B batch, S patch side, N image tokens, C backbone width, D decoder width, J = 21 joints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from src.batch import Batch, Prediction
from src.config import HandDecoderConfig, ModelConfig
from src.geometry.camera import project
from src.geometry.rotation import matrix_to_axis_angle
from src.hand.mano import ManoLayer
from src.hand.skeleton import HandArrays
from src.model.backbone import Backbone
from src.model.decoder import DecoderLayer
from src.model.net import PoseNet


class PeerNet(nn.Module):
    """A network with another project's decoder and losses.

    A subclass defines `LOSS_WEIGHT`, `decode(batch) -> [B, D]`, `read_out(token, batch) -> Prediction` in float32, and
    `training_loss(batch) -> scalar tensor`, whose terms are weighted by `loss_weight` (at first `LOSS_WEIGHT`).
    """

    LOSS_WEIGHT: ClassVar[Mapping[str, float]]  # as published

    def __init__(self, cfg: ModelConfig, hand: HandArrays) -> None:
        super().__init__()
        self.img_size = cfg.img_size
        self.backbone = Backbone(cfg.backbone, cfg.img_size)
        self.hand = ManoLayer(hand)
        self.register_buffer("img_mean", torch.tensor(cfg.img_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("img_std", torch.tensor(cfg.img_std).view(1, 3, 1, 1), persistent=False)
        self.dropout_rate = -1.0
        self.loss_weight = self.LOSS_WEIGHT

    parameter_groups = PoseNet.parameter_groups
    set_dropout_rate = PoseNet.set_dropout_rate

    def forward(self, batch: Batch) -> Prediction:
        token = self.decode(batch)
        with torch.autocast(token.device.type, enabled=False):
            return self.read_out(token.float(), batch)

    def tokens(self, batch: Batch) -> torch.Tensor:
        """Image tokens [B, N, C] of the normalised patches."""
        return self.backbone((batch.patch.float() / 255.0 - self.img_mean) / self.img_std)

    def assemble(self, batch: Batch, rotmat: torch.Tensor, shape: torch.Tensor, root: torch.Tensor) -> Prediction:
        """The Prediction from rotations [B, 16, 3, 3], shape [B, 10] and wrist position [B, 3] mm."""
        vert, joint = self.hand(rotmat, shape)
        joint_cam = joint + root[:, None]
        joint_patch = project(joint_cam, batch.patch_focal, batch.patch_princpt)
        return Prediction(
            mano_rotmat=rotmat,
            mano_pose=matrix_to_axis_angle(rotmat).flatten(1),
            mano_shape=shape,
            root_cam=root,
            joint_cam=joint_cam,
            vert_cam=vert + root[:, None],
            joint_patch=joint_patch,
            joint_seen=joint_patch,
        )


class OneTokenDecoder(nn.Module):
    """A transformer decoder with a single learned query. The published decoders project a constant and add a learned
    position embedding, which is equivalent. Pre-norm layers, no final norm."""

    def __init__(self, cfg: HandDecoderConfig, dim_token: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, cfg.dim))
        self.from_token = nn.Identity() if dim_token == cfg.dim else nn.Linear(dim_token, cfg.dim)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.num_layer))

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        """Image tokens [B, N, C] -> [B, D]."""
        context = self.from_token(token)
        query = self.query.expand(len(token), -1, -1)
        for layer in self.layers:
            query = layer(query, context)
        return query[:, 0]
