"""A comparison: its sides and windows, its tables and the notes needed to read them, as Markdown and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from src.compare.changes import MIN_RUNS, Change, Side, Window, changes, without
from src.compare.runs import METRIC_ORDER, SEED, ComparisonError, Curve, Run, differences
from src.utils.table import Grid

MARKDOWN, DATA, FIGURE = "comparison.md", "comparison.json", "curves.png"
_SHOWN = 4  # names listed in a note


@dataclass(frozen=True)
class Options:
    """How the runs are compared."""

    early: float  # fraction of the common length at its beginning
    late: float  # fraction at its end
    num_draw: int
    seed: int


@dataclass(frozen=True)
class Comparison:
    """Sides by name; every one but the last is compared with the last."""

    side: dict[str, list[Run]]
    options: Options
    skipped: tuple[str, ...] = ()  # for each skipped run the reason

    @property
    def runs(self) -> list[Run]:
        return [run for runs in self.side.values() for run in runs]

    @property
    def metric(self) -> str:
        return self.runs[0].metric

    @property
    def window(self) -> Window:
        return Window.common(self.runs, self.options.early, self.options.late)

    @property
    def baseline(self) -> str:
        return list(self.side)[-1]

    def choose(self, names: Sequence[str]) -> Comparison:
        """Only these sides, the last one as the baseline. Raises ComparisonError for unknown names."""
        if unknown := [name for name in names if name not in self.side]:
            raise ComparisonError(f"{unknown[0]}: unknown side; choose from {', '.join(self.side)}")
        return replace(self, side={name: self.side[name] for name in names}) if names else self

    def changes(self) -> dict[str, list[Change]]:
        """Side -> its changes against the last side."""
        *names, baseline = self.side
        settings = (self.window, self.options.num_draw, self.options.seed)
        return {name: changes(self.side[name], self.side[baseline], *settings) for name in names}


def count_runs(runs: Sequence[Run]) -> str:
    """`1 run`, `5 runs`."""
    return f"{len(runs)} run{'s' * (len(runs) > 1)}"


def grids(comparison: Comparison) -> list[Grid]:
    """One table per side, except for sides without a measure that all runs have."""
    found = []
    for name, rows in comparison.changes().items():
        header = ("", name, comparison.baseline, "change, %", "95 % interval")
        title = f"{name} against {comparison.baseline}, {comparison.metric} in mm"
        if rows:
            found.append(Grid(title, header, [_row(change) for change in rows]))
    return found


def _row(change: Change) -> tuple[str, ...]:
    percent = f"{change.percent:+.1f}"
    if math.isnan(change.percent):
        percent = f"({change.difference:+.2f} {change.measure.unit})"
    interval = f"[{change.low:+.1f}, {change.high:+.1f}]" if math.isfinite(change.low) else ""
    if interval and math.isnan(change.percent):
        interval = f"([{change.low:+.2f}, {change.high:+.2f}] {change.measure.unit})"
    return change.measure.label, _spread(change.side), _spread(change.against), percent, interval


def _spread(side: Side) -> str:
    return f"{side.mean:.2f}" if math.isnan(side.std) else f"{side.mean:.2f} ± {side.std:.2f}"


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the tables has to know, one note each."""
    window = comparison.window
    seeds = {name: ", ".join(str(run.seed) for run in runs) for name, runs in comparison.side.items()}
    return [
        *(f"{name}: {count_runs(runs)}, {SEED} {seeds[name]}" for name, runs in comparison.side.items()),
        f"Steps 1 to {window.end}, which all runs have; early: up to step {window.early}, late: after step "
        f"{window.late}. Mean and std are over checkpoints; ± is the std over runs.",
        f"Gap: {comparison.metric} on validation frames minus training frames, without augmentation and dropout. The "
        "training loss includes dropout, so less dropout alone lowers it; the loss without dropout does not.",
        *_interval_notes(comparison),
        *_run_notes(comparison),
        *(
            f"No row `{measure.label}`: {_some(run.name for run in runs)} would need {measure.needs}."
            for measure, runs in without(comparison.runs, window).items()
        ),
        *_difference_notes(comparison),
    ]


def _interval_notes(comparison: Comparison) -> list[str]:
    said = []
    for name, rows in comparison.changes().items():
        pair = f"{name} and {comparison.baseline}"
        sizes = [len(comparison.side[n]) for n in (name, comparison.baseline)]
        if min(sizes) < MIN_RUNS:
            said.append(
                f"{pair}: no interval: it needs {MIN_RUNS} runs on each side, and one has {min(sizes)}. A change of "
                "this size may be chance; train more seeds."
            )
        elif rows:
            how = "in pairs of equal seed" if rows[0].is_paired else "on each side by itself, as the seeds do not match"
            few = " Fewer than 5 runs are weak evidence." if min(sizes) < 5 else ""
            draws = f"{comparison.options.num_draw} draws, widened for {min(sizes)} runs"
            said.append(f"{pair}: bootstrap over runs, drawn {how}, {draws}.{few}")
        if any(math.isnan(change.percent) for change in rows):
            said.append(f"{pair}: values in parentheses are differences, as {comparison.baseline} may not be above 0.")
    return said


def _run_notes(comparison: Comparison) -> list[str]:
    found, steps = [f"Skipped: {reason}" for reason in comparison.skipped], set()
    unfinished = [run for run in comparison.runs if run.last_step < run.total_step]
    if unfinished:
        found.append(f"Not finished: {_some(f'{r.name} (step {r.last_step} of {r.total_step})' for r in unfinished)}.")
    for run in comparison.runs:
        val = run.val.between(0, comparison.window.end)
        steps.add(tuple(val.step.tolist()))
        if lost := int((~np.isfinite(val.value)).sum()):
            found.append(f"{run.name}: {lost} of {len(val.value)} validations were not finite and do not count.")
    if len(steps) > 1:
        found.append("The runs were validated at different steps, so their means weigh the steps differently.")
    return found


def _difference_notes(comparison: Comparison) -> list[str]:
    inside = {name: differences(runs) for name, runs in comparison.side.items()}
    found = [
        f"Within {name} the runs differ in more than the seed: {_keys(keys)}." for name, keys in inside.items() if keys
    ]
    between = differences([runs[0] for runs in comparison.side.values()])
    return [*found, f"The sides differ in: {_keys(between) or 'nothing but the seed, by their configurations'}."]


def _keys(different: Mapping[str, Sequence[Any]]) -> str:
    return "; ".join(f"{key} = {' | '.join(map(str, values))}" for key, values in different.items())


def _some(texts: Iterable[str]) -> str:
    """`a, b, c, d and 3 more`."""
    texts = list(texts)
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def markdown(comparison: Comparison, command: str) -> str:
    """The report as Markdown; the figure is next to it."""
    head = f"# {', '.join(comparison.changes())} against {comparison.baseline}\n\n`{command}`\n"
    items = "\n".join(f"- {note}" for note in notes(comparison))
    tables = "\n".join(grid.as_markdown() for grid in grids(comparison))
    return f"{head}\n![curves]({FIGURE})\n\n{tables}\n{items}\n"


def write_data(comparison: Comparison, path: Path) -> None:
    """Write curves (five significant digits) and configurations of all runs, from which `--redraw` makes the report."""

    def tree(run: Run) -> dict[str, Any]:
        curve = {
            name: {"step": c.step.tolist(), "value": [float(f"{v:.5g}") if math.isfinite(v) else None for v in c.value]}
            for name, c in run.curve.items()
        }
        own = {key: value for key, value in run.config.items() if key not in common}
        return {"name": run.name, "config": own, "curve": curve}

    first = comparison.runs[0].config
    common = {k: v for k, v in first.items() if all(r.config.get(k, ...) == v for r in comparison.runs)}
    side = {name: [tree(run) for run in runs] for name, runs in comparison.side.items()}
    path.write_text(json.dumps({"config": common, "side": side}, separators=(",", ":")) + "\n", encoding="utf-8")


def read_data(path: Path, options: Options, metric: str | None = None) -> Comparison:
    """Read a file of `write_data`, to be compared by `metric` (None: the first of METRIC_ORDER).

    Raises:
        ComparisonError: the file is not of this format, or lacks `metric`.
    """

    def run_of(tree: Mapping[str, Any]) -> Run:
        curve = {
            name: Curve(np.array(c["step"]), np.array([math.nan if v is None else v for v in c["value"]]))
            for name, c in tree["curve"].items()
        }
        known = [name.removeprefix("val/") for name in curve if name.startswith("val/")]
        chosen = metric or next(name for name in (*METRIC_ORDER, *known) if name in known)
        if chosen not in known:
            raise ComparisonError(f"{tree['name']}: has no {chosen}; choose one with --metric: {', '.join(known)}")
        return Run(tree["name"], {**common, **tree["config"]}, chosen, curve)

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        common = content["config"]
        return Comparison({name: [run_of(run) for run in runs] for name, runs in content["side"].items()}, options)
    except ComparisonError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ComparisonError(f"{path}: is not a {DATA} of an earlier comparison ({error})") from error
