"""The tables of an evaluation, at most 120 columns wide on a terminal, and the same as Markdown.

A row or column without values is omitted: what could not be measured is absent, not zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from src.evaluate.bootstrap import Estimate, Group
from src.hand.skeleton import JOINT_NAMES
from src.metric import FRAMES, METRICS, UNITS
from src.utils.table import Grid

# columns of the table of groups
GROUP_COLUMNS = {
    "MPJPE camera": "mpjpe_cam",
    "MPJPE root-relative": "mpjpe_rel",
    "PA-MPJPE": "mpjpe_pa",
    "PA-MPVPE": "mpvpe_pa",
}
# the same in 2D; PCK at 0.15 does not fit within 120 columns
GROUP_COLUMNS_2D = {
    "PCK at 0.05, %": "pck05_2d",
    "PCK at 0.1, %": "pck10_2d",
    "PCK at 0.2, %": "pck20_2d",
    "AUC 0-0.2": "auc_2d",
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
    """Every metric of one group, one column per frame of reference."""
    names: dict[str, dict[str, str]] = {}  # label -> frame -> metric
    for name, metric in METRICS.items():
        if metric.label:
            names.setdefault(metric.label, {})[metric.frame] = name
    rows = []
    for label, by_frame in sorted(names.items(), key=lambda item: len(item[1]) == 1):  # those of every frame first
        unit = UNITS[next(iter(by_frame.values()))]
        estimates = [group.metric.get(by_frame.get(frame, "")) for frame in FRAMES]
        cells = [show(estimate, unit) for estimate in estimates]
        rows.append((f"{label}, {unit}" if unit else label, *cells, _counts(estimates)))
    title = f"{_title(group)}, {group.num_sample} hands"
    return Grid(title, ("", *FRAMES.values(), "of hands"), [row for row in rows if any(row[1:])])


def _counts(estimates: Sequence[Estimate | None]) -> str:
    """The number of samples with the metrics of a row: `153`, or `151-153` if the frames differ."""
    counts = sorted({estimate.num_sample for estimate in estimates if estimate is not None})
    return "-".join(str(count) for count in (counts[:1] + counts[-1:] if len(counts) > 1 else counts))


def group_grid(groups: Sequence[Group]) -> Grid | None:
    """One row per group, mm; None if all samples are the only group."""
    if len(groups) < 2:
        return None
    return _group_grid(groups, GROUP_COLUMNS, "by data set and side, mm")


def group_grid_2d(groups: Sequence[Group]) -> Grid | None:
    """One row per group, 2D PCK relative to the box; None for a single group or without 2D."""
    if len(groups) < 2 or "auc_2d" not in groups[0].metric:
        return None
    return _group_grid(groups, GROUP_COLUMNS_2D, "by data set and side, 2D in shares of the hand's box")


def _group_grid(groups: Sequence[Group], columns: dict[str, str], title: str) -> Grid:
    rows = []
    for group in groups:
        cells = [show(group.metric.get(name), UNITS[name]) for name in columns.values()]
        rows.append((_shorten(group.name), str(group.num_sample), *cells))
    return Grid(title, ("", "hands", *columns), rows)


def joint_grid(group: Group) -> Grid | None:
    """One row per joint, mm; None without 3D."""
    if not group.joint:
        return None
    rows = []
    for index, name in enumerate(JOINT_NAMES):
        cells = [show(group.joint[frame][index], "mm") if frame in group.joint else "" for frame in FRAMES]
        rows.append((name, *cells))
    return Grid(f"{_title(group)}, mean error of each joint, mm", ("", *FRAMES.values()), rows)


def _title(group: Group) -> str:
    return "all samples" if group.kind == "all" else f"{group.kind} {group.name}"


def _shorten(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 3] + "..."
