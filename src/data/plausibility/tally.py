"""Counts implausible hands by source and check, and words the findings.

Shape legend: N hands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from src.data.plausibility.camera import judge_depth, judge_focal, judge_projection, judge_shape_2d
from src.data.plausibility.hands import Hands
from src.data.plausibility.image_plane import (
    judge_box,
    judge_equal,
    judge_image,
    judge_labels,
    judge_missing,
    judge_pixels,
)
from src.data.plausibility.mano import HandModels, judge_mano, with_posed
from src.data.plausibility.side import judge_side
from src.data.plausibility.size import judge_bones, judge_size
from src.data.plausibility.verdict import Check, Verdict
from src.utils.text import one_line

_SWAPPED = "handedness swapped, or joints mirrored (x negated)"
_VOTE = {"min_share": 0.05, "min_count": 2}  # single hands may look like the other side, or leave the image
CHECKS = {
    "labels": Check("no label is known, so that nothing is supervised", "", judge_labels),
    "size": Check("3D joints are not hand-sized", "median bone {:.3g} mm", judge_size),
    "bones": Check("bones are out of proportion with their hand", "a bone of {:.3g} mm", judge_bones),
    "depth": Check("joints are behind the camera, or too near or far", "median depth {:.3g} mm", judge_depth),
    "projection": Check("2D and projected 3D joints disagree", "median {:.3g} px", judge_projection),
    "shape_2d": Check("2D and 3D joints differ in shape", "median {:.2g} % of the hand", judge_shape_2d),
    "focal": Check("focal does not match princpt", "focal {:.4g} px", judge_focal),
    "right": Check("right hands look like left hands", "", partial(judge_side, is_right=True), **_VOTE),
    "left": Check("left hands look like right hands", "", partial(judge_side, is_right=False), **_VOTE),
    "mano": Check("MANO parameters do not give the joints", "mean {:.3g} mm", judge_mano),
    "box": Check("hand_bbox does not match the 2D joints", "{:.0f} % of them inside", judge_box),
    "pixels": Check("2D joints span less than 4 px", "{:.3g} px", judge_pixels),
    "missing": Check("joints at 0 or -1 are flagged valid", "{:.0f} of them", judge_missing),
    "image": Check("2D joints are outside the image", "{:.0f} % inside", judge_image, **_VOTE),
    "equal": Check("all hands have the same joints", "", judge_equal, 0.9),
}


@dataclass
class Tally:
    """How many hands of one source one check has judged, and what it found."""

    checked: int = 0
    bad: int = 0
    example: str = ""  # the first bad hand and its value
    cause: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Add the counts of another sample of the same source."""
        self.checked += other.checked
        self.bad += other.bad
        self.example = self.example or other.example
        self.cause.update(other.cause)


LABELS: dict[str, Callable[[Hands], np.ndarray]] = {  # what is known -> [N] of which hands
    "2D joints": lambda hands: hands.joint_2d_valid.any(axis=1),
    "3D joints": lambda hands: hands.joint_3d_valid.any(axis=1),
    "MANO": lambda hands: hands.has_mano,
    "intrinsics": lambda hands: hands.has_intr,
}


class Key(NamedTuple):
    source: str
    check: str  # a key of CHECKS, or of LABELS: then `bad` counts the hands without that label


Tallies = dict[Key, Tally]


def tally(hands: Hands, models: HandModels, describe: Callable[[int, int], str]) -> Tallies:
    """Judge all hands by all checks.

    Args:
        models: those of other hand models are not compared.
        describe: the name of a hand for an example, from its `Hands.place`.
    """
    hands = with_posed(hands, models)
    found: Tallies = {}
    for name, check in CHECKS.items():
        with np.errstate(all="ignore"):  # labels may be anything; comparisons with NaN are False
            result = check.judge(hands, models) if name == "mano" else check.judge(hands)
        for source in sorted(set(hands.source.tolist())):
            rows = np.flatnonzero((hands.source == source) & result.checked)
            if len(rows):
                found[Key(source, name)] = _count(check, result, rows, hands, describe)
    for name, is_known in LABELS.items():
        for source in sorted(set(hands.source.tolist())):
            known = is_known(hands)[hands.source == source]
            found[Key(source, name)] = Tally(len(known), int((~known).sum()))
    return found


def _count(check: Check, result: Verdict, rows: np.ndarray, hands: Hands, describe: Callable[[int, int], str]) -> Tally:
    bad = rows[result.bad[rows]]
    counts = Tally(len(rows), len(bad), cause=Counter(result.cause[bad].tolist()))
    if len(bad):
        value = check.example.format(result.value[bad[0]])
        counts.example = describe(*hands.place[bad[0]].tolist()) + (f" ({value})" if value else "")
    return counts


def merge(tallies: Iterable[Tallies]) -> Tallies:
    """The sum of the counts of several samples."""
    total: Tallies = {}
    for each in tallies:
        for key, counts in each.items():
            total.setdefault(key, Tally()).add(counts)
    return total


def coverage(tallies: Tallies) -> list[str]:
    """One line for each source: which share of its hands has which labels."""
    lines = []
    for source in sorted({key.source for key in tallies}):
        counts = {name: tallies[Key(source, name)] for name in LABELS}
        shares = (f"{name} {100 * (1 - each.bad / each.checked):.0f} %" for name, each in counts.items())
        lines.append(f"{source}: labels of {counts['MANO'].checked} checked hands: {', '.join(shares)}")
    return lines


def findings(tallies: Tallies) -> list[str]:
    """One line for each source and check that found implausible hands: count, most likely cause, example."""
    lines = []
    order = list(CHECKS)
    judged = {key: counts for key, counts in tallies.items() if key.check in CHECKS}
    for key, counts in sorted(judged.items(), key=lambda item: (item[0].source, order.index(item[0].check))):
        check = CHECKS[key.check]
        if counts.bad >= max(min(check.min_count, counts.checked), check.min_share * counts.checked):
            cause = _likely_cause(key, tallies)
            line = (
                f"{key.source}: {check.text}: {counts.bad} of {counts.checked} checked hands"
                f"{f'; {cause}' if cause else ''}; for example {counts.example}"
            )
            lines.append(one_line(line))
    return lines


def _likely_cause(key: Key, tallies: Tallies) -> str:
    """The cause that the evidence gives for at least half of the bad hands; "" if there is none."""
    counts = tallies[key]
    if key.check in ("right", "left"):
        other = tallies.get(Key(key.source, "left" if key.check == "right" else "right"))
        is_mixed = other is None and 0.2 * counts.checked < counts.bad < 0.8 * counts.checked
        return f"every hand is labelled {key.check}: handedness may be a constant" if is_mixed else _SWAPPED
    cause, number = counts.cause.most_common(1)[0]
    return cause if 2 * number >= counts.bad else ""
