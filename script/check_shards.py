"""Read shards from end to end; list corrupt samples and implausible labels. Exit codes: 0 healthy, 1 corrupt samples
(with --strict also implausible labels), 2 invalid arguments.

python script/check_shards.py data/demo/train data/demo/val
python script/check_shards.py 'DexYCB/s1/*' --root /data/shards --decode --num_process 8
python script/check_shards.py data/demo/val --sheet sheet.png
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout, whatever the working directory

import src.utils.environment  # noqa: F401  (checks that the packages below are installed)

# isort: split
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from src.data.check_shards import ShardReport, check_shards, details, examples, merge
from src.data.contact_sheet import contact_sheet
from src.data.plausibility.tally import coverage, findings
from src.data.plausibility.tally import merge as merge_tallies
from src.data.shards.build_index import open_indexes
from src.data.shards.errors import REASONS
from src.data.shards.paths import resolve_source
from src.hand.load import hand_model_problem, load_hand
from src.utils.console import make_console
from src.utils.files import encode_image

HEALTHY, CORRUPT, INVALID_ARGUMENTS = 0, 1, 2
MANO = Path("model/mano/MANO_RIGHT.pkl")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("source", nargs="+", help="shards, folders of shards, or patterns: 'a/*', 'a/{000..131}.tar'")
    parser.add_argument(
        "--root", type=Path, help="folder of relative sources; default: here, or HAND_DATA_ROOT if nothing matches here"
    )
    parser.add_argument("--index_dir", type=Path, help="folder of the index files, as in DATA.index_dir")
    parser.add_argument("--decode", action="store_true", help="also decode every image")
    parser.add_argument("--mano", type=Path, help=f"MANO file to compare joints with; default: {MANO} if it exists")
    parser.add_argument("--strict", action="store_true", help="exit with 1 also for implausible labels")
    parser.add_argument("--sheet", type=Path, help="image file for patches with joints, before and after augmentation")
    parser.add_argument("--num_hand", type=int, default=24, help="number of hands on the sheet; default: %(default)s")
    parser.add_argument("--num_process", type=int, default=os.cpu_count() or 1, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.num_hand < 1 or args.num_process < 1:
        parser.error("--num_hand and --num_process must be at least 1")
    if args.sheet is not None and args.sheet.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        parser.error(f"--sheet {args.sheet}: the name must end with .png, .jpg or .webp")
    if args.mano is None and MANO.is_file():
        args.mano = MANO
    if args.mano is not None:
        if problem := hand_model_problem(str(args.mano)):
            parser.error(f"--mano {problem}")
        try:
            load_hand(str(args.mano))
        except (ValueError, OSError) as error:
            parser.error(f"--mano {args.mano}: {error}")
    return args


def find_shards(args: argparse.Namespace) -> list[Path]:
    """The shards of the command line, below --root, the working directory or HAND_DATA_ROOT. Raises ValueError."""
    root, configured = args.root or Path(), os.environ.get("HAND_DATA_ROOT")
    if args.root is None and configured:
        with suppress(ValueError):
            return resolve_source(root, args.source, "SOURCE")
        root = Path(configured)
    return resolve_source(root, args.source, "SOURCE")


def corruption_table(reports: Sequence[ShardReport]) -> Table:
    """Reasons, numbers of frames, what to do, and examples."""
    table = Table("reason", "frames", "what to do, and examples")
    table.columns[1].justify = "right"
    for reason, count in merge(reports)[0].most_common():
        lines = [REASONS[reason], *details(reports, reason), *examples(reports, reason)]
        table.add_row(reason, str(count), "\n".join(lines))
    return table


def print_implausible(reports: Sequence[ShardReport], console: Console) -> bool:
    """Print which labels are known and which are implausible; returns whether there are implausible ones."""
    tallies = merge_tallies(report.tallies for report in reports)
    for line in coverage(tallies):
        console.print(line, soft_wrap=True)
    lines = findings(tallies)
    for line in lines:
        console.print(f"WARNING: {line}", soft_wrap=True)
    for model in sorted({model for report in reports for model in report.not_compared}):
        hint = "; --mano FILE compares them" if model == "mano" else ""
        console.print(f"MANO parameters of the hand model {model!r} were not compared with the joints{hint}")
    return bool(lines)


def write_sheet(args: argparse.Namespace, shards: Sequence[Path], console: Console) -> None:
    """Draw the contact sheet. Raises ValueError or OSError if it cannot be written."""
    sheet = contact_sheet(open_indexes(shards, args.index_dir, args.num_process), args.num_hand)
    if sheet is None:
        console.print("no contact sheet: none of the frames can be used")
        return
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    args.sheet.write_bytes(encode_image(sheet, args.sheet.suffix))
    console.print(f"contact sheet: {args.sheet}", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = make_console()
    try:
        shards = find_shards(args)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return INVALID_ARGUMENTS
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("checking", total=None)
        reports = check_shards(
            shards,
            args.decode,
            args.index_dir,
            args.num_process,
            lambda done, total: bar.update(task, completed=done, total=total),
            args.mano,
        )
    corrupt, num_lost = merge(reports)
    if corrupt:
        console.print(corruption_table(reports))
    if stale := [report.shard for report in reports if report.has_stale_index]:
        console.print(f"{len(stale)} indexes are out of date; the next run rebuilds them: {stale[0]}", soft_wrap=True)
    if num_lost:
        console.print(
            f"shards that cannot be read at all: {num_lost}; each is counted as the mean number of frames of the others"
        )
    is_implausible = print_implausible(reports, console)
    num_frame = sum(report.num_frame for report in reports)
    console.print(
        f"{len(shards)} shards, {sum(r.num_sample for r in reports)} samples, {num_frame} healthy frames, "
        f"{corrupt.total()} corrupt" + ("" if args.decode else "; images were not decoded (--decode decodes them)"),
        soft_wrap=True,
    )
    if args.sheet is not None:
        try:
            write_sheet(args, shards, console)
        except OSError as error:
            sys.stderr.write(f"--sheet {args.sheet}: {error}\n")
            return INVALID_ARGUMENTS
    return CORRUPT if corrupt or (args.strict and is_implausible) else HEALTHY


if __name__ == "__main__":
    raise SystemExit(main())
