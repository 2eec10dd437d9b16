"""The mean of each metric with a bootstrap interval, for all samples and for groups of them.

Percentile bootstrap (Efron, "Bootstrap methods: another look at the jackknife", 1979): each draw resamples the samples,
or whole clips, with replacement and recomputes the metric as sum / count over its points, or as the mean over joints of
each joint's sum / count. The interval contains the middle 95 % of the draws.

Shape legend: S samples, U resampling units, D draws, M columns of metrics, J = 21 joints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from src.metric import OVER_JOINTS, SampleMetric, Samples, mean

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
    """A mean and its 95 % interval, which is None if a single sample (or clip) has the metric, or it is not finite."""

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
        total, count = (part.astype(np.float64) for part in chosen.pop(key))
        frame = key.removeprefix("curve_")
        if count.sum() > 0:
            curve[frame if frame.startswith("vert") else f"joint_{frame}"] = (total.sum(axis=0) / count.sum()).tolist()
    estimates = _estimates(chosen, _units(samples, bootstrap.over), bootstrap)
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


def _estimates(
    metrics: Mapping[str, SampleMetric], unit: np.ndarray, bootstrap: Bootstrap
) -> dict[str, list[Estimate | None]]:
    """An estimate of each column of each metric, but a single one of a mean over joints; None without a valid point."""
    over_joints = {name: value for name, value in metrics.items() if name.endswith(OVER_JOINTS)}
    uneven = {name: value for name, value in over_joints.items() if _is_uneven(value.count)}
    single = {name: _columns(value) for name, value in metrics.items() if name not in over_joints}

    columns = [column for part in single.values() for column in part]
    together = SampleMetric(*(np.concatenate(parts, axis=1) for parts in zip(*columns)))
    num_unit = int(unit.max()) + 1
    summed = [_sum_units(value, unit, num_unit) for value in (together, *uneven.values())]
    bounds = zip(*_intervals(summed[0], summed[1:], bootstrap))
    found = {name: [_estimate(c, *next(bounds), unit) for c in part] for name, part in single.items()}
    found |= {name: [_estimate(value, *next(bounds), unit)] for name, value in uneven.items()}
    for name in over_joints.keys() - uneven.keys():  # it is the mean over points
        found[name] = found[name.removesuffix(OVER_JOINTS)]
    return {name: found[name] for name in metrics}


def _is_uneven(count: np.ndarray) -> bool:
    """Whether some samples lack joints that others have: [S, J]. Otherwise means over points and joints are equal."""
    known = count[:, count.any(axis=0)]
    return bool((known != known[:, :1]).any())


def _columns(value: SampleMetric) -> list[SampleMetric]:
    """The columns [S, 1] of a metric."""
    count = np.broadcast_to(value.count, value.total.shape)
    return [SampleMetric(value.total[:, [k]], count[:, [k]]) for k in range(value.total.shape[1])]


def _estimate(value: SampleMetric, low: float, high: float, unit: np.ndarray) -> Estimate | None:
    """The estimate of the mean of a metric [S, K]; `low` and `high`: its interval over the units [S]."""
    with_metric = unit[(value.count > 0).any(axis=1)]
    if len(with_metric) == 0:
        return None
    centre = mean(*value)
    known = math.isfinite(centre) and bool((with_metric != with_metric[0]).any())
    return Estimate(centre, *((float(low), float(high)) if known else (None, None)), len(with_metric))


def _sum_units(value: SampleMetric, unit: np.ndarray, num_unit: int) -> SampleMetric:
    """Sum the rows [S, K] of each unit: [U, K]."""
    if np.array_equal(unit, np.arange(len(unit))):  # every sample is a unit: no copy
        return value
    summed = SampleMetric(*(np.zeros((num_unit, part.shape[1])) for part in value))
    for out, part in zip(summed, value):
        np.add.at(out, unit, part)
    return summed


def _intervals(
    columns: SampleMetric, over_joints: Sequence[SampleMetric], bootstrap: Bootstrap
) -> tuple[np.ndarray, np.ndarray]:
    """The 2.5 % and 97.5 % quantiles over draws of the units: of the mean of each column [U, M], then of the mean over
    joints of each metric [U, J]."""
    draws = []
    for weight in _draws(len(columns.total), bootstrap):
        with np.errstate(invalid="ignore", divide="ignore"):
            means = [(weight @ columns.total) / (weight @ columns.count)]
            means += [_mean_over_joints(weight @ total, weight @ count) for total, count in over_joints]
        draws.append(np.concatenate(means, axis=1))
    ratio = np.concatenate(draws)
    ratio[:, ~np.isfinite(ratio).any(axis=0)] = 0.0  # no valid point, or an infinite or NaN prediction
    return tuple(np.nanquantile(ratio, [_TAIL, 1 - _TAIL], axis=0))


def _mean_over_joints(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The mean [D, 1] of the joints' means total / count [D, J], over joints with a count; NaN without any."""
    known = count > 0
    return np.where(known, total / count, 0.0).sum(axis=1, keepdims=True) / known.sum(axis=1, keepdims=True)


def _draws(num_unit: int, bootstrap: Bootstrap) -> Iterator[np.ndarray]:
    """How often each unit is drawn, for some draws at a time: [D, U]."""
    rng = np.random.default_rng(bootstrap.seed)
    step = max(1, _CHUNK // num_unit)
    for begin in range(0, bootstrap.num_draw, step):
        drawn = rng.integers(0, num_unit, (min(step, bootstrap.num_draw - begin), num_unit))
        yield np.stack([np.bincount(row, minlength=num_unit) for row in drawn]).astype(np.float64)
