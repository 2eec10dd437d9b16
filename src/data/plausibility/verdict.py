"""What every plausibility check returns, and the masks that they share. Shape legend: N hands, J = 21 joints."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from src.data.plausibility.hands import Hands


class Verdict(NamedTuple):
    """The judgement of one check on N hands. Each hand is judged on its own, so that results of shards add up."""

    checked: np.ndarray  # [N] bool: there is enough to judge
    bad: np.ndarray  # [N] bool, within `checked`
    value: np.ndarray  # [N] what is wrong, as a number for the example
    cause: np.ndarray  # [N] str; "" where the evidence does not single one out


class Check(NamedTuple):
    """One check and how its findings are worded."""

    text: str  # "<text>: 3 of 200 checked hands"
    example: str  # format of Verdict.value
    judge: Callable[[Hands], Verdict]
    min_share: float = 0.0  # of the checked hands that must be bad for a warning
    min_count: int = 1  # likewise, unless all are bad


def verdict(checked: np.ndarray, bad: np.ndarray, value: np.ndarray) -> Verdict:
    """A Verdict without causes. `bad` [N] is ignored where `checked` is False."""
    return Verdict(checked, checked & bad, value, np.full(len(checked), "", object))


def masked(value: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """`value` [N, J, ...] with NaN where `keep` [N, J] is False."""
    return np.where(keep.reshape(keep.shape + (1,) * (value.ndim - keep.ndim)), value, np.nan)


def median(value: np.ndarray) -> np.ndarray:
    """[N] median of [N, M] without NaN; NaN where there is nothing else."""
    some = ~np.isnan(value).all(axis=1)
    result = np.full(len(value), np.nan)
    result[some] = np.nanmedian(value[some], axis=1)
    return result


def within(value: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Whether values are between two limits; False for NaN."""
    return (value >= limits[0]) & (value <= limits[1])


def extent(joint: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[N, 4] xyxy, the box of the valid points ([N, J, 2], [N, J]); all 0 where none is valid."""
    box = np.zeros((len(joint), 4))
    some = valid.any(axis=1)
    known = masked(joint[some], valid[some])
    box[some] = np.concatenate([np.nanmin(known, axis=1), np.nanmax(known, axis=1)], axis=1)
    return box


def longer_side(box: np.ndarray) -> np.ndarray:
    """[N] of boxes [N, 4]."""
    return (box[:, 2:] - box[:, :2]).max(axis=1)
