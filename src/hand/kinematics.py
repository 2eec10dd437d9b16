"""MANO's 16 joints from pose and shape in numpy, for data processes that do not import torch.

Same kinematic chain as ManoLayer (src/hand/mano.py), without mesh and fingertips. Shape legend: N hands.
"""

from __future__ import annotations

import numpy as np

from src.geometry.patch import mirror_pose
from src.hand.skeleton import MANO_PARENTS, MANO_TO_OPENPOSE, NUM_FINGER_POSE, NUM_MANO_JOINT, TIP_JOINTS, HandArrays

MM_PER_M = 1000.0
# numbers, in OpenPose order, of the joints that MANO's chain gives: all but the fingertips
CHAIN_JOINTS = np.array([j for j in range(len(MANO_TO_OPENPOSE)) if j not in TIP_JOINTS])
_ORDER = np.array(MANO_TO_OPENPOSE)[CHAIN_JOINTS]  # their numbers in MANO's order


def chain_joints(
    hand: HandArrays, pose: np.ndarray, shape: np.ndarray, is_right: np.ndarray, flat_hand_mean: np.ndarray
) -> np.ndarray:
    """[N, 16, 3] mm about the wrist: the CHAIN_JOINTS of hands of either side.

    Args:
        pose [N, 48] axis-angle; shape [N, 10]; is_right [N] bool: the others are mirror images.
        flat_hand_mean [N] bool: False where the model's mean pose must be added.
    """
    pose = np.where(is_right[:, None], pose, mirror_pose(pose)).astype(np.float64)
    pose[:, -NUM_FINGER_POSE:] += np.where(flat_hand_mean[:, None], 0.0, hand.mean_pose)
    local = _matrices(pose.reshape(len(pose), NUM_MANO_JOINT, 3))
    regressor = hand.joint_regressor * MM_PER_M
    rest = regressor @ hand.v_template + np.einsum("kv,vcs,ns->nkc", regressor, hand.shapedirs, shape, optimize=True)
    world, joint = [local[:, 0]], [np.zeros((len(pose), 3))]
    for k, parent in list(enumerate(MANO_PARENTS))[1:]:
        bone = rest[:, k] - rest[:, parent]
        joint.append(joint[parent] + np.einsum("nij,nj->ni", world[parent], bone))
        world.append(world[parent] @ local[:, k])
    return np.stack(joint, axis=1)[:, _ORDER] * np.where(is_right[:, None], 1.0, [-1.0, 1.0, 1.0])[:, None]


def _matrices(vector: np.ndarray) -> np.ndarray:
    """Rotations [..., 3, 3] of axis-angle vectors [..., 3] (Rodrigues' formula)."""
    angle = np.linalg.norm(vector, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vector / np.maximum(angle[..., 0], 1e-12), -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*x.shape, 3, 3)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)
