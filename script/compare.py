"""Compare finished or running trainings: overlaid curves and a table of changes with bootstrap intervals.

Name a run by its folder; a folder with runs below it, a glob, or several of them select all their runs (a group),
such as the seeds of one setting. The metrics.jsonl and config.yaml of each run are read.

python script/compare.py checkpoint/schedule/gate --against checkpoint/schedule/constant
python script/compare.py checkpoint/2026-02-01/12-00-00_stage1-dino_large --against 'checkpoint/2026-01-*/*dino_large'
python script/compare.py RUN --also ANOTHER --against BASELINE --metric mpjpe_rel --output comparison
python script/compare.py gate --against constant --redraw docs/figures/data/claim.json --output comparison
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout, whatever the working directory

import src.utils.environment  # noqa: F401  (checks that required packages are installed)

if TYPE_CHECKING:
    from src.compare.report import Comparison, Options


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with code 2 on a usage error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    runs = "RUN_OR_GLOB"
    parser.add_argument("runs", nargs="*", metavar=runs, help="a group of runs")
    parser.add_argument("--against", nargs="+", metavar=runs, help="the baseline runs")
    parser.add_argument("--also", nargs="+", metavar=runs, action="append", default=[], help="a further group")
    parser.add_argument("--metric", help="in mm; default: mpjpe_cam, or the first that all runs have")
    parser.add_argument("--early", type=float, default=1 / 3, help="fraction of the run that is early; default: 1/3")
    parser.add_argument("--late", type=float, default=1 / 3, help="fraction of the run that is late; default: 1/3")
    parser.add_argument("--num_bootstrap", type=int, default=10000, help="bootstrap draws; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument(
        "--redraw",
        type=Path,
        metavar="JSON",
        help="redraw an earlier comparison.json: all of its groups, or those named",
    )
    parser.add_argument("--output", type=Path, help="a new folder; default: checkpoint/comparison/<date and time>")
    args = parser.parse_args(argv)
    if bool(args.runs) != bool(args.against) or not (args.runs or args.redraw):
        parser.error("name the runs and, after --against, the baseline runs")
    if not (0 < args.early <= 1 and 0 < args.late <= 1):
        parser.error("--early and --late are fractions of the run, above 0 and at most 1")
    if args.num_bootstrap < 100:
        parser.error("--num_bootstrap must be at least 100")
    return args


def load(args: argparse.Namespace, options: Options) -> Comparison:
    """Read every side. Raises ComparisonError."""
    from src.compare.report import Comparison, read_data
    from src.compare.runs import find_runs, read_sides

    if args.redraw is not None:
        names = [*args.runs, *(name for also in args.also for name in also), *(args.against or [])]
        return read_data(args.redraw, options, args.metric).choose(names)
    patterns = [args.runs, *args.also, args.against]
    sides = dict(zip(side_names(patterns), map(find_runs, patterns), strict=True))
    read, skipped = read_sides(sides, args.metric)
    return Comparison(read, options, skipped)


def side_names(patterns: Sequence[Sequence[str]]) -> list[str]:
    """Name each side by the shortest end of its path that is unique among the sides."""
    parts = [[part for part in Path(side[0]).parts if not set(part) <= set("*?.")] or ["runs"] for side in patterns]
    for number in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-number:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)

    from src.compare.plot import plot_curves
    from src.compare.report import DATA, FIGURE, MARKDOWN, Options, grids, markdown, notes, write_data
    from src.utils.console import console
    from src.utils.files import make_output

    try:
        comparison = load(args, Options(args.early, args.late, args.num_bootstrap, args.seed))
        now = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
        folder = make_output(args.output, Path("checkpoint/comparison") / now)
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "script/compare.py", *(sys.argv[1:] if argv is None else argv)])
    (folder / MARKDOWN).write_text(markdown(comparison, command), encoding="utf-8")
    write_data(comparison, folder / DATA)
    plot_curves(comparison, folder / FIGURE)
    for grid in grids(comparison):
        console.print(grid.as_rich(), "")
    for note in notes(comparison):
        console.print(f"- {note}", soft_wrap=True)
    console.print(f"written to {folder}: {FIGURE}, {MARKDOWN}, {DATA}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
