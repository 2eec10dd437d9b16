"""Whether MANO parameters give the joints of the same hand, with the hand model that they belong to.

Shape legend: N hands, 16: the joints of MANO's chain. Fingertips are not compared: data sets use other vertices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from src.data.plausibility.hands import Hands
from src.data.plausibility.size import is_hand_sized
from src.data.plausibility.verdict import Verdict, verdict
from src.geometry.patch import mirror_pose
from src.hand.kinematics import CHAIN_JOINTS, chain_joints
from src.hand.load import STANDIN, load_hand
from src.hand.skeleton import HandArrays

HandModels = Mapping[str, HandArrays]  # by name, as in Clip.hand_model

_MIN_JOINT = 10
# Mean error of a hand's joints, mm. Annotated joints (FreiHAND, InterHand2.6M) are 5 to 12 mm from MANO's.
_GROSS_MM = 22.0
_CLEAR_MM = 6.0  # above this, another convention with less than half of the error is the right one

_load = lru_cache(maxsize=2)(load_hand)


def models_of(hands: Hands, mano: Path | None) -> dict[str, HandArrays]:
    """The hand models of these hands' MANO parameters: the stand-in, and MANO if its file is given.

    Raises ValueError or OSError if the file cannot be used.
    """
    needed = set(hands.hand_model[hands.has_mano].tolist())
    files = {STANDIN: STANDIN, "mano": None if mano is None else str(mano)}
    return {name: _load(file) for name, file in files.items() if name in needed and file is not None}


def with_posed(hands: Hands, models: HandModels) -> Hands:
    """The hands with the joints of their MANO parameters, where `models` has their hand model."""
    posed = hands.posed.copy()
    for name, model in models.items():
        rows = np.flatnonzero(hands.has_mano & (hands.hand_model == name))
        some = hands.select(rows)
        posed[rows] = chain_joints(model, some.mano_pose, some.mano_shape, some.is_right, some.flat_hand_mean)
    return replace(hands, posed=posed)


def judge_mano(hands: Hands, models: HandModels) -> Verdict:
    """Whether MANO parameters give the 3D joints; `hands` as from `with_posed`."""
    enough = hands.joint_3d_valid[:, CHAIN_JOINTS].sum(axis=1) >= _MIN_JOINT
    checked = ~np.isnan(hands.posed).any(axis=(1, 2)) & enough & is_hand_sized(hands)
    error = np.where(checked, _error(hands.posed, hands), np.nan)
    result = verdict(checked, error > _GROSS_MM, error)
    for name, model in models.items():
        rows = np.flatnonzero(checked & (hands.hand_model == name) & (error > _CLEAR_MM))
        if len(rows):
            _find_cause(result, rows, hands.select(rows), model)
    return result


def _error(posed: np.ndarray, hands: Hands) -> np.ndarray:
    """[N] mean distance in mm over the known joints, both hands centred on them."""
    one, other, weight = _centred(posed, hands)
    return (np.linalg.norm(one - other, axis=-1) * weight).sum(axis=1)


def _centred(posed: np.ndarray, hands: Hands) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(posed, annotated joints) [N, 16, 3] about their means, 0 where unknown, and weights [N, 16] of sum 1."""
    valid = hands.joint_3d_valid[:, CHAIN_JOINTS]
    weight = valid / np.maximum(valid.sum(axis=1, keepdims=True), 1)
    one, other = (
        (joint - (joint * weight[..., None]).sum(axis=1, keepdims=True)) * valid[..., None]
        for joint in (posed, hands.joint_cam[:, CHAIN_JOINTS])
    )
    return one, other, weight


def _find_cause(result: Verdict, rows: np.ndarray, hands: Hands, model: HandArrays) -> None:
    """Name the convention that explains the joints of the hands at `rows`, and count those hands as bad."""
    pose, right, flat = hands.mano_pose, hands.is_right, hands.flat_hand_mean

    def error(pose: np.ndarray, right: np.ndarray, flat: np.ndarray) -> np.ndarray:
        return _error(chain_joints(model, pose, hands.mano_shape, right, flat), hands)

    tries = [
        ("flat_hand_mean looks wrong: it should be {}", error(pose, right, ~flat)),
        ("handedness looks swapped", error(pose, ~right, flat)),
        ("y and z of the axis-angles look negated (mirrored)", error(mirror_pose(pose), right, flat)),
        ("mano_pose looks like degrees: it must be in radians", error(np.deg2rad(pose), right, flat)),
        ("the root rotation is not in the frame of joint_cam", _turned_error(hands)),
    ]
    for cause, value in tries:
        found = (result.cause[rows] == "") & (value < 0.5 * result.value[rows])
        result.bad[rows[found]] = True
        result.cause[rows[found]] = [cause.format(str(not is_flat).lower()) for is_flat in flat[found]]


def _turned_error(hands: Hands) -> np.ndarray:
    """[N] the error after the best rotation of the whole hand (Kabsch). Infinite where the stated error is moderate,
    because a rotation always lowers it."""
    one, other, weight = _centred(hands.posed, hands)
    left, _, right = np.linalg.svd(one.swapaxes(1, 2) @ other)
    left[..., 2] *= np.linalg.det(left @ right)[:, None]
    error = (np.linalg.norm(one @ (left @ right) - other, axis=-1) * weight).sum(axis=1)
    return np.where(_error(hands.posed, hands) > _GROSS_MM, error, np.inf)
