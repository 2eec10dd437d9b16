"""The tables of an evaluation, at most 120 columns wide on a terminal, and the same as Markdown.

A row or column without values is omitted: what could not be measured is absent, not zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from src.evaluate.bootstrap import Estimate, Group
from src.hand.skeleton import JOINT_NAMES
from src.metric import ALIGNED_JOINTS, FRAMES, METRICS, OVER_JOINTS, UNITS
from src.utils.table import Grid

# title and columns of the tables of groups; 2D PCK at 0.15 does not fit within 120 columns
GROUP_TABLES = {
    "by data set and side, mean over points, mm": {
        "MPJPE camera": "mpjpe_cam",
        "MPJPE root-relative": "mpjpe_rel",
        "PA-MPJPE": "mpjpe_pa",
        "PA-MPVPE": "mpvpe_pa",
    },
    "by data set and side, 2D in shares of the hand's box, mean over points": {
        "PCK at 0.05, %": "pck05_2d",
        "PCK at 0.1, %": "pck10_2d",
        "PCK at 0.2, %": "pck20_2d",
        "AUC 0-0.2": "auc_2d",
    },
}
_NAME_WIDTH = 18


def show(estimate: Estimate | None, unit: str) -> str:
    """`12.3 [11.9, 12.8]`; empty without an estimate."""
    if estimate is None:
        return ""
    if estimate.low is None or estimate.high is None:
        return _number(estimate.value, unit)
    return f"{_number(estimate.value, unit)} [{_number(estimate.low, unit)}, {_number(estimate.high, unit)}]"


def _number(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.1f}"
    if abs(value) >= 999.95:  # keeps the column narrow
        return f"{value:.0f}"
    return f"{value:.1f}" if unit else f"{value:.3f}"


def metric_grid(group: Group) -> Grid:
    """Every metric of one group, one column per frame of reference. Means over points and over joints are rows of their
    own where they differ."""
    names: dict[str, dict[str, str]] = {}  # label -> frame -> metric
    for name, metric in METRICS.items():
        if metric.label and not name.endswith(OVER_JOINTS):
            names.setdefault(metric.label, {})[metric.frame] = name
    rows = []
    for label, by_frame in sorted(names.items(), key=lambda item: len(item[1]) == 1):  # those of every frame first
        unit = UNITS[next(iter(by_frame.values()))]
        averages = {"": [by_frame.get(frame, "") for frame in FRAMES]}
        if any(_averages_differ(group, name) for name in averages[""]):
            averages = {", over points": averages[""], ", over joints": [n + OVER_JOINTS for n in averages[""]]}
        for which, columns in averages.items():
            estimates = [group.metric.get(name) for name in columns]
            cells = [show(estimate, unit) for estimate in estimates]
            rows.append((f"{label}{which}, {unit}" if unit else label + which, *cells, _counts(estimates)))
    title = f"{_title(group)}, {group.num_sample} hands"
    return Grid(title, ("", *FRAMES.values(), "of hands"), [row for row in rows if any(row[1:])])


def _averages_differ(group: Group, name: str) -> bool:
    over_joints = group.metric.get(name + OVER_JOINTS)
    return over_joints is not None and over_joints != group.metric.get(name)


def misses_joints(group: Group) -> bool:
    """Whether means over points and over joints differ: some hands lack some joints."""
    return any(_averages_differ(group, name) for name in METRICS)


def num_joint(group: Group) -> int:
    """The number of joints that any hand has in 3D: 1 where only the wrist is known, so that MPJPE is its error."""
    return max((sum(e is not None for e in estimates) for estimates in group.joint.values()), default=0)


def _counts(estimates: Sequence[Estimate | None]) -> str:
    """The number of samples with the metrics of a row: `153`, or `151-153` if the frames differ."""
    counts = sorted({estimate.num_sample for estimate in estimates if estimate is not None})
    return "-".join(str(count) for count in (counts[:1] + counts[-1:] if len(counts) > 1 else counts))


def group_grids(groups: Sequence[Group]) -> list[Grid]:
    """One row per group, in mm and in 2D; none for a single group, nor for a table without a value for all samples."""
    grids = []
    for title, columns in GROUP_TABLES.items() if len(groups) > 1 else ():
        rows = []
        for group in groups:
            name = group.name if len(group.name) <= _NAME_WIDTH else group.name[: _NAME_WIDTH - 3] + "..."
            cells = [show(group.metric.get(metric), UNITS[metric]) for metric in columns.values()]
            rows.append((name, str(group.num_sample), *cells))
        if any(rows[0][2:]):
            grids.append(Grid(title, ("", "hands", *columns), rows))
    return grids


def joint_grids(group: Group) -> list[Grid]:
    """One row per joint, mm; no table without 3D."""

    def cell(frame: str, joint: int) -> str:
        if frame not in group.joint:
            return ""
        return "–" if joint in ALIGNED_JOINTS.get(frame, ()) else show(group.joint[frame][joint], "mm")

    rows = [(name, *(cell(frame, joint) for frame in FRAMES)) for joint, name in enumerate(JOINT_NAMES)]
    title = f"{_title(group)}, mean error of each joint, mm"
    return [Grid(title, ("", *FRAMES.values()), rows)] if group.joint else []


def summary_grids(groups: Sequence[Group]) -> list[Grid]:
    """All metrics of all samples, one row per group, the joints of all samples."""
    grids = [metric_grid(groups[0]), *group_grids(groups), *joint_grids(groups[0])]
    return [grid for grid in grids if grid.rows]


def _title(group: Group) -> str:
    return "all samples" if group.kind == "all" else f"{group.kind} {group.name}"
