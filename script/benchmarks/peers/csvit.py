"""CS-ViT2's decoder and losses, rebuilt from its published configuration (stage 1, DINOv2-large) and source.

github.com/Mine268/CS-ViT2. As published: one token, 4 layers of 16 heads, MLP 4 x the width; a cross-attention layer
adds the directions of an 8 x 8 grid of rays to the image tokens, through a zero-initialised linear map; pose as
axis-angle relative to MANO's mean pose; the wrist in lengths of the middle finger by soft-argmax over 512 + 512 + 1024
bins between mean - 5 and mean + 4 standard deviations, trained by cross-entropy against a Gaussian (0.09); L1 on pose,
shape, wrist-relative joints (shape detached) and projected joints; weights 3, 3, 0.05, 0.012, 0.002.

In its favour: no dropout (published: 0.1 after a tenth of the run), and pixel errors are scaled to a 224 px patch. The
class token is omitted. The metric uses the predicted finger length; the published code uses the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from script.benchmarks.peers.base import OneTokenDecoder, PeerNet
from src.batch import Batch, Prediction
from src.config import ModelConfig
from src.geometry.camera import pixel_ray, project
from src.hand.skeleton import FINGER_JOINTS, NUM_MANO_JOINT, HandArrays
from src.model.decoder import DecoderLayer

NUM_BIN = (512, 512, 1024)
BINS_BELOW, BINS_ABOVE = 5.0, 4.0  # standard deviations
SIGMA = 0.09  # of the target Gaussian, in finger lengths
NUM_RAY = 8  # a side
# Published mean and standard deviation of wrist / finger length over its training sets; `fit` replaces them.
MEAN, STD = (-0.27, 0.03, 10.43), (1.45, 1.27, 2.25)


@dataclass(kw_only=True)
class CsVitPrediction(Prediction):
    """Adds what its losses compare: pose relative to the mean pose, wrist in finger lengths and its log-heatmaps."""

    pose: torch.Tensor  # [B, 48]
    place: torch.Tensor  # [B, 3] finger lengths
    log_heatmap: tuple[torch.Tensor, ...]  # x, y, z: [B, bins]


def finger_length(joint: torch.Tensor) -> torch.Tensor:
    """Length of the middle finger's three bones, [B, 1] mm, of joints [B, J, 3]."""
    chain = joint[:, list(FINGER_JOINTS["middle"])]
    return (chain[:, 1:] - chain[:, :-1]).norm(dim=2).sum(1, keepdim=True)


class RayEmbedder(nn.Module):
    """Cross-attention of the image tokens to camera rays: one decoder layer with a zero-initialised output map."""

    def __init__(self, cfg: ModelConfig, dim: int, num_token: int) -> None:
        super().__init__()
        shape = replace(cfg.handec, dim=dim, num_head=8, dim_head=max(dim // 16, 16), dim_mlp=4 * dim, dropout=0.0)
        self.embed = nn.Linear(dim, dim)
        self.position = nn.Parameter(torch.randn(1, num_token, dim))
        self.from_ray = nn.Linear(4, dim)
        self.layer = DecoderLayer(shape)
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.out.weight)
        edge = (torch.arange(NUM_RAY) + 0.5) / NUM_RAY
        self.register_buffer("grid", torch.cartesian_prod(edge, edge), persistent=False)  # [64, 2] of the patch
        self.img_size = cfg.img_size

    def forward(self, token: torch.Tensor, batch: Batch) -> torch.Tensor:
        """token [B, N, C] -> [B, N, C]."""
        ray = pixel_ray(self.grid * self.img_size - 0.5, batch.patch_focal, batch.patch_princpt)
        ray = ray / (1.0 + ray.square().sum(-1, keepdim=True)).sqrt()  # x and y of the unit direction
        context = self.from_ray(torch.cat([ray, self.grid.expand(len(ray), -1, -1)], dim=2))
        return token + self.out(self.layer(self.embed(token) + self.position, context))


class CsVitNet(PeerNet):
    """Our backbone with CS-ViT2's head."""

    LOSS_WEIGHT: ClassVar[Mapping[str, float]] = {"theta": 3.0, "shape": 3.0, "trans": 0.05, "rel": 0.012, "img": 0.002}

    def __init__(self, cfg: ModelConfig, hand: HandArrays) -> None:
        super().__init__(cfg, hand)
        dim, width = cfg.handec.dim, self.backbone.hidden_size
        shape = replace(cfg.handec, num_layer=4, num_head=16, dim_head=max(dim // 16, 8), dim_mlp=4 * dim, dropout=0.0)
        self.rays = RayEmbedder(cfg, width, self.backbone.grid_size**2)
        self.decoder = OneTokenDecoder(shape, width)
        self.to_pose, self.to_shape = nn.Linear(dim, 3 * NUM_MANO_JOINT), nn.Linear(dim, 10)
        self.to_bin = nn.ModuleList(nn.Linear(dim, num, bias=False) for num in NUM_BIN)
        for axis, num in enumerate(NUM_BIN):
            self.register_buffer(f"bin{axis}", torch.zeros(num))
        self._set_bins(torch.tensor(MEAN), torch.tensor(STD))
        self.set_dropout_rate(0.0)

    def fit(self, data: Batch) -> None:
        """Place the bins from the training set's wrist positions, as its preprocessing does."""
        place = data.joint_cam[:, 0] / finger_length(data.joint_cam)
        self._set_bins(place.mean(0), place.std(0))

    def _set_bins(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        low, high = (mean - BINS_BELOW * std).tolist(), (mean + BINS_ABOVE * std).tolist()
        for axis, num in enumerate(NUM_BIN):
            getattr(self, f"bin{axis}").copy_(torch.linspace(low[axis], high[axis], num))

    def decode(self, batch: Batch) -> torch.Tensor:
        return self.decoder(self.rays(self.tokens(batch), batch))

    def read_out(self, token: torch.Tensor, batch: Batch) -> CsVitPrediction:
        pose, shape = self.to_pose(token), self.to_shape(token)
        log_heatmap = tuple(to_bin(token).log_softmax(1) for to_bin in self.to_bin)
        place = torch.stack([(h.exp() * getattr(self, f"bin{i}")).sum(1) for i, h in enumerate(log_heatmap)], dim=1)
        rotmat = self.hand.pose_to_rotmat(pose, False)
        length = finger_length(self.hand(rotmat, shape).joint)
        out = self.assemble(batch, rotmat, shape, place * length)
        return CsVitPrediction(**vars(out), pose=pose, place=place, log_heatmap=log_heatmap)

    def training_loss(self, batch: Batch) -> torch.Tensor:
        """The five losses, each averaged over the batch."""
        out = self(batch)
        root_valid = batch.joint_3d_valid[:, :1]
        length = finger_length(batch.joint_cam).clamp(min=1.0)
        joint_rel = self.hand(out.mano_rotmat, out.mano_shape.detach()).joint
        joint_cam = joint_rel + (out.place * length)[:, None]
        joint_patch = project(joint_cam, batch.patch_focal, batch.patch_princpt)
        heat = self._heatmap_loss(out.log_heatmap, batch.joint_cam[:, 0] / length)
        rel = (joint_rel - (batch.joint_cam - batch.joint_cam[:, :1])).abs().mean(2)
        img = (joint_patch - batch.joint_patch).abs().mean(2) * (224.0 / self.img_size)
        weight = self.loss_weight
        return (
            weight["theta"] * ((out.pose - self._target_pose(batch)).abs().mean(1) * batch.has_mano).mean()
            + weight["shape"] * ((out.mano_shape - batch.mano_shape).abs().mean(1) * batch.has_mano).mean()
            + weight["trans"] * (heat * root_valid[:, 0] * batch.has_intr).mean()
            + weight["rel"] * (rel * batch.joint_3d_valid * root_valid).mean()
            + weight["img"] * (img * batch.joint_2d_valid).mean()
        )

    def _target_pose(self, batch: Batch) -> torch.Tensor:
        """[B, 48] relative to the model's mean pose."""
        offset = batch.flat_hand_mean.float()[:, None] * self.hand.mean_pose
        return torch.cat([batch.mano_pose[:, :3], batch.mano_pose[:, 3:] - offset], dim=1)

    def _heatmap_loss(self, log_heatmap: tuple[torch.Tensor, ...], target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy against a Gaussian around the target [B, 3], summed over the axes, [B]."""
        total = torch.zeros(len(target), device=target.device)
        for axis, log_share in enumerate(log_heatmap):
            gaussian = (-(target[:, axis, None] - getattr(self, f"bin{axis}")).square() / (2 * SIGMA**2)).softmax(1)
            total = total - (gaussian * log_share).sum(1)
        return total
