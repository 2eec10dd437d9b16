"""Hand size and proportions from 3D joints: wrong units, wild joints, other joint orders.

Shape legend: N hands, J = 21 joints, b = 20 bones.
"""

from __future__ import annotations

import numpy as np

from src.data.plausibility.hands import Hands
from src.data.plausibility.verdict import Verdict, masked, median, verdict, within
from src.hand.skeleton import BONES, MANO_TO_OPENPOSE

# Bone lengths of an adult hand in mm, in the order of BONES: medians over hands of FreiHAND, InterHand2.6M, RHD, TACO,
# hand_graph_cnn and the rendered ones, whose ranges the limits below leave room for.
_BONE_MM = np.array([34, 39, 32, 27, 89, 38, 24, 23, 90, 37, 27, 24, 83, 33, 27, 22, 80, 30, 20, 19], float)
_PARENT, _CHILD = np.array(BONES).T
SCALE = (0.45, 1.8)  # of a hand, relative to _BONE_MM: 0.66 to 1.25 in those sets; a toddler's is 0.55
_BONE_SCALE = (0.05, 3.0)  # of a bone, relative to its hand: 0.62 to 2.0 in those sets; shorter: joints coincide
_UNITS = {
    "joint_cam looks like metres: multiply by 1000": 1e3,
    "joint_cam looks like centimetres: multiply by 10": 10.0,
    "joint_cam looks like inches: multiply by 25.4": 25.4,
    "joint_cam looks like micrometres: divide by 1000": 1e-3,
    "joint_cam looks 10 times too large": 0.1,
}
_FINGER, _LEVEL = np.arange(5)[:, None], np.arange(4)
# other data sets' joint orders: for each joint of ours, its number there
_ORDERS = {
    "the joints look like MANO's order (thumb last, then the tips)": MANO_TO_OPENPOSE,
    "each finger looks ordered from tip to palm": (0, *(4 * _FINGER + 4 - _LEVEL).ravel()),
    "the joints look like InterHand2.6M's order (tip to palm, wrist last)": (20, *(4 * _FINGER + 3 - _LEVEL).ravel()),
    "the wrist looks last": (20, *range(20)),
    "the joints look like FPHA's order (knuckles first)": (
        0,
        *np.concatenate([1 + _FINGER, 6 + 3 * _FINGER + _LEVEL[:3]], axis=1).ravel(),
    ),
}


def _bone_length(joint: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[N, b] mm; NaN where an end is unknown."""
    length = np.linalg.norm(joint[:, _CHILD] - joint[:, _PARENT], axis=-1)
    return masked(length, valid[:, _CHILD] & valid[:, _PARENT])


def hand_scale(hands: Hands) -> np.ndarray:
    """[N] size of each hand relative to an adult's, from its 3D joints; NaN where no bone is known."""
    return median(_bone_length(hands.joint_cam, hands.joint_3d_valid) / _BONE_MM)


def is_hand_sized(hands: Hands) -> np.ndarray:
    """[N] whether the known bones have plausible lengths; False where none is known."""
    return _is_plausible(_bone_length(hands.joint_cam, hands.joint_3d_valid))


def _is_plausible(length: np.ndarray) -> np.ndarray:
    """[N] whether hands with bones of this length [N, b] have plausible size and proportions."""
    scale = median(length / _BONE_MM)
    return within(scale, SCALE) & within(_proportion(length, scale), _BONE_SCALE).all(axis=1)


def _proportion(length: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """[N, b] length of each bone relative to that in a hand of this scale [N]; 1 where unknown."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.isnan(length), 1.0, length / _BONE_MM / scale[:, None])


def judge_size(hands: Hands) -> Verdict:
    """Whether hands have the size of hands."""
    scale = hand_scale(hands)
    length = median(_bone_length(hands.joint_cam, hands.joint_3d_valid))
    result = verdict(~np.isnan(scale), ~within(scale, SCALE), length)
    for row in np.flatnonzero(result.bad):
        off = {cause: abs(np.log(max(scale[row], 1e-12) * factor)) for cause, factor in _UNITS.items()}
        best = min(off, key=off.__getitem__)
        if off[best] < np.log(2):
            result.cause[row] = best
    result.cause[result.bad & (scale == 0)] = "all joints are at the same point"
    _name_order(result, hands)
    return result


def judge_bones(hands: Hands) -> Verdict:
    """Whether single joints are far from, or on top of, their neighbours, in hands of plausible size."""
    length = _bone_length(hands.joint_cam, hands.joint_3d_valid)
    scale = median(length / _BONE_MM)
    proportion = _proportion(length, scale)
    worst = np.abs(np.log(np.maximum(proportion, 1e-6))).argmax(axis=1)
    value = length[np.arange(len(length)), worst]
    result = verdict(within(scale, SCALE), ~within(proportion, _BONE_SCALE).all(axis=1), value)
    _name_order(result, hands)
    return result


def _name_order(result: Verdict, hands: Hands) -> None:
    """Set the cause of bad hands whose bones are plausible in another data set's joint order, and much more even."""
    rows = np.flatnonzero(result.bad)
    if not len(rows):
        return
    some = hands.select(rows)
    best = 0.5 * _unevenness(_bone_length(some.joint_cam, some.joint_3d_valid))
    for cause, order in _ORDERS.items():
        length = _bone_length(some.joint_cam[:, list(order)], some.joint_3d_valid[:, list(order)])
        uneven = _unevenness(length)
        found = _is_plausible(length) & (uneven < best)
        result.cause[rows[found]], best[found] = cause, uneven[found]


def _unevenness(length: np.ndarray) -> np.ndarray:
    """[N] spread of the bones' lengths relative to an adult's: median absolute deviation of the logarithm."""
    log = np.log(np.maximum(length, 1e-6) / _BONE_MM)
    return median(np.abs(log - median(log)[:, None]))
