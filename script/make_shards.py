"""Write shards in the native format, from a data set on disk or from rendered hands.

python script/make_shards.py realhands --input ../shared/realhands --output data/realhands
python script/make_shards.py freihand --input /data/FreiHAND --output data/FreiHAND --mano model/mano/MANO_RIGHT.pkl
python script/make_shards.py dexycb --input /data/dex-ycb --output data/DexYCB/s1/val --split s1/val --num_process 8
python script/make_shards.py demo --output data/demo
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout, whatever the working directory

import src.utils.environment  # noqa: F401  (checks that the packages below are installed)

# isort: split
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from src.data.convert.chunk import Request
from src.data.convert.registry import CONVERTERS, Converter
from src.hand.load import mano_path, mano_problem
from src.utils.console import make_console


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: one sub-command per data set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, converter in CONVERTERS.items():
        _add_converter(kinds.add_parser(name, help=f"convert {converter.what}"), converter)
    demo = kinds.add_parser("demo", help="render a synthetic hand; needs no data set")
    demo.add_argument("--output", type=Path, required=True, help="folder for the shards, in train/ and val/")
    demo.add_argument("--train_sample", type=int, default=12000)
    demo.add_argument("--val_sample", type=int, default=512)
    demo.add_argument("--img_size", type=int, default=160)
    demo.add_argument(
        "--free_rotation", type=float, default=0.0, help="fraction of hands with any rotation; the demo has 0.1"
    )
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--num_process", type=int, default=os.cpu_count() or 1)
    return parser.parse_args(argv)


def _add_converter(kind: argparse.ArgumentParser, converter: Converter) -> None:
    kind.add_argument("--input", type=Path, required=True, help="folder of the data set")
    kind.add_argument("--output", type=Path, required=True, help="folder for the shards; repeat the call to resume")
    if converter.splits:
        known = None if converter.open_split else converter.splits
        kind.add_argument("--split", default=converter.splits[0], choices=known, help="default: %(default)s")
    if converter.in_parallel:
        kind.add_argument("--num_process", type=_positive, default=os.cpu_count() or 1, help="default: %(default)s")
        kind.add_argument(
            "--mano", type=mano_path, help="your MANO_RIGHT.pkl: checks the parameters (dexycb: needed to write them)"
        )
    if "num_per_shard" in converter.more:
        kind.add_argument("--num_per_shard", type=_positive, default=2000, help="maximum number of images per shard")
    if "mano_left" in converter.more:
        left = partial(mano_path, name="MANO_LEFT")
        kind.add_argument("--mano_left", type=left, help="your MANO_LEFT.pkl, for the pose basis of left hands")
    for name, option in converter.options.items():
        number = partial(_not_negative, type(option.default))
        text = f"{option.help}; default: %(default)s"
        kind.add_argument(f"--{name}", type=number, default=option.default, metavar="NUMBER", help=text)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _not_negative(kind: type[int] | type[float], text: str) -> float:
    with suppress(ValueError):
        if (value := kind(text)) >= 0:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} must be {'an integer' if kind is int else 'a number'}, 0 or more")


def _convert(args: argparse.Namespace, progress: Callable[[int, int], None]) -> list[str]:
    """Run a converter; returns the lines to print, the summary last."""
    chosen = {f.name: getattr(args, f.name) for f in fields(Request) if hasattr(args, f.name)}
    for option, name in (("mano", "MANO_RIGHT"), ("mano_left", "MANO_LEFT")):
        path = chosen.get(option)
        if path is not None and (problem := mano_problem(path, name)):
            raise ValueError(f"--{option} {problem}")
    converter = CONVERTERS[args.kind]
    options = {name: getattr(args, name) for name in converter.options}
    summary = converter.convert(Request(**{"split": "all", **chosen}, options=options), progress)
    lines = list(summary.note)
    if summary.withheld:
        lines.append(f"{args.kind}: labels set to unknown: {_counts(summary.withheld)}")
    found = f"{summary.num_hand} hands in {summary.num_shard} shards in {args.output}"
    return [*lines, f"{found}; skipped: {_counts(summary.skipped)}"]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items()) or "none"


def make_shards(args: argparse.Namespace, bar: Progress) -> list[str]:
    """Execute the command line; returns the lines to print, the summary last."""
    task = bar.add_task(args.kind, total=None)

    def progress(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)

    if args.kind == "demo":
        from src.data.demo.make import make_demo_shards

        count = {"train": args.train_sample, "val": args.val_sample}
        make_demo_shards(args.output, count, args.seed, args.img_size, args.free_rotation, args.num_process, progress)
        return [f"{sum(count.values())} rendered hands in {args.output}"]
    return _convert(args, progress)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    start = time.monotonic()
    with Progress(*columns, console=make_console()) as bar:
        try:
            *lines, closing = make_shards(args, bar)
        except ValueError as error:
            bar.stop()
            sys.stderr.write(f"{error}\n")
            return 2
    for line in lines:
        bar.console.print(line, soft_wrap=True)
    bar.console.print(f"{closing} ({time.monotonic() - start:.1f} s)", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
