"""PoseNet: a Batch in, a Prediction out. Backbone, hand decoder, heads and the hand model are put together here.

Shapes: B batch, S patch side in px, N image tokens, Q = 18 queries (16 joints, shape, root).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from src.batch import NUM_JOINT, NUM_SHAPE, Batch, Prediction
from src.checkpoint.network import SavedNetwork, choose_hand, load_weights_into, read_checkpoint
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
from src.predict.predictor import Hands, aims_at_hands, predict_hands

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

EVIDENCE_GAIN = 4.0  # brings the spread of a hand's joints, in sides of the patch, to about one
NUM_EVIDENCE = 2 * NUM_JOINT + 6
# The joints at both ends of the bone that each MANO joint turns; wrist and middle knuckle for wrist, shape and root.
_OPENPOSE_OF_MANO = [MANO_TO_OPENPOSE.index(joint) for joint in range(NUM_MANO_JOINT)]
_BONE_ENDS = [(joint, joint + 1) for joint in _OPENPOSE_OF_MANO[1:]]
QUERY_JOINT = ((WRIST, MIDDLE_KNUCKLE), *_BONE_ENDS, (WRIST, MIDDLE_KNUCKLE), (WRIST, MIDDLE_KNUCKLE))


class PoseNet(nn.Module):
    """Single-image 3D hand: MANO pose, MANO shape and the wrist's place in the camera.

    Of a Batch it reads `patch`, `patch_focal` and `patch_princpt` alone: nothing of the target can reach a prediction.
    """

    def __init__(self, cfg: ModelConfig, hand: HandArrays, backbone_shape: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.img_size = cfg.img_size
        self.backbone = Backbone(cfg.backbone, cfg.img_size, backbone_shape)
        grid_size, patch_size, width = self.backbone.grid_size, self.backbone.patch_size, self.backbone.hidden_size
        self.keypoint_head = KeypointHead(width, grid_size, patch_size)
        self.decoder = HandDecoder(
            cfg.handec, width, QUERY_JOINT, dim_camera=CAMERA_FEATURES + 2, dim_evidence=NUM_EVIDENCE
        )
        self.pose_head = PoseHead(cfg.handec.dim)
        self.shape_head = ShapeHead(cfg.handec.dim, NUM_SHAPE)
        self.root_head = RootHead(cfg.handec.dim, cfg.img_size)
        self.hand = ManoLayer(hand)
        self.register_buffer("centre", token_centres(grid_size, patch_size), persistent=False)
        self.register_buffer("img_mean", torch.tensor(cfg.img_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("img_std", torch.tensor(cfg.img_std).view(1, 3, 1, 1), persistent=False)
        self.saved: SavedNetwork | None = None  # the checkpoint it came from
        self.dropout_rate = -1.0  # none pushed yet
        self.set_dropout_rate(cfg.handec.dropout)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        hand_model: str | Path | HandArrays | None = None,
        device: torch.device | str = "cpu",
    ) -> PoseNet:
        """A trained network, in eval mode. Needs no weights of the backbone: the checkpoint holds them all.

        Args:
            path: a run folder (its newest whole checkpoint), one checkpoint in it, or `<run folder>/checkpoints/best`.
            hand_model: a file with MANO's arrays, `standin`, or the arrays; absent: what the configuration names.

        Raises:
            ValueError: naming the file that is missing or damaged, or the hand model that is not there.
        """
        saved = read_checkpoint(path)
        net = cls(saved.model, choose_hand(saved, hand_model), saved.backbone_shape)
        load_weights_into(net, saved)
        net.saved = saved
        return net.to(device).eval()

    def predict(
        self,
        images: Sequence[np.ndarray],
        boxes: Sequence[ArrayLike] | None = None,
        focal: ArrayLike | None = None,
        princpt: ArrayLike | None = None,
        is_right: bool | Sequence[ArrayLike] = True,
        batch_size: int = 16,
    ) -> Hands:
        """The hands in photographs, each in its photograph's camera; only for a network from `from_checkpoint`.

        Args:
            images: M arrays [H, W, 3] uint8 RGB, of any sizes.
            boxes: for each image [4] or [n, 4], xyxy px around a hand's joints; None: each image is a crop of one hand.
            focal: px; a number or [2] for all images, or [M, 2]; None guesses the image's diagonal.
            princpt: px; [2] for all images, or [M, 2]; None is the image's centre.
            is_right: a bool for all hands, or for each image a bool or [n].
            batch_size: hands that go through the network at once.

        Returns:
            Hands, in the order of the boxes; `image_index` says which image each is in.

        Raises:
            ValueError: naming the image that, or whose box or camera, cannot be used.
        """
        if self.saved is None:
            raise ValueError("this network did not come from a checkpoint, which knows how wide to cut the patches")
        aims, owner = aims_at_hands(images, boxes, focal, princpt, is_right, self.saved.expansion_ratio)
        return predict_hands(self, images, aims, owner, batch_size)

    def set_dropout_rate(self, rate: float) -> None:
        """Give every `nn.Dropout` of the network this rate, before each training step; an unchanged rate is free.

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
        """Predict the hands of a batch.

        Args:
            batch: of which `patch` [B, 3, S, S] uint8, `patch_focal` [B, 2] px and `patch_princpt` [B, 2] px are read.

        Returns:
            Prediction in the patch camera, float32, with `mano_rotmat` [B, 16, 3, 3], `mano_pose` [B, 48],
            `mano_shape` [B, 10], `root_cam` [B, 3] mm, `joint_cam` [B, 21, 3] mm, `vert_cam` [B, V, 3] mm,
            `joint_patch` and `joint_seen` [B, 21, 2] px, `joint_heat` [B, G, G, 21].
        """
        return self.predict_patch(batch.patch, batch.patch_focal, batch.patch_princpt)

    def predict_patch(self, patch: torch.Tensor, focal: torch.Tensor, princpt: torch.Tensor) -> Prediction:
        """`forward` without a Batch: patch [B, 3, S, S] uint8, focal and princpt [B, 2] px of the patch camera."""
        token = self.backbone((patch.float() / 255.0 - self.img_mean) / self.img_std)
        seen, heat = self.keypoint_head(token)
        with torch.autocast(token.device.type, enabled=False):
            frame = hand_frame(seen, focal, princpt, self.img_size)
            camera = camera_features(self.centre, focal, princpt, self.img_size)
            camera = torch.cat([camera, EVIDENCE_GAIN * frame.see(self.centre, focal, princpt)], dim=-1)
            evidence = self._evidence(seen.float(), frame, focal, princpt)
        at_joint = torch.einsum("bnj,bnc->bjc", heat.detach().exp().to(token.dtype), token)
        query = self.decoder(token, at_joint, camera, evidence)
        with torch.autocast(query.device.type, enabled=False):
            return self._predict(query.float(), seen.float(), heat, frame, focal, princpt)

    def _evidence(
        self, seen: torch.Tensor, frame: HandFrame, focal: torch.Tensor, princpt: torch.Tensor
    ) -> torch.Tensor:
        """What the decoder's queries start from, [B, NUM_EVIDENCE]: the joints seen in the patch [B, 21, 2] px as the
        hand's camera sees them and how far they spread, how that camera is turned, and the zoom."""
        joint = EVIDENCE_GAIN * frame.see(seen, focal, princpt)
        spread = (joint - joint.mean(dim=1, keepdim=True)).square().sum(-1).mean(dim=1, keepdim=True)
        turn = torch.cat([frame.rot[:, :2, 0], frame.rot[:, :2, 2]], dim=1)
        return torch.cat([joint.flatten(1), (spread + 1e-6).log(), turn, log_zoom(focal, self.img_size)], dim=1)

    def _predict(
        self,
        query: torch.Tensor,
        seen: torch.Tensor,
        heat: torch.Tensor,
        frame: HandFrame,
        focal: torch.Tensor,
        princpt: torch.Tensor,
    ) -> Prediction:
        """Refined queries [B, Q, D], located joints [B, 21, 2] px and their weights [B, N, 21] to a Prediction, in
        float32."""
        root_rot, finger_rot = self.pose_head(query[:, :NUM_MANO_JOINT]).split([1, NUM_MANO_JOINT - 1], dim=1)
        rotmat = torch.cat([frame.rot[:, None] @ root_rot, finger_rot], dim=1)
        shape = self.shape_head(query[:, NUM_MANO_JOINT])
        root = self.root_head(query[:, NUM_MANO_JOINT + 1], seen[:, 0].detach(), focal, princpt)
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
            joint_seen=seen,
            joint_heat=heat.unflatten(1, (self.backbone.grid_size, -1)),
        )

    def transformer_blocks(self) -> list[nn.ModuleList]:
        """The layers of backbone and decoder."""
        return [self.backbone.model.encoder.layer, self.decoder.layers]

    def parameter_groups(self, lr: float, backbone_lr: float | None, weight_decay: float) -> list[dict]:
        """Optimizer groups: backbone and rest, matrices with weight decay and vectors without.

        A `backbone_lr` of None freezes the backbone: its parameters are in no group and ask for no gradient.
        Each group carries `peak_lr`, which the schedule scales into `lr`.
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
