"""PoseNet: a Batch in, a Prediction out. Combines backbone, hand decoder, heads and the hand model.

Shapes: B batch, S patch side in px, N image tokens, G tokens along a side, Q = 18 queries (16 joints, shape, root).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from src.batch import NUM_JOINT, NUM_SHAPE, Batch, Prediction
from src.config import ModelConfig
from src.geometry.camera import project
from src.geometry.rotation import matrix_to_axis_angle
from src.hand.mano import ManoLayer
from src.hand.skeleton import MANO_TO_OPENPOSE, MIDDLE_KNUCKLE, NUM_MANO_JOINT, WRIST, HandArrays
from src.model.backbone import Backbone
from src.model.decoder import HandDecoder
from src.model.hand_frame import HandFrame, hand_frame
from src.model.heads import KeypointHead, PoseHead, RootHead, ShapeHead
from src.model.tokens import CAMERA_FEATURES, camera_features, log_zoom, token_centres

KEYPOINT_GAIN = 4.0  # scales the keypoints' spread, in patch sides, to about one
NUM_QUERY_INIT = 2 * NUM_JOINT + 6
# The joints at both ends of the bone that each MANO joint rotates; wrist and middle knuckle for wrist, shape and root.
_OPENPOSE_OF_MANO = [MANO_TO_OPENPOSE.index(joint) for joint in range(NUM_MANO_JOINT)]
_BONE_ENDS = [(joint, joint + 1) for joint in _OPENPOSE_OF_MANO[1:]]
QUERY_JOINT = ((WRIST, MIDDLE_KNUCKLE), *_BONE_ENDS, (WRIST, MIDDLE_KNUCKLE), (WRIST, MIDDLE_KNUCKLE))


class PoseNet(nn.Module):
    """Single-image 3D hand: MANO pose, MANO shape and the wrist position in the camera.

    It reads only `patch`, `patch_focal` and `patch_princpt` of a Batch, so predictions never use ground truth.
    """

    def __init__(self, cfg: ModelConfig, hand: HandArrays, backbone_shape: Mapping[str, Any] | None = None) -> None:
        """`backbone_shape`: see `Backbone`."""
        super().__init__()
        self.img_size = cfg.img_size
        self.backbone = Backbone(cfg.backbone, cfg.img_size, backbone_shape)
        grid_size, patch_size, width = self.backbone.grid_size, self.backbone.patch_size, self.backbone.hidden_size
        self.keypoint_head = KeypointHead(width, grid_size, patch_size)
        self.decoder = HandDecoder(
            cfg.handec, width, QUERY_JOINT, dim_camera=CAMERA_FEATURES + 2, dim_init=NUM_QUERY_INIT
        )
        self.pose_head = PoseHead(cfg.handec.dim)
        self.shape_head = ShapeHead(cfg.handec.dim, NUM_SHAPE)
        self.root_head = RootHead(cfg.handec.dim, cfg.img_size)
        self.hand = ManoLayer(hand)
        self.register_buffer("centre", token_centres(grid_size, patch_size), persistent=False)
        self.register_buffer("img_mean", torch.tensor(cfg.img_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("img_std", torch.tensor(cfg.img_std).view(1, 3, 1, 1), persistent=False)
        self.dropout_rate = -1.0  # not set yet
        self.set_dropout_rate(cfg.handec.dropout)

    def set_dropout_rate(self, rate: float) -> None:
        """Set this rate in every `nn.Dropout` of the network. Called before each training step; free if unchanged.

        Raises:
            ValueError: for a rate outside [0, 1).
        """
        if rate == self.dropout_rate:
            return
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout rate {rate}: must be in [0, 1)")
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate
        self.dropout_rate = rate

    def forward(self, batch: Batch) -> Prediction:
        """Predict the hands of a batch, of which only `patch` [B, 3, S, S] uint8, `patch_focal` and `patch_princpt`
        [B, 2] px are read. `Prediction` (src/batch.py) lists shapes and units of the result."""
        return self.predict_patch(batch.patch, batch.patch_focal, batch.patch_princpt)

    def predict_patch(self, patch: torch.Tensor, focal: torch.Tensor, princpt: torch.Tensor) -> Prediction:
        """`forward` without a Batch: patch [B, 3, S, S] uint8, focal and princpt [B, 2] px of the patch camera."""
        token = self.backbone((patch.float() / 255.0 - self.img_mean) / self.img_std)
        keypoint, heat = self.keypoint_head(token)
        with torch.autocast(token.device.type, enabled=False):
            frame = hand_frame(keypoint, focal, princpt, self.img_size)
            camera = camera_features(self.centre, focal, princpt, self.img_size)
            camera = torch.cat([camera, KEYPOINT_GAIN * frame.project(self.centre, focal, princpt)], dim=-1)
            # queries start from the keypoints as the hand camera sees them, their spread, its rotation, and the zoom
            joint = KEYPOINT_GAIN * frame.project(keypoint.float(), focal, princpt)
            spread = (joint - joint.mean(dim=1, keepdim=True)).square().sum(-1).mean(dim=1, keepdim=True)
            turn = torch.cat([frame.rot[:, :2, 0], frame.rot[:, :2, 2]], dim=1)
            zoom = log_zoom(focal, self.img_size)
            query_init = torch.cat([joint.flatten(1), (spread + 1e-6).log(), turn, zoom], dim=1)
        at_joint = torch.einsum("bnj,bnc->bjc", heat.detach().exp().to(token.dtype), token)
        query = self.decoder(token, at_joint, camera, query_init)
        with torch.autocast(query.device.type, enabled=False):
            return self._predict(query.float(), keypoint.float(), heat, frame, focal, princpt)

    def _predict(
        self,
        query: torch.Tensor,
        keypoint: torch.Tensor,
        heat: torch.Tensor,
        frame: HandFrame,
        focal: torch.Tensor,
        princpt: torch.Tensor,
    ) -> Prediction:
        """Refined queries [B, Q, D], keypoints [B, 21, 2] px and their log weights [B, N, 21] to a Prediction."""
        root_rot, finger_rot = self.pose_head(query[:, :NUM_MANO_JOINT]).split([1, NUM_MANO_JOINT - 1], dim=1)
        rotmat = torch.cat([frame.rot[:, None] @ root_rot, finger_rot], dim=1)
        shape = self.shape_head(query[:, NUM_MANO_JOINT])
        root = self.root_head(query[:, NUM_MANO_JOINT + 1], keypoint[:, 0].detach(), focal, princpt)
        vert, joint = self.hand(rotmat, shape)
        joint_cam = joint + root[:, None]
        return Prediction(
            mano_rotmat=rotmat,
            mano_pose=matrix_to_axis_angle(rotmat).flatten(1),
            mano_shape=shape,
            root_cam=root,
            joint_cam=joint_cam,
            vert_cam=vert + root[:, None],
            joint_patch=project(joint_cam, focal, princpt),
            joint_seen=keypoint,
            joint_heat=heat.unflatten(1, (self.backbone.grid_size, -1)),
        )

    def transformer_blocks(self) -> list[nn.ModuleList]:
        """The layers of backbone and decoder."""
        return [self.backbone.model.encoder.layer, self.decoder.layers]

    def parameter_groups(self, lr: float, backbone_lr: float | None, weight_decay: float) -> list[dict]:
        """Optimizer groups: backbone and rest, matrices with weight decay and vectors without.

        A `backbone_lr` of None freezes the backbone: its parameters are in no group and require no gradient.
        Each group carries `peak_lr`, which the schedule scales to `lr`.
        """
        if backbone_lr is None:
            self.backbone.requires_grad_(False)
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                key = (name.startswith("backbone."), parameter.ndim >= 2)
                groups.setdefault(key, []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": (peak := backbone_lr if in_backbone else lr),
                "peak_lr": peak,
                "weight_decay": weight_decay if is_matrix else 0.0,
            }
            for (in_backbone, is_matrix), parameters in groups.items()
        ]
