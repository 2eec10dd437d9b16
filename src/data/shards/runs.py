"""Decides which runs of members are samples, and counts in frames what cannot be used.

A run is a sequence of successive members with one key. Usually it is a sample, but its members may also be scattered
over the archive, repeated further on, or partly lost in a corrupt region.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from src.data.shards.index import Bad
from src.data.shards.losses import is_used, is_whole
from src.data.shards.tar import CorruptRegion, split_name


@dataclass
class Run:
    """Successive members with one key."""

    key: str
    suffixes: frozenset[str]
    size: int  # bytes in the archive, headers included
    reason: str = ""  # why it cannot be used; "": it is healthy
    is_suspect: bool = False  # next to a corrupt region: it may lack members
    detail: str = ""  # of the reason
    num_image: int = 0  # of a run that cannot be used; 0: unknown
    num_annotated: int = 0  # the same, from the other members
    sample_row: tuple[int, ...] = ()
    frame_rows: list[tuple[int, ...]] = field(default_factory=list)  # healthy frames, without the row of the sample
    bad: list[Bad] = field(default_factory=list)  # the other frames of a sample that can be used

    @property
    def num_known(self) -> int:
        """Its number of frames; 0 if unknown."""
        return self.num_image or self.num_annotated or len(self.frame_rows) + len(self.bad)


def judge(runs: Sequence[Run], regions: Sequence[tuple[CorruptRegion, int]]) -> list[Bad]:
    """Set the `reason` of every run that is not a sample, and return everything that cannot be used, counted once.

    Args:
        regions: the corrupt regions, each with the number of runs before it.
    """
    layouts = {run.suffixes for run in runs if not (run.reason or run.is_suspect)}
    by_key: dict[str, list[Run]] = {}
    for run in runs:
        if run.is_suspect and run.suffixes not in layouts:
            run.reason = "incomplete"
        by_key.setdefault(run.key, []).append(run)
    size = _frame_size(runs)
    cut = {parts[0]: region for region, _ in regions if (parts := split_name(region.name))}
    bad, incomplete = [], {}
    for key, of_key in by_key.items():
        if any(run.reason == "incomplete" for run in of_key):
            of_key = [run for run in of_key if run.reason]
            incomplete[key] = _merged_frames(of_key) or (_estimate(cut[key], size) if key in cut else 1)
            bad.append(Bad(key, cut[key].reason if key in cut else "incomplete", incomplete[key]))
        else:
            bad += _judge_key(key, of_key)
    for region, at in regions:
        beside = {run.key for run in runs[max(0, at - 1) : at + 1]} & incomplete.keys()
        if not beside & cut.keys():
            lost = _estimate(region, size) - sum(incomplete[key] for key in beside)  # those are counted already
            bad.append(Bad(region.name or f"byte {region.offset}", region.reason, max(1, lost)))
    return bad + [frame for run in runs if not run.reason for frame in run.bad]


def _judge_key(key: str, runs: Sequence[Run]) -> list[Bad]:
    """Report the runs with one key: as one sample if its members are not side by side, else each for itself."""
    if len(runs) == 1 or not any(map(_is_fragment, runs)):
        return [Bad(key, run.reason, run.num_known or 1, run.detail) for run in runs if run.reason]
    suffixes = [suffix for run in runs for suffix in run.suffixes]
    is_repeated = len({*suffixes}) < len(suffixes)
    if is_repeated:  # several versions of a sample, or several samples of which one lacks members
        num_whole = sum(run.num_known for run in runs if is_whole(run.suffixes))
        lost = max(num_whole, *(run.num_known for run in runs))
    else:
        lost = _merged_frames(runs)
    for run in runs:
        run.reason = "duplicate_member" if is_repeated else "scattered_members"
    return [Bad(key, runs[0].reason, lost or 1)]


def _is_fragment(run: Run) -> bool:
    return not is_whole(run.suffixes) and any(map(is_used, run.suffixes))


def _merged_frames(runs: Sequence[Run]) -> int:
    """The number of frames of a sample in several fragments, 0 if unknown. Each may hold a part of the images."""
    num_image = sum(run.num_image or len(run.frame_rows) + len(run.bad) for run in runs)
    return max(num_image, *(run.num_annotated for run in runs))


def _frame_size(runs: Sequence[Run]) -> float:
    """Mean bytes per frame, headers included, of the healthy runs, else of those with a known number; 0 if unknown."""
    for some in ([run for run in runs if not run.reason], [run for run in runs if run.num_image or run.frame_rows]):
        if num_frame := sum(run.num_known for run in some):
            return sum(run.size for run in some) / num_frame
    return 0.0


def _estimate(region: CorruptRegion, frame_size: float) -> int:
    """How many frames a region has cost, from the mean size of a frame in this shard; at least 1."""
    return max(1, round(region.size / frame_size)) if frame_size else 1
