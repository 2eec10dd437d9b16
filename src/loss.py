"""The loss terms of a Prediction against a Batch.

Every term is a masked sum with a count of valid items. The mean is computed once per step, over all micro-batches and
processes. A sample without a label then neither dilutes a term nor changes the weight of other samples, and the same
global batch gives the same loss however it is split. Shapes: B batch, J = 21 joints, G x G tokens.
"""

from __future__ import annotations

import torch

from src.batch import Batch, Prediction
from src.config import LossConfig
from src.hand.mano import ManoLayer

LOSS_TERMS = (
    *("loss_theta", "loss_shape", "loss_trans", "loss_joint_rel", "loss_joint_img"),
    *("loss_joint_seen", "loss_joint_heat"),
)
NUM_TERM = len(LOSS_TERMS)
HEAT_SIGMA = 0.7  # in tokens: standard deviation of the target of loss_joint_heat


def loss_weights(cfg: LossConfig) -> torch.Tensor:
    """Weights [NUM_TERM] in the order of LOSS_TERMS."""
    in_3d = [cfg.lambda_theta, cfg.lambda_shape, cfg.lambda_trans, cfg.lambda_rel, cfg.lambda_img]
    return torch.tensor([*in_3d, cfg.lambda_seen, cfg.lambda_heat])


def _masks(batch: Batch) -> tuple[torch.Tensor, ...]:
    """One validity mask per term, [B] or [B, J]; 0 for padding."""
    real = (batch.position >= 0).float()
    has_root = batch.joint_3d_valid[:, 0] * real
    has_rel = has_root * (batch.joint_3d_valid[:, 1:] > 0).any(1)  # relative to itself, the root alone is always right
    joint_2d = batch.joint_2d_valid * real[:, None]
    in_patch = ((batch.joint_patch > -0.5) & (batch.joint_patch < batch.patch.shape[-1] - 0.5)).all(-1)
    return (
        batch.has_mano * real,
        batch.has_mano * real,
        batch.has_intr * has_root,
        batch.joint_3d_valid * has_rel[:, None],
        joint_2d,
        joint_2d,
        joint_2d * in_patch,
    )


def loss_counts(batch: Batch) -> torch.Tensor:
    """The number of valid items of each sample for each term of LOSS_TERMS, [B, NUM_TERM] float32."""
    return torch.stack([mask.flatten(1).sum(1) if mask.ndim > 1 else mask for mask in _masks(batch)], dim=1)


def loss_sums(prediction: Prediction, batch: Batch, hand: ManoLayer) -> torch.Tensor:
    """Each sample's masked sum of each term of LOSS_TERMS, [B, NUM_TERM] float32.

    * loss_theta: mean absolute difference of the 16 rotation matrices from those of the target's full pose.
    * loss_shape: mean absolute difference of the shape coefficients.
    * loss_trans: absolute difference of the wrist in the camera frame, mm, mean over axes. Needs intrinsics.
    * loss_joint_rel: absolute difference of wrist-relative joints, mm, mean over axes.
    * loss_joint_img: absolute difference of projected joints, px of the patch, mean over axes.
    * loss_joint_seen: the same for the predicted 2D keypoints, the query initialisation.
    * loss_joint_heat: KL divergence of a keypoint's token weights from a Gaussian around its target.

    The pose receives gradients from loss_theta, loss_joint_rel and loss_joint_img.
    """
    target_rotmat = hand.pose_to_rotmat(batch.mano_pose, batch.flat_hand_mean)
    target_rel = batch.joint_cam - batch.joint_cam[:, :1]
    joint_rel = prediction.joint_cam - prediction.root_cam[:, None]
    errors = (
        (prediction.mano_rotmat - target_rotmat).abs().mean((1, 2, 3)),
        (prediction.mano_shape - batch.mano_shape).abs().mean(1),
        (prediction.root_cam - batch.joint_cam[:, 0]).abs().mean(1),
        (joint_rel - target_rel).abs().mean(2),
        (prediction.joint_patch - batch.joint_patch).abs().mean(2),
        (prediction.joint_seen - batch.joint_patch).abs().mean(2),
        _heat_error(prediction.joint_heat, batch.joint_patch, batch.patch.shape[-1]),
    )
    masked = [error * mask for error, mask in zip(errors, _masks(batch), strict=True)]
    return torch.stack([term.flatten(1).sum(1) if term.ndim > 1 else term for term in masked], dim=1)


def _heat_error(heat: torch.Tensor, joint: torch.Tensor, img_size: int) -> torch.Tensor:
    """KL divergence [B, J] of log-probabilities over the tokens [B, G, G, J] from Gaussians of HEAT_SIGMA tokens around
    the joints [B, J, 2] px: the soft-argmax regularisation of Nibali et al., arXiv 1801.07372."""
    grid = heat.shape[1]
    centre = (joint + 0.5) * (grid / img_size) - 0.5  # in tokens
    offset = torch.arange(grid, device=joint.device) - centre[..., None]  # [B, J, 2, G]
    log_target = (-0.5 * (offset / HEAT_SIGMA).square()).log_softmax(dim=-1)
    target = log_target.exp()
    col, row = target.unbind(2)
    return (target * log_target).sum((2, 3)) - torch.einsum("bjr,bjc,brcj->bj", row, col, heat)


def mean_terms(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean of each term, [NUM_TERM]; 0 without valid items."""
    return sums / counts.clamp(min=1.0)
