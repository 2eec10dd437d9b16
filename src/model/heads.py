"""Heads: image tokens to 2D keypoints; refined queries to MANO rotations, MANO shape and the wrist.

Each is initialised to a sensible output (open hand, mean shape, centre of the patch) and learns the difference.
Shapes: B batch, N image tokens, C backbone width, D decoder width, S patch side in px.
"""

from __future__ import annotations

import torch
from torch import nn

from src.batch import NUM_JOINT
from src.geometry.camera import unproject
from src.geometry.rotation import rotation_6d_to_matrix
from src.hand.skeleton import NUM_MANO_JOINT
from src.model.tokens import token_centres

SCENE_WIDTH = 300.0  # mm: width of the scene that a patch shows at the hand's depth, for the initial depth


def _small_linear(dim: int, out: int) -> nn.Linear:
    """A linear layer whose initial output is close to zero."""
    linear = nn.Linear(dim, out)
    nn.init.normal_(linear.weight, std=0.002)
    nn.init.zeros_(linear.bias)
    return linear


class KeypointHead(nn.Module):
    """Image tokens -> 2D keypoints: every token votes for each joint with a weight and an offset from its centre.

    A vote needs only local image content, so keypoints are learned long before rotations; they initialise the decoder's
    queries.
    """

    def __init__(self, dim_token: int, grid_size: int, patch_size: int) -> None:
        super().__init__()
        self.vote = nn.Linear(dim_token, NUM_JOINT * 3)
        self.patch_size = patch_size
        self.register_buffer("centre", token_centres(grid_size, patch_size), persistent=False)

    def forward(self, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """token [B, N, C] -> keypoints [B, 21, 2] px of the patch, log of the votes' weights [B, N, 21]."""
        vote = self.vote(token).unflatten(-1, (NUM_JOINT, 3))  # [B, N, 21, 3]
        log_weight = vote[..., 0].float().log_softmax(dim=1)
        place = self.centre[:, None] + self.patch_size * vote[..., 1:]
        return (log_weight.exp()[..., None] * place).sum(dim=1), log_weight


class PoseHead(nn.Module):
    """One query per MANO joint -> its rotation, with a projection per joint to the 6D form (Zhou et al., CVPR 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.002 * torch.randn(NUM_MANO_JOINT, dim, 6))
        self.bias = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]).repeat(NUM_MANO_JOINT, 1))

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        """[B, 16, D] -> rotation matrices [B, 16, 3, 3]."""
        return rotation_6d_to_matrix(torch.einsum("bkd,kdr->bkr", query, self.weight) + self.bias)


class ShapeHead(nn.Module):
    """One query -> the ten shape coefficients."""

    def __init__(self, dim: int, num_shape: int) -> None:
        super().__init__()
        self.linear = _small_linear(dim, num_shape)

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        """[B, D] -> [B, 10]."""
        return self.linear(query)


class RootHead(nn.Module):
    """One query -> the wrist in the patch camera, as a pixel of the patch and a depth along that pixel's ray.

    The pixel is predicted as an offset from the wrist's keypoint, depth relative to `focal / S * SCENE_WIDTH`: the
    target is then independent of zoom and focal length, and no ground-truth hand size is needed to get millimetres.
    """

    def __init__(self, dim: int, img_size: int) -> None:
        super().__init__()
        self.linear = _small_linear(dim, 3)
        self.img_size = img_size

    def forward(
        self, query: torch.Tensor, keypoint: torch.Tensor, focal: torch.Tensor, princpt: torch.Tensor
    ) -> torch.Tensor:
        """query [B, D], the wrist's keypoint [B, 2] px, focal and princpt [B, 2] px -> wrist [B, 3] mm."""
        out = self.linear(query)
        pixel = keypoint + self.img_size * out[:, :2]
        depth = focal.mean(-1, keepdim=True) / self.img_size * SCENE_WIDTH * out[:, 2:].clamp(-5.0, 5.0).exp()
        return unproject(pixel[:, None], depth, focal, princpt)[:, 0]
