"""Plots of an evaluation: the error of each joint and the PCK curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from src.evaluate.bootstrap import Estimate, Group
from src.hand.skeleton import FINGER_NAMES, JOINT_NAMES
from src.metric import ALIGNED_JOINTS, FRAMES, PCK_2D_THRESHOLDS, PCK_THRESHOLDS_MM

COLOURS = {"cam": "#7a8794", "rel": "#1f77b4", "pa": "#d1495b", "2d": "#3a7d44"}
_DPI = 130


_IN_MM = ("error threshold, mm", PCK_THRESHOLDS_MM)
# the panels of pck.png: title, x label, thresholds [T], curve -> (AUC metric, label, colour)
_PANELS = (
    ("joints", *_IN_MM, {f"joint_{f}": (f"auc_{f}", label, COLOURS[f]) for f, label in FRAMES.items()}),
    ("vertices", *_IN_MM, {f"vert_{f}": (f"auc_vert_{f}", label, COLOURS[f]) for f, label in FRAMES.items()}),
    (
        *("2D joints", "error threshold, share of the hand's box", PCK_2D_THRESHOLDS),
        {"joint_2d": ("auc_2d", "image", COLOURS["2d"])},
    ),
)


def plot_joint_error(group: Group, path: Path) -> None:
    """Bars of the mean error of each joint with intervals, one row per frame; no file without 3D."""
    frames = [frame for frame in FRAMES if frame in group.joint]
    if not frames:
        return
    figure = Figure(figsize=(10, 1.0 + 2.3 * len(frames)), layout="constrained")
    for axis, frame in zip(np.atleast_1d(figure.subplots(len(frames), 1, sharex=True)), frames):
        aligned = ALIGNED_JOINTS.get(frame, ())
        bars = [None if joint in aligned else estimate for joint, estimate in enumerate(group.joint[frame])]
        _draw_bars(axis, bars, COLOURS[frame])
        axis.set_ylabel("mm")
        axis.set_title(FRAMES[frame], loc="left", fontsize=10)
    axis.set_xticks(range(len(JOINT_NAMES)), [name[-1] if i else "wrist" for i, name in enumerate(JOINT_NAMES)])
    for i, finger in enumerate(FINGER_NAMES):
        axis.annotate(finger, (4 * i + 2.5, 0), (0, -22), xycoords=("data", "axes fraction"),
                      textcoords="offset points", ha="center", va="top", fontsize=9)  # fmt: skip
    figure.suptitle(f"mean error of each joint, {group.num_sample} hands; lines: 95 % interval", fontsize=11)
    figure.savefig(path, dpi=_DPI)


def _draw_bars(axis: object, joints: list[Estimate | None], colour: str) -> None:
    for index, estimate in enumerate(joints):
        if estimate is None:
            continue
        axis.bar(index, estimate.value, color=colour, width=0.72)
        if estimate.low is not None and estimate.high is not None:
            axis.vlines(index, estimate.low, estimate.high, color="black", linewidth=1.2)
    for border in range(0, len(joints) - 1, 4):
        axis.axvline(border + 0.5, color="0.85", linewidth=0.8, zorder=0)
    axis.margins(x=0.01)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)


def plot_pck(group: Group, path: Path) -> None:
    """PCK curves of joints, vertices and 2D joints, AUC in the legend; no file without any."""
    panels = [panel for panel in _PANELS if group.curve.keys() & panel[-1].keys()]
    if not panels:
        return
    figure = Figure(figsize=(1.2 + 4.4 * len(panels), 4.0), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axis, (title, xlabel, thresholds, lines) in zip(axes, panels, strict=True):
        for name, (auc, label, colour) in lines.items():
            if (curve := group.curve.get(name)) is not None:
                axis.plot(thresholds, curve, color=colour, label=f"{label}, AUC {group.metric[auc].value:.3f}")
        axis.set(xlabel=xlabel, xlim=thresholds[[0, -1]], ylim=(0, 1))
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(color="0.9")
        axis.legend(loc="best", fontsize=8, frameon=True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("fraction of all points within the threshold")
    figure.suptitle(f"PCK, {group.num_sample} hands", fontsize=11)
    figure.savefig(path, dpi=_DPI)
