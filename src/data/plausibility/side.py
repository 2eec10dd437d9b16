"""Left or right, from the 3D shape of a hand. Shape legend: N hands, J = 21 joints."""

from __future__ import annotations

import numpy as np

from src.data.plausibility.hands import Hands
from src.data.plausibility.size import is_hand_sized
from src.data.plausibility.verdict import Verdict, masked, verdict
from src.hand.kinematics import CHAIN_JOINTS
from src.hand.skeleton import FINGER_JOINTS, WRIST

_DECIDED = 0.3  # below, a hand could be either


def chirality(joint: np.ndarray) -> np.ndarray:
    """[N] positive for right hands, negative for left ones, about 0 if a hand could be either.

    The normal of the plane through wrist and the knuckles of index and little finger points out of a right hand's palm.
    The thumb is on that side of the plane, and fingers bend towards it.

    Args: joint [N, 21, 3] in a right-handed frame, mm, NaN where unknown; fingertips are not used.
    """
    thumb, index, *_, little = FINGER_JOINTS.values()
    wrist = joint[:, WRIST]
    normal = _unit(np.cross(joint[:, index[0]] - wrist, joint[:, little[0]] - wrist))
    size = np.linalg.norm(joint[:, index[0]] - wrist, axis=-1)
    height = ((joint[:, list(thumb[:3])] - wrist[:, None]) * normal[:, None]).sum(axis=-1) / size[:, None]
    # The base of the thumb hardly moves relative to the palm, so its side is the most reliable.
    return np.nansum(height * [2.0, 1.0, 1.0], axis=1) + flexion(joint)


def flexion(joint: np.ndarray) -> np.ndarray:
    """[N] bend of the fingers' middle joints; positive in the direction that a right hand's fingers can bend."""
    _, *fingers = FINGER_JOINTS.values()
    across = _unit(joint[:, fingers[0][0]] - joint[:, fingers[-1][0]])
    bone = _unit(np.diff(joint[:, [finger[:3] for finger in fingers]], axis=2))  # [N, 4, 2, 3]
    return 0.3 * np.nansum(np.cross(bone[:, :, 0], bone[:, :, 1]) * across[:, None], axis=(1, 2))


def _unit(vector: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def judge_side(hands: Hands, is_right: bool) -> Verdict:
    """Whether hands labelled right (left) have the shape of right (left) hands.

    Hands without 3D joints are judged by the joints of their MANO parameters. Those have the palm of the side that is
    stated, so only the flexion counts.
    """
    has_3d = is_hand_sized(hands)
    posed = np.full(hands.joint_cam.shape, np.nan)
    posed[:, CHAIN_JOINTS] = hands.posed
    shape = chirality(masked(hands.joint_cam, hands.joint_3d_valid))
    value = np.where(has_3d, shape, flexion(posed)) * (1 if is_right else -1)
    decided = (has_3d | ~hands.joint_3d_valid.any(axis=1)) & (np.abs(value) > _DECIDED)
    return verdict(decided & (hands.is_right == is_right), value < 0, value)
