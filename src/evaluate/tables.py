"""The numbers as tables, at most 120 columns wide on a terminal, and the same as Markdown.

A row, or a column, that no sample can fill is left out: what was not measured is absent, not zero.
"""

from __future__ import annotations

from collections.abc import Sequence

from src.evaluate.bootstrap import Estimate, Group
from src.evaluate.metrics import FRAMES, PCK_2D, PCK_MM
from src.hand.skeleton import JOINT_NAMES
from src.utils.table import Grid

# label, name with the frame left open, unit; in mm, as a share in %, or as a score of 0..1
METRICS = (
    ("MPJPE", "mpjpe_{}", "mm"),
    (f"PCK at {PCK_MM:.0f} mm", "pck20_{}", "%"),
    ("AUC 0-50 mm", "auc_{}", ""),
    ("MPVPE", "mpvpe_{}", "mm"),
    ("AUC of vertices", "auc_vert_{}", ""),
    ("F@5 mm", "f5_{}", ""),
    ("F@15 mm", "f15_{}", ""),
)
# metrics of one frame alone: label, name, unit, the frame they stand under
SINGLES = (
    ("root error", "root_error", "mm", "cam"),
    ("MPJPE scale-translation", "mpjpe_st", "mm", "rel"),
    ("2D error of the patch", "error_2d", "px", "cam"),
    *((f"2D PCK at {share:g} box", name, "%", "cam") for name, share in PCK_2D.items()),
    ("2D AUC 0-0.2 box", "auc_2d", "", "cam"),
)
UNITS = {name.format(frame): unit for _, name, unit in METRICS for frame in FRAMES} | {n: u for _, n, u, _ in SINGLES}
# what a line of the table of groups shows
GROUP_COLUMNS = {
    "MPJPE camera": "mpjpe_cam",
    "MPJPE root-relative": "mpjpe_rel",
    "PA-MPJPE": "mpjpe_pa",
    "PA-MPVPE": "mpvpe_pa",
}
# the same in 2D; PCK at 0.15 does not fit into the width
GROUP_COLUMNS_2D = {
    "PCK at 0.05, %": "pck05_2d",
    "PCK at 0.1, %": "pck10_2d",
    "PCK at 0.2, %": "pck20_2d",
    "AUC 0-0.2": "auc_2d",
}
_NAME_WIDTH = 18


def show(estimate: Estimate | None, unit: str, with_interval: bool = True) -> str:
    """`12.3 [11.9, 12.8]`; nothing where there is none."""
    if estimate is None:
        return ""
    if estimate.low is None or estimate.high is None or not with_interval:
        return _number(estimate.value, unit)
    return f"{_number(estimate.value, unit)} [{_number(estimate.low, unit)}, {_number(estimate.high, unit)}]"


def _number(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.1f}"
    if abs(value) >= 999.95:  # of such an error nobody asks for the decimal, and the column stays narrow
        return f"{value:.0f}"
    return f"{value:.1f}" if unit else f"{value:.3f}"


def metric_grid(group: Group) -> Grid:
    """Every metric of one group, one column a frame of reference."""
    rows = []
    for label, name, unit in METRICS:
        estimates = [group.metric.get(name.format(frame)) for frame in FRAMES]
        cells = [show(estimate, unit) for estimate in estimates]
        rows.append((f"{label}, {unit}" if unit else label, *cells, _counts(estimates)))
    for label, name, unit, place in SINGLES:
        estimate = group.metric.get(name)
        cells = [show(estimate, unit) if frame == place else "" for frame in FRAMES]
        rows.append((f"{label}, {unit}" if unit else label, *cells, _counts([estimate])))
    title = f"{_title(group)}, {group.num_sample} hands"
    return Grid(title, ("", *FRAMES.values(), "of hands"), [row for row in rows if any(row[1:])])


def _counts(estimates: Sequence[Estimate | None]) -> str:
    """How many samples have the metrics of a row: `153`, or `151-153` where the frames differ."""
    counts = sorted({estimate.num_sample for estimate in estimates if estimate is not None})
    return "-".join(str(count) for count in (counts[:1] + counts[-1:] if len(counts) > 1 else counts))


def group_grid(groups: Sequence[Group]) -> Grid | None:
    """One line a group, mm; None where all samples are the only group."""
    if len(groups) < 2:
        return None
    return _group_grid(groups, GROUP_COLUMNS, "by data set and side, mm")


def group_grid_2d(groups: Sequence[Group]) -> Grid | None:
    """One line a group, 2D joints in shares of the box; None for a single group or without 2D."""
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
    """One line a joint, mm; None where there is no 3D."""
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
