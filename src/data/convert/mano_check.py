"""Checks on the data which MANO convention a set's parameters follow, before they are written.

The first hands that have both parameters and joints are posed with the user's MANO file under every candidate
convention, and their 16 MANO joints are compared with the set's. Tips are not compared: each set uses other vertices
for them. Both hands are centred first, since sets define their translation differently; the root rotation is not
aligned, so a wrong camera frame is detected. The convention with the smallest error is used if that is below the
tolerance; otherwise no parameters are written.

What may differ
    flat_hand_mean   finger angles are absolute, or offsets from the model's mean pose
    mesh_joints      the set's joints are those of the kinematic chain (HO-3D, DexYCB), or MANO's joint regressor
                     applied to the posed vertices (FreiHAND, utils/model.py). On the stand-in hand, the two are 0.4 to
                     1.1 mm apart on average, 1.8 mm for the worst hand; the wrong flat_hand_mean costs 9 mm or more
    left shape       the published MANO_LEFT.pkl does not mirror the x of its shape directions (smplx issue 48), so a
                     left hand fitted with it has other betas than its mirror image. They are converted to the betas
                     of the right hand closest to that shape (least squares over all vertices).

Torch is imported inside functions: converters without --mano do not need it.
Shape legend: N hands, J = 21 joints (OpenPose order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from src.data.shards.writer import HandRecord
from src.geometry.patch import mirror_pose
from src.hand.kinematics import CHAIN_JOINTS
from src.hand.mano_file import load_hand_arrays
from src.hand.skeleton import MANO_TO_OPENPOSE, TIP_JOINTS

if TYPE_CHECKING:
    from src.hand.mano import ManoLayer

NUM_CHECK = 64  # hands of each side
OWN_JOINTS_MM = 2.0  # tolerance for sets whose joints are MANO's own; a wrong convention costs several times as much
_MIN_JOINT = 10


@dataclass(frozen=True)
class Convention:
    """The convention of the parameters of one side of one set, and the evidence for it."""

    use: bool  # False: no convention fits, the parameters are dropped
    flat_hand_mean: bool
    left_file_shape: bool = False  # the betas refer to MANO_LEFT.pkl as published
    mesh_joints: bool = False  # the set's joints are regressed from the posed vertices
    error_mm: float | None = None  # mean joint error; None: not checked
    other_mm: float | None = None  # the smallest error with the other flat_hand_mean
    num_hand: int = 0


Conventions = dict[str, Convention]  # by side: "left", "right"


@lru_cache(maxsize=1)
def _layer(mano: Path) -> tuple[ManoLayer, np.ndarray]:
    """The user's hand and its joint regressor [16, V]."""
    from src.hand.mano import ManoLayer

    arrays = load_hand_arrays(mano)
    return ManoLayer(arrays).eval(), arrays.joint_regressor


@lru_cache(maxsize=1)
def left_shape_map(mano: Path) -> np.ndarray:
    """[10, 10]: betas of the published left file -> betas of the right hand nearest to the mirrored left shape."""
    dirs = load_hand_arrays(mano).shapedirs.astype(np.float64)
    unmirrored = (dirs * np.array([-1.0, 1.0, 1.0])[:, None]).reshape(-1, dirs.shape[2])
    return np.linalg.lstsq(dirs.reshape(-1, dirs.shape[2]), unmirrored, rcond=None)[0]


def pose_joints(
    mano: Path, pose: np.ndarray, shape: np.ndarray, is_right: bool, flat_hand_mean: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Joints about the wrist from pose [N, 48] axis-angle and shape [N, 10] of one side.

    Returns: two arrays [N, J, 3] mm: the kinematic chain's joints, and those regressed from the posed vertices.
    """
    import torch

    layer, regressor = _layer(mano)
    pose = np.asarray(pose, np.float32)
    with torch.inference_mode():
        own_side = torch.from_numpy(np.float32(pose if is_right else mirror_pose(pose)))
        posed = layer(layer.pose_to_rotmat(own_side, flat_hand_mean), torch.from_numpy(np.float32(shape)))
    chain = posed.joint.numpy()
    regressed = np.concatenate([regressor @ posed.vert.numpy(), chain[:, TIP_JOINTS]], axis=1)[:, MANO_TO_OPENPOSE]
    side = np.float32([1 if is_right else -1, 1, 1])
    return chain * side, regressed * side


def joint_error(joint: np.ndarray, target: np.ndarray, valid: np.ndarray) -> float:
    """Mean distance in mm over the valid MANO joints of N hands, each pair centred on the other.

    Args: joint, target [N, J, 3] mm; valid [N, J].
    """
    keep = valid[:, CHAIN_JOINTS, None] > 0
    difference = np.where(keep, joint[:, CHAIN_JOINTS] - target[:, CHAIN_JOINTS], 0.0)
    count = keep.sum(axis=1, keepdims=True)
    centred = np.where(keep, difference - difference.sum(axis=1, keepdims=True) / count, 0.0)
    return float(np.linalg.norm(centred, axis=-1).sum() / count.sum())


def can_check(record: HandRecord) -> bool:
    """Whether a record has MANO parameters and enough joints to compare them with."""
    if record.mano_pose is None or record.joint_cam is None or record.joint_3d_valid is None:
        return False
    return int((np.asarray(record.joint_3d_valid)[CHAIN_JOINTS] > 0).sum()) >= _MIN_JOINT


def find_convention(
    hands: Sequence[HandRecord], mano: Path, side: str, tolerance_mm: float, left_file_shape: bool
) -> Convention | None:
    """The convention that fits hands of one side best; None without hands.

    Args:
        hands: with the set's own parameters, all of `side`.
        left_file_shape: whether the betas may be defined for the published MANO_LEFT.pkl.
    """
    if not hands:
        return None
    pose, shape, target, valid = (
        np.stack([np.asarray(getattr(hand, name), np.float64) for hand in hands])
        for name in ("mano_pose", "mano_shape", "joint_cam", "joint_3d_valid")
    )
    error: dict[tuple[bool, bool, bool], float] = {}
    for flat, left in product((False, True), (False, True) if left_file_shape and side == "left" else (False,)):
        beta = shape @ left_shape_map(mano).T if left else shape
        for mesh_joints, joint in enumerate(pose_joints(mano, pose, beta, side == "right", flat)):
            error[flat, left, bool(mesh_joints)] = joint_error(joint, target, valid)
    flat, left, mesh_joints = min(error, key=error.__getitem__)
    other = min(value for (other_flat, *_), value in error.items() if other_flat != flat)
    best = error[flat, left, mesh_joints]
    return Convention(best < tolerance_mm, flat, left, mesh_joints, best, other, len(hands))


def apply_convention(record: HandRecord, conventions: Conventions, mano: Path | None) -> HandRecord:
    """The record with its parameters in the convention of its side, or without them if none fits."""
    convention = conventions.get(record.handedness)
    if record.mano_pose is None or convention is None:
        return record
    if not convention.use:
        return replace(record, mano_pose=None, mano_shape=None, hand_model=None, flat_hand_mean=None)
    shape = record.mano_shape
    if convention.left_file_shape:
        assert mano is not None
        shape = left_shape_map(mano) @ np.asarray(shape, np.float64)
    return replace(record, mano_shape=shape, flat_hand_mean=convention.flat_hand_mean)


def describe(name: str, side: str, convention: Convention, tolerance_mm: float) -> str:
    """One line to print: the convention and its errors."""
    flat = convention.flat_hand_mean
    found = (
        f"flat_hand_mean={flat}: mean joint error {convention.error_mm:.3f} mm over {convention.num_hand} {side} hands "
        f"({not flat}: {convention.other_mm:.3f} mm)"
    )
    if convention.mesh_joints:
        found += "; joints are regressed from the posed vertices"
    if convention.left_file_shape:
        found += "; betas refer to the published MANO_LEFT.pkl and were converted"
    if convention.use:
        return f"{name}: MANO checked: {found}"
    return (
        f"{name}: WARNING: MANO parameters of {side} hands are omitted (has_mano 0): no convention is within the "
        f"tolerance of {tolerance_mm} mm; best: {found}"
    )
