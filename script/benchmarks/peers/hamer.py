"""HaMeR's decoder and losses, rebuilt from the paper and the published configuration.

Pavlakos et al., "Reconstructing Hands in 3D with Transformers", CVPR 2024; github.com/geopavlakos/hamer. As published:
one zero token, 6 layers (width 1024, 8 heads of 64, MLP 1024, no dropout), one step of iterative error feedback from
the mean hand, 6D rotations, a weak-perspective camera, L1 on 3D and 2D keypoints and squared error on the parameters,
each summed over a sample, with the weights 0.05, 0.01, 0.001, 0.001, 0.0005.

In its favour: the camera uses the focal length of the patch (published: a constant 5000 px), starts at the typical
scale of a hand in a patch (published: 0.9) and stays above 1; attention heads are at least 16 wide. The adversarial
prior is omitted.
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
from src.geometry.camera import project
from src.geometry.rotation import axis_angle_to_matrix, matrix_to_rotation_6d, rotation_6d_to_matrix
from src.hand.skeleton import NUM_MANO_JOINT, HandArrays

START_SCALE = 2.0 / 0.3  # camera scale of a patch that shows 0.3 m
LEAST_SCALE = 1.0  # a patch 2 m wide


@dataclass(kw_only=True)
class HamerPrediction(Prediction):
    """Adds HaMeR's 2D keypoints: relative to the patch centre, in patch sides."""

    keypoint_2d: torch.Tensor  # [B, J, 2]


def _small_linear(dim: int, out: int) -> nn.Linear:
    """A head that starts near the mean hand: one of the two initialisations in the published code."""
    linear = nn.Linear(dim, out)
    nn.init.xavier_uniform_(linear.weight, gain=0.01)
    return linear


class HamerNet(PeerNet):
    """Our backbone with HaMeR's head."""

    LOSS_WEIGHT: ClassVar[Mapping[str, float]] = {
        "keypoint_3d": 0.05,
        "keypoint_2d": 0.01,
        "global_orient": 0.001,
        "hand_pose": 0.001,
        "betas": 0.0005,
    }

    def __init__(self, cfg: ModelConfig, hand: HandArrays) -> None:
        super().__init__(cfg, hand)
        dim = cfg.handec.dim
        shape = replace(cfg.handec, num_layer=6, num_head=8, dim_head=max(dim // 16, 16), dim_mlp=dim, dropout=0.0)
        self.decoder = OneTokenDecoder(shape, self.backbone.hidden_size)
        self.to_pose, self.to_shape, self.to_camera = (_small_linear(dim, n) for n in (6 * NUM_MANO_JOINT, 10, 3))
        mean = torch.cat([torch.zeros(3), self.hand.mean_pose]).view(NUM_MANO_JOINT, 3)
        self.register_buffer("mean_pose", matrix_to_rotation_6d(axis_angle_to_matrix(mean)))
        self.register_buffer("mean_camera", torch.tensor([START_SCALE, 0.0, 0.0]))
        self.set_dropout_rate(0.0)

    def decode(self, batch: Batch) -> torch.Tensor:
        return self.decoder(self.tokens(batch))

    def read_out(self, token: torch.Tensor, batch: Batch) -> HamerPrediction:
        rotmat = rotation_6d_to_matrix(self.mean_pose + self.to_pose(token).unflatten(1, (NUM_MANO_JOINT, 6)))
        shape = self.to_shape(token)
        focal, side = batch.patch_focal, self.img_size
        camera = self.mean_camera + self.to_camera(token)
        # bounded below, so the hand is neither behind the camera nor arbitrarily far away
        scale = LEAST_SCALE + nn.functional.softplus(camera[:, 0] - LEAST_SCALE)
        depth = 2.0 * focal.mean(1) / (side * scale)
        # mm, in a camera that looks at the patch centre
        place = 1000.0 * torch.cat([camera[:, 1:], depth[:, None]], dim=1)
        middle = torch.full_like(focal, (side - 1) / 2)
        root = torch.cat([place[:, :2] + (middle - batch.patch_princpt) / focal * place[:, 2:], place[:, 2:]], dim=1)
        out = self.assemble(batch, rotmat, shape, root)
        joint = out.joint_cam - root[:, None] + place[:, None]
        return HamerPrediction(**vars(out), keypoint_2d=project(joint, focal, torch.zeros_like(focal)) / side)

    def training_loss(self, batch: Batch) -> torch.Tensor:
        """The five losses, summed within a sample, averaged over the batch."""
        out = self(batch)
        target_rel = (batch.joint_cam - batch.joint_cam[:, :1]) / 1000.0
        joint_rel = (out.joint_cam - out.root_cam[:, None]) / 1000.0
        target_2d = (batch.joint_patch - (self.img_size - 1) / 2) / self.img_size
        rotmat_error = (out.mano_rotmat - self.hand.pose_to_rotmat(batch.mano_pose, batch.flat_hand_mean)).square()
        has_rel = batch.joint_3d_valid * batch.joint_3d_valid[:, :1]
        weight = self.loss_weight
        per_sample = (
            weight["keypoint_3d"] * ((joint_rel - target_rel).abs().sum(2) * has_rel).sum(1)
            + weight["keypoint_2d"] * ((out.keypoint_2d - target_2d).abs().sum(2) * batch.joint_2d_valid).sum(1)
            + weight["global_orient"] * rotmat_error[:, 0].sum((1, 2)) * batch.has_mano
            + weight["hand_pose"] * rotmat_error[:, 1:].sum((1, 2, 3)) * batch.has_mano
            + weight["betas"] * (out.mano_shape - batch.mano_shape).square().sum(1) * batch.has_mano
        )
        return per_sample.mean()
