"""Benchmarks of this project, one sub-command per subject.

python script/bench.py data
python script/bench.py data --quick --json data.json
python script/bench.py step backbone=dinov2_base TRAIN.sample_per_device=2
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout, whatever the working directory

import src.utils.environment  # noqa: F401  (checks that the packages below are installed)

# isort: split
from script.benchmarks.measurement import figure_table, machine, write_figures
from src.utils.console import make_console

# sub-command -> (help, module with add_arguments(parser) and run(args, status) -> list[Figure])
SUBJECTS = {
    "accuracy": (
        "our decoder and losses against rebuilt HaMeR-style and CS-ViT2-style ones",
        "script.benchmarks.accuracy",
    ),
    "checkpoint": ("how long training waits for a checkpoint", "script.benchmarks.checkpoint"),
    "data": ("reading, decoding and augmenting shards", "script.benchmarks.data"),
    "gpu": ("DINOv2-large on a GPU: step, compiled step, data, profile", "script.benchmarks.gpu"),
    "peers": ("a training step against rebuilt HaMeR-style and CS-ViT2-style ones", "script.benchmarks.peer_steps"),
    "scale": ("how cost grows with data, workers, processes and sizes", "script.benchmarks.scale"),
    "mano": ("the hand layer, forward and backward", "script.benchmarks.mano"),
    "mediapipe": ("MediaPipe Hands on the validation hands of evaluate.py", "script.benchmarks.mediapipe_hands"),
    "step": ("overhead of the training loop over the bare network, FLOP utilisation", "script.benchmarks.step"),
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The sub-command's own options and `--json`. Imports only the module of the chosen subject."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    subjects = parser.add_subparsers(dest="subject", required=True)
    for name, (what, module) in SUBJECTS.items():
        subject = subjects.add_parser(name, help=what)
        subject.add_argument("--json", type=Path, help="also write the figures to this file")
        if name in argv[:1]:
            importlib.import_module(module).add_arguments(subject)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    console, start = make_console(markup=True), time.monotonic()
    with console.status("starting") as status:
        figures = importlib.import_module(SUBJECTS[args.subject][1]).run(args, status.update)
    console.print(figure_table(f"bench {args.subject}: {machine()}", figures))
    console.print(f"{time.monotonic() - start:.0f} s")
    if args.json is not None:
        write_figures(args.json, args.subject, figures)
        console.print(f"written to {args.json}", soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
