"""A comparison as a whole: its sides and windows, what has to be known to read it, tables, Markdown and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from src.compare.changes import MIN_RUNS, Change, Side, Window, changes, without
from src.compare.runs import SEED, ComparisonError, Run, differences, from_json, to_json
from src.utils.table import Grid

MARKDOWN, DATA, FIGURE = "comparison.md", "comparison.json", "curves.png"
_SHOWN_VALUES = 4


@dataclass(frozen=True)
class Options:
    """How the runs are compared."""

    early: float  # share of the common length at its beginning
    late: float  # and at its end
    num_draw: int
    seed: int


@dataclass(frozen=True)
class Comparison:
    """Sides by name; every one but the last is compared with the last."""

    side: dict[str, list[Run]]
    options: Options
    left_out: tuple[str, ...] = ()  # why runs that were meant are not in `side`

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
        """The comparison of these sides alone, the last one the baseline. Raises ComparisonError for unknown names."""
        if unknown := [name for name in names if name not in self.side]:
            raise ComparisonError(f"{unknown[0]}: no such side; there are {', '.join(self.side)}")
        return replace(self, side={name: self.side[name] for name in names}) if names else self

    def changes(self) -> dict[str, list[Change]]:
        """Side -> what changed against the last side."""
        *names, baseline = self.side
        how = (self.window, self.options.num_draw, self.options.seed)
        return {name: changes(self.side[name], self.side[baseline], *how) for name in names}


def count_runs(runs: Sequence[Run]) -> str:
    """`1 run`, `5 runs`."""
    return f"{len(runs)} run{'s' * (len(runs) > 1)}"


def grids(comparison: Comparison) -> list[Grid]:
    """One table a side; none where there is nothing that all runs have."""
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
    """What a reader of the table has to know, one sentence or two each."""
    window, said = comparison.window, []
    for name, runs in comparison.side.items():
        seeds = ", ".join(str(run.seed) for run in runs)
        said.append(f"{name}: {count_runs(runs)}, {SEED} {seeds}")
    said.append(
        f"Compared over steps 1 to {window.end}; early: up to step {window.early}, late: after step {window.late}. "
        "Mean and std are those over checkpoints; validation at step 0 does not count. ± is the std over runs."
    )
    said.append(
        f"Gap: {comparison.metric} of validation minus that of training frames, both without augmentation and dropout. "
        "The training loss is that of the training steps, dropout and all, so it falls by itself where less is "
        "dropped; the loss without dropout, on the training frames of the gap, does not."
    )
    said += _interval_notes(comparison)
    said += _run_notes(comparison)
    said += _absence_notes(comparison)
    said += _difference_notes(comparison)
    return said


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
            few = " Fewer than 5 runs say little." if min(sizes) < 5 else ""
            draws = f"{comparison.options.num_draw} draws, widened for {min(sizes)} runs"
            said.append(f"{pair}: bootstrap over runs, drawn {how}, {draws}.{few}")
        if any(math.isnan(change.percent) for change in rows):
            said.append(
                f"{pair}: what is in parentheses is a difference, as {comparison.baseline} is not surely above 0."
            )
    return said


def _run_notes(comparison: Comparison) -> list[str]:
    said = []
    unfinished = [run for run in comparison.runs if not run.is_finished]
    said += [f"Left out: {reason}" for reason in comparison.left_out]
    if unfinished:
        shown = [f"{r.name} (step {r.last_step} of {r.config['GENERAL.total_step']})" for r in unfinished]
        said.append(f"Not finished: {_some(shown)}.")
    lengths = sorted({run.last_step for run in comparison.runs})
    if len(lengths) > 1:
        said.append(f"The runs got to steps {_some(map(str, lengths))}: only the steps that all have are compared.")
    grids_of_steps = {tuple(run.val.between(0, comparison.window.end).step.tolist()) for run in comparison.runs}
    if len(grids_of_steps) > 1:
        said.append(
            "The runs were not validated at the same steps: their means over checkpoints weigh steps differently."
        )
    for run in comparison.runs:
        value = run.val.between(0, comparison.window.end).value
        if lost := int((~np.isfinite(value)).sum()):
            said.append(f"{run.name}: {lost} of {len(value)} validations were not finite and do not count.")
    return said


def _absence_notes(comparison: Comparison) -> list[str]:
    """Why rows are missing from the tables."""
    said, window = [], comparison.window
    blind = [run for run in comparison.runs if run.train_eval is None]
    if blind:
        said.append(
            f"No generalisation gap: {_some(run.name for run in blind)} did not measure training frames. "
            "DATA.train.eval_sample=500 makes a run do so at every validation."
        )
    reasons = {
        "val_std": "two validations in these steps",
        "gap_early": f"a validation up to step {window.early}; --early makes that part longer",
        "gap_late": f"a validation after step {window.late}; --late makes that part longer",
    }
    for measure, runs in without(comparison.runs, window).items():
        if measure.needs_train_eval:
            runs = [run for run in runs if run not in blind]
        if runs:
            need = reasons.get(measure.key, "a finite value in these steps")
            said.append(f"No row `{measure.label}`: {_some(run.name for run in runs)} would need {need}.")
    return said


def _difference_notes(comparison: Comparison) -> list[str]:
    said = []
    for name, runs in comparison.side.items():
        if inside := differences(runs):
            said.append(f"Within {name} the runs differ in more than the seed: {_keys(inside)}.")
    between = differences([runs[0] for runs in comparison.side.values()])
    told = _keys(between) if between else "nothing but the seed, by their configurations"
    said.append(f"What differs between the sides: {told}.")
    return said


def _keys(different: Mapping[str, Sequence[Any]]) -> str:
    return "; ".join(f"{key} = {' | '.join(map(str, values))}" for key, values in different.items())


def _some(texts: Any) -> str:
    texts = list(texts)
    more = f" and {len(texts) - _SHOWN_VALUES} more" if len(texts) > _SHOWN_VALUES else ""
    return ", ".join(texts[:_SHOWN_VALUES]) + more


def markdown(comparison: Comparison, command: str) -> str:
    """The whole report as Markdown, with the figure that lies beside it."""
    head = f"# {', '.join(comparison.changes())} against {comparison.baseline}\n\n`{command}`\n"
    told = "\n".join(f"- {note}" for note in notes(comparison))
    tables = "\n".join(grid.as_markdown() for grid in grids(comparison))
    return f"{head}\n![curves]({FIGURE})\n\n{tables}\n{told}\n"


def write_data(comparison: Comparison, path: Path) -> None:
    """Keep the curves and configurations of all runs: figure and tables can be made again from this file alone."""
    first = comparison.runs[0].config
    common = {k: v for k, v in first.items() if all(r.config.get(k, ...) == v for r in comparison.runs)}
    sides = {name: [to_json(run, common) for run in runs] for name, runs in comparison.side.items()}
    path.write_text(json.dumps({"config": common, "side": sides}, separators=(",", ":")) + "\n", encoding="utf-8")


def read_data(path: Path, options: Options, metric: str | None = None) -> Comparison:
    """The inverse of `write_data`. Raises ComparisonError where the file is none of ours or lacks `metric`."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        side = {name: [from_json(run, tree["config"], metric) for run in runs] for name, runs in tree["side"].items()}
    except ComparisonError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ComparisonError(f"{path}: is not a {DATA} of an earlier comparison ({error})") from error
    return Comparison(side, options)
