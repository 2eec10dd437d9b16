"""Make shards in the native format, from a data set on disk or from rendered hands.

python script/make_shards.py realhands --input ../shared/realhands --output data/realhands
python script/make_shards.py demo --output data/demo
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout, whatever the working directory

from src.data.convert.registry import CONVERTERS


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: one sub-command per data set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name in CONVERTERS:
        kind = kinds.add_parser(name, help=f"convert {name} from its published layout")
        kind.add_argument("--input", type=Path, required=True, help="folder of the data set")
        kind.add_argument("--output", type=Path, required=True, help="folder for the shards")
    demo = kinds.add_parser("demo", help="render the stand-in hand; needs no data set")
    demo.add_argument("--output", type=Path, required=True, help="folder for the shards, in train/ and val/")
    demo.add_argument("--train_sample", type=int, default=12000)
    demo.add_argument("--val_sample", type=int, default=512)
    demo.add_argument("--img_size", type=int, default=192)
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--num_process", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(argv)


def make_shards(args: argparse.Namespace, bar: Progress) -> str:
    """Do what the command line asks; returns the closing line."""
    task = bar.add_task(args.kind, total=None)

    def progress(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)

    if args.kind == "demo":
        from src.data.demo import make_demo_shards

        count = {"train": args.train_sample, "val": args.val_sample}
        make_demo_shards(args.output, count, args.seed, args.img_size, args.num_process, progress=progress)
        return f"{sum(count.values())} rendered hands in {args.output}"
    summary = CONVERTERS[args.kind](args.input, args.output, progress)
    skipped = ", ".join(f"{reason} {count}" for reason, count in summary.skipped.items()) or "none"
    return f"{summary.num_hand} hands in {summary.num_shard} shards in {args.output}; left out: {skipped}"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start = time.monotonic()
    with Progress(*columns) as bar:
        try:
            closing = make_shards(args, bar)
        except ValueError as error:
            bar.stop()
            sys.stderr.write(f"{error}\n")
            return 2
    bar.console.print(f"{closing} ({time.monotonic() - start:.1f} s)", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
