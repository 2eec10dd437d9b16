"""The differentiable MANO layer: shape and pose blend, kinematic chain, linear blend skinning, 21 joints, in mm.

Shape legend: B batch, V vertices, K = 16 MANO joints, J = 21 joints (OpenPose order).

Formulas: Romero, Tzionas, Black, "Embodied Hands", SIGGRAPH Asia 2017, eq. 1-5, after Loper et al., "SMPL", 2015.
MANO's files may not be redistributed, so no array of the hand is part of a state_dict.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from src.geometry.rotation import axis_angle_to_matrix
from src.hand.skeleton import MANO_TO_OPENPOSE, NUM_FINGER_POSE, NUM_SHAPE, HandArrays

MM_PER_M = 1000.0
# The 16 joints by depth in MANO's tree: the chain takes three batched products, not fifteen.
_LEVELS = ((0,), (1, 4, 7, 10, 13), (2, 5, 8, 11, 14), (3, 6, 9, 12, 15))
_LEVEL_SIZES = [len(level) for level in _LEVELS]
_ORDER = [joint for level in _LEVELS for joint in level]  # all joints in the layer are in this order: level by level
_PARENT = [*[0] * 6, *range(1, 11)]  # positions in this order


class HandOutput(NamedTuple):
    """A posed hand with its wrist joint at the origin."""

    vert: torch.Tensor  # [B, V, 3] mm
    joint: torch.Tensor  # [B, J, 3] mm, OpenPose order


class ManoLayer(nn.Module):
    """Pose and shape to vertices and joints. Computes in the dtype of its buffers (float32; float64 after `.double()`)
    with autocast off. Uses plain tensor operations only, for torch.compile and torch.export.

    The wrist joint is the origin for every shape: the root rotates about the wrist, and the hand's translation is the
    position of its wrist in the camera.
    """

    faces: torch.Tensor  # [F, 3] int64

    def __init__(self, arrays: HandArrays) -> None:
        super().__init__()
        self.name = arrays.name
        self.num_vertex = arrays.num_vertex
        self._add_blend_basis(arrays)
        self._add_buffer("skin_weights", arrays.skin_weights[:, _ORDER])
        self._add_buffer("tip_weights", arrays.skin_weights[np.ix_(arrays.tip_vertex_ids, _ORDER)])
        self._add_buffer("mean_pose", arrays.mean_pose)
        self._add_index("level_order", _ORDER)
        for depth, parent in enumerate(([0] * 5, range(5), range(5)), start=1):  # indices into the previous level
            self._add_index(f"level_parent{depth}", parent)
        # positions of the 16 joints; the tips 16..20 follow unchanged
        self._add_index("joint_order", [_ORDER.index(j) if j in _ORDER else j for j in MANO_TO_OPENPOSE])
        self._add_index("faces", arrays.faces)

    def _add_blend_basis(self, arrays: HandArrays) -> None:
        """Everything linear in shape and pose, in mm relative to the wrist joint. Joints are J = J_template + J_shape
        beta, computed once, so that the forward pass does not regress joints from vertices."""
        template = arrays.v_template.astype(np.float64) * MM_PER_M
        shapedirs = arrays.shapedirs.astype(np.float64) * MM_PER_M
        regressor = arrays.joint_regressor.astype(np.float64)
        joint_template = regressor @ template  # [K, 3]
        joint_shape = np.einsum("kv,vcs->kcs", regressor, shapedirs)  # [K, 3, 10]
        template, shapedirs = template - joint_template[0], shapedirs - joint_shape[0]
        joint_template, joint_shape = joint_template - joint_template[0], joint_shape - joint_shape[0]
        posedirs = arrays.posedirs.astype(np.float64) * MM_PER_M

        joint_template, joint_shape = joint_template[_ORDER], joint_shape[_ORDER]
        basis = np.concatenate((shapedirs, posedirs), axis=2).reshape(-1, NUM_SHAPE + posedirs.shape[2])
        self._add_buffer("vert_template", template.reshape(-1))  # [V*3] mm
        self._add_buffer("vert_basis", basis.T)  # [10 + 135, V*3] mm
        tip = np.array(arrays.tip_vertex_ids)
        self._add_buffer("tip_template", template[tip].reshape(-1))  # [5*3] mm
        self._add_buffer("tip_basis", basis.reshape(len(template), 3, -1)[tip].reshape(15, -1).T)  # [10 + 135, 5*3] mm
        self._add_buffer("joint_template", joint_template.reshape(-1))  # [K*3] mm
        self._add_buffer("joint_basis", joint_shape.reshape(-1, NUM_SHAPE).T)  # [10, K*3] mm
        self._add_buffer("bone_template", (joint_template - joint_template[_PARENT]).reshape(-1))
        self._add_buffer("bone_basis", (joint_shape - joint_shape[_PARENT]).reshape(-1, NUM_SHAPE).T)

    def _add_buffer(self, name: str, value: np.ndarray) -> None:
        self.register_buffer(name, torch.tensor(np.ascontiguousarray(value), dtype=torch.float32), persistent=False)

    def _add_index(self, name: str, value: object) -> None:
        self.register_buffer(name, torch.tensor(np.asarray(value), dtype=torch.long), persistent=False)

    def pose_to_rotmat(self, pose: torch.Tensor, flat_hand_mean: bool | torch.Tensor) -> torch.Tensor:
        """Rotations of the 16 joints.

        Args: pose [B, 48] axis-angle, root first; flat_hand_mean: True if the 45 finger angles are absolute, False
        if they are offsets from the model's mean pose; one bool, or a bool tensor [B].
        Returns: [B, 16, 3, 3].
        """
        pose = pose.to(self.mean_pose.dtype)
        if isinstance(flat_hand_mean, bool):
            flat_hand_mean = torch.full((pose.shape[0],), flat_hand_mean, device=pose.device)
        add_mean = (~flat_hand_mean.bool()).to(pose.dtype)
        finger = pose[:, -NUM_FINGER_POSE:] + add_mean[:, None] * self.mean_pose
        full = torch.cat((pose[:, :-NUM_FINGER_POSE], finger), dim=1)
        return axis_angle_to_matrix(full.unflatten(1, (-1, 3)))

    def forward(self, rotmat: torch.Tensor, shape: torch.Tensor) -> HandOutput:
        """Args: rotmat [B, 16, 3, 3] rotation of each joint relative to its parent (MANO order); shape [B, 10].
        Returns: HandOutput(vert [B, V, 3] mm, joint [B, 21, 3] mm), the wrist joint at the origin."""
        with torch.autocast(device_type=rotmat.device.type, enabled=False):
            return self._forward(rotmat.to(self.vert_template.dtype), shape.to(self.vert_template.dtype))

    def _forward(self, rotmat: torch.Tensor, shape: torch.Tensor) -> HandOutput:
        eye = torch.eye(3, dtype=rotmat.dtype, device=rotmat.device)
        pose_feature = (rotmat[:, 1:] - eye).flatten(1)  # [B, 135]
        blend = torch.cat((shape, pose_feature), dim=1)
        rest_joint = torch.addmm(self.joint_template, shape, self.joint_basis).unflatten(1, (-1, 3))
        bone = torch.addmm(self.bone_template, shape, self.bone_basis).unflatten(1, (-1, 3))

        world_rot, joint = self._chain(rotmat[:, self.level_order], bone)
        shift = joint - (world_rot * rest_joint.unsqueeze(-2)).sum(-1)  # [B, K, 3]
        transform = torch.cat((world_rot.flatten(2), shift), dim=2)  # [B, K, 12]
        # tips separately from the mesh: a loss on joints only then backpropagates through 5 vertices instead of all
        tip = _skin(torch.addmm(self.tip_template, blend, self.tip_basis), transform, self.tip_weights)
        vert = _skin(torch.addmm(self.vert_template, blend, self.vert_basis), transform, self.skin_weights)
        return HandOutput(vert, torch.cat((joint, tip), dim=1)[:, self.joint_order])

    def _chain(self, rotmat: torch.Tensor, bone: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """World rotation [B, K, 3, 3] and position [B, K, 3] of each joint, level by level: R = R_parent R_local,
        t = t_parent + R_parent bone. `rotmat` and `bone` (joint minus parent at rest) are in level order."""
        local_rots, bones = rotmat.split(_LEVEL_SIZES, dim=1), bone.split(_LEVEL_SIZES, dim=1)
        rots, places = [local_rots[0]], [bones[0]]  # the wrist's bone is zero
        for depth in range(1, len(_LEVELS)):
            index = getattr(self, f"level_parent{depth}")
            parent_rot, parent_place = rots[-1][:, index], places[-1][:, index]
            rots.append(parent_rot @ local_rots[depth])
            places.append(parent_place + (parent_rot * bones[depth].unsqueeze(-2)).sum(-1))
        return torch.cat(rots, dim=1), torch.cat(places, dim=1)


def _skin(rest: torch.Tensor, transform: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Linear blend skinning: v' = sum_k w_vk (R_k (v - j_k) + t_k), coordinate by coordinate, which is several times
    faster than a small matrix product per vertex.

    Args: rest [B, N * 3] vertices v after the blend shapes; transform [B, K, 12] R_k row by row and t_k - R_k j_k;
    weights [N, K]. Returns: [B, N, 3].
    """
    blended = transform.transpose(1, 2) @ weights.T  # [B, 12, N]
    rot, shift = blended[:, :9].unflatten(1, (3, 3)), blended[:, 9:]
    x, y, z = rest.unflatten(1, (-1, 3)).transpose(1, 2).unsqueeze(1).unbind(2)  # each [B, 1, N]
    turned = torch.addcmul(shift, rot[:, :, 0], x)
    turned = torch.addcmul(torch.addcmul(turned, rot[:, :, 1], y), rot[:, :, 2], z)
    return turned.transpose(1, 2).contiguous()
