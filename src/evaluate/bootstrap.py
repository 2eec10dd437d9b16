"""The mean of each metric with a bootstrap interval, for all samples and for groups of them.

Percentile bootstrap (Efron, "Bootstrap methods: another look at the jackknife", 1979): each draw resamples the samples,
or whole clips, with replacement and recomputes the metric as sum / count over its points. The interval contains the
middle 95 % of the draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from src.metric import SampleMetric, Samples, mean

_TAIL = 0.025
_CHUNK = 4_000_000  # weights in memory at once


@dataclass(frozen=True)
class Bootstrap:
    """The settings of the intervals; written to result.json."""

    num_draw: int = 1000
    over: str = "sample"  # resampling unit; "clip": frames of one video are correlated, draw whole clips
    seed: int = 0


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval, which is None for a single sample (or clip)."""

    value: float
    low: float | None
    high: float | None
    num_sample: int  # with this metric


@dataclass(frozen=True)
class Group:
    """The results of a group of samples. What the data has no labels for is absent."""

    kind: str  # "all", "source" or "side"
    name: str
    num_sample: int
    metric: dict[str, Estimate]
    joint: dict[str, list[Estimate | None]]  # frame -> 21 joints; None for a joint without a valid sample
    curve: dict[str, list[float]]  # "joint_<frame>", "vert_<frame>" or "joint_2d" -> PCK at the 100 thresholds


def summarise(samples: Samples, bootstrap: Bootstrap) -> list[Group]:
    """All samples first, then each data set and each side if there is more than one."""
    masks = [("all", "all", np.ones(len(samples), dtype=bool))]
    if len(sources := sorted(set(samples.source))) > 1:
        masks += [("source", source, samples.source == source) for source in sources]
    if 0 < samples.is_right.sum() < len(samples):
        masks += [("side", "left", ~samples.is_right), ("side", "right", samples.is_right)]
    return [_group(samples.select(mask), kind, name, bootstrap) for kind, name, mask in masks]


def _group(samples: Samples, kind: str, name: str, bootstrap: Bootstrap) -> Group:
    chosen, curve = samples.metric, {}
    for key in [n for n in chosen if n.startswith("curve_")]:
        total, count = chosen.pop(key)
        frame = key.removeprefix("curve_")
        if count.sum() > 0:
            curve[frame if frame.startswith("vert") else f"joint_{frame}"] = (total.sum(axis=0) / count.sum()).tolist()
    unit = _units(samples, bootstrap.over)
    estimates = dict(zip(chosen, _estimates(list(chosen.values()), unit, bootstrap), strict=True))
    per_joint = [n for n in estimates if n.startswith("joint_")]
    joint = {n.removeprefix("joint_"): estimates.pop(n) for n in per_joint}
    return Group(
        kind=kind,
        name=name,
        num_sample=len(samples),
        metric={n: e[0] for n, e in estimates.items() if e[0] is not None},
        joint={n: e for n, e in joint.items() if any(e)},
        curve=curve,
    )


def _units(samples: Samples, over: str) -> np.ndarray:
    """The number [S] of each sample's resampling unit: the sample itself, or the clip in its key ("<clip>/<frame>")."""
    if over == "sample":
        return np.arange(len(samples))
    names = np.array([f"{source}/{key.rpartition('/')[0]}" for key, source in zip(samples.key, samples.source)])
    return np.unique(names, return_inverse=True)[1]


def _estimates(metrics: list[SampleMetric], unit: np.ndarray, bootstrap: Bootstrap) -> list[list[Estimate | None]]:
    """The estimate of each column of each metric; None without a valid point."""
    total = np.concatenate([m.total for m in metrics], axis=1)
    count = np.concatenate([np.broadcast_to(m.count, m.total.shape) for m in metrics], axis=1)
    num_unit = int(unit.max()) + 1
    low, high = _interval(_sum_units(total, unit, num_unit), _sum_units(count, unit, num_unit), bootstrap)
    flat = []
    for column in range(total.shape[1]):
        num_sample = int((count[:, column] > 0).sum())
        if num_sample == 0:
            flat.append(None)
            continue
        known = num_unit > 1 and num_sample > 1
        bounds = (float(low[column]), float(high[column])) if known else (None, None)
        flat.append(Estimate(mean(total[:, column], count[:, column]), *bounds, num_sample))
    ends = np.cumsum([m.total.shape[1] for m in metrics]).tolist()
    return [flat[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def _sum_units(value: np.ndarray, unit: np.ndarray, num_unit: int) -> np.ndarray:
    """Sum the rows [S, M] of each unit: [U, M]."""
    out = np.zeros((num_unit, value.shape[1]))
    np.add.at(out, unit, value)
    return out


def _interval(total: np.ndarray, count: np.ndarray, bootstrap: Bootstrap) -> tuple[np.ndarray, np.ndarray]:
    """The 2.5 % and 97.5 % quantiles [M] of sum(total) / sum(count) over draws of the rows of total, count [U, M]."""
    rng, num_unit = np.random.default_rng(bootstrap.seed), len(total)
    draws = []
    step = max(1, _CHUNK // num_unit)
    for begin in range(0, bootstrap.num_draw, step):
        num = min(step, bootstrap.num_draw - begin)
        drawn = rng.integers(0, num_unit, (num, num_unit))
        weight = np.stack([np.bincount(row, minlength=num_unit) for row in drawn]).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            draws.append((weight @ total) / (weight @ count))
    ratio = np.concatenate(draws)
    ratio[:, np.isnan(ratio).all(axis=0)] = 0.0  # no draw with a valid point
    return tuple(np.nanquantile(ratio, [_TAIL, 1 - _TAIL], axis=0))
