"""Measure what this project promises, one sub-command a subject.

python script/bench.py data
python script/bench.py data --quick --json data.json
python script/bench.py step backbone=dinov2_base TRAIN.sample_per_device=2
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout, whatever the working directory

from script.benchmarks.measurement import figure_json, figure_table, machine
from script.benchmarks.peers import load_peer
from src.config import Config
from src.config_parse import check_overrides, parse_config
from src.utils.console import make_console

CONFIG_DIR = Path(__file__).resolve().parents[1] / "config"
# sub-command -> (what it measures, module with add_arguments(parser) and run(args, say) -> list[Figure])
SUBJECTS = {
    "accuracy": ("our decoder and losses against HaMeR's and CS-ViT2's", "script.benchmarks.accuracy"),
    "checkpoint": ("how long training waits for a checkpoint", "script.benchmarks.checkpoint"),
    "data": ("reading, decoding and augmenting shards", "script.benchmarks.data"),
    "gpu": ("DINOv2-large on a GPU: step, compiled step, data, profile", "script.benchmarks.gpu"),
    "peers": ("a training step against HaMeR's and CS-ViT2's, end to end", "script.benchmarks.peer_steps"),
    "scale": ("how cost grows with data, workers, processes and sizes", "script.benchmarks.scale"),
    "mano": ("the hand layer, forward and backward", "script.benchmarks.mano"),
    "mediapipe": ("MediaPipe Hands on the hands that evaluate.py reads", "script.benchmarks.mediapipe_hands"),
    "step": ("the training loop against the bare network and the machine", "script.benchmarks.step"),
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: the sub-command's own options, and `--json`. Only the module that is asked for is imported."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    subjects = parser.add_subparsers(dest="subject", required=True)
    for name, (what, module) in SUBJECTS.items():
        subject = subjects.add_parser(name, help=what)
        subject.add_argument("--json", type=Path, help="also write the figures to this file")
        if name in argv[:1]:
            importlib.import_module(module).add_arguments(subject)
    return parser.parse_args(argv)


def compose_config(name: str, overrides: list[str]) -> Config:
    """The shipped configuration `name` with overrides, typed and checked: for subjects that train."""
    check_overrides(overrides)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return parse_config(compose(name, overrides=overrides))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.compose, args.peer = compose_config, load_peer
    console, start = make_console(markup=True), time.monotonic()
    with console.status("starting") as status:
        module = importlib.import_module(SUBJECTS[args.subject][1])
        figures = module.run(args, lambda text: status.update(text))
    console.print(figure_table(f"bench {args.subject}: {machine()}", figures))
    console.print(f"{time.monotonic() - start:.0f} s")
    if args.json is not None:
        args.json.write_text(json.dumps(figure_json(args.subject, figures), indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {args.json}", soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
