"""Evaluate a trained network on shards: metrics with bootstrap intervals, plots, sheets of hands, submission files.

python script/evaluate.py checkpoint/2026-01-31/12-00-00_stage1-dino_large
python script/evaluate.py model/hand-mini
python script/evaluate.py RUN/checkpoints/best data=labs DATA.root=/data/shards DATA.val.max_sample=null
python script/evaluate.py RUN DATA.root=data 'DATA.val.source=[realhands/all/*]' GENERAL.num_worker=2
python script/evaluate.py RUN DATA.root=/data 'DATA.val.source=[FreiHAND/evaluation/*]' --submission freihand

The configuration is the checkpoint's; KEY=VALUE overrides it as for script/stage1.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the checkout, whatever the working directory

import src.utils.environment  # noqa: F401  (checks that required packages are installed)
from src.config import Config, ConfigError
from src.config_parse import GROUPS, check_command_line, quote_paths

CONFIG_DIR = Path(__file__).resolve().parents[1] / "config"
CHALLENGES = ("freihand", "ho3d")
HALVES = ("a", "b")  # as in src/data/order/plan.py, whose imports would slow down --help


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with code 2 on a usage error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a run folder (its newest checkpoint), or one checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. data=labs DATA.val.max_sample=null")
    parser.add_argument(
        "--output",
        type=Path,
        help="a new folder; default: below evaluation/ in the run folder, or checkpoint/evaluation/ without one",
    )
    parser.add_argument("--num_bootstrap", type=int, default=1000, help="bootstrap draws; default: %(default)s")
    parser.add_argument(
        "--resample", choices=("sample", "clip"), default="sample", help="bootstrap unit; default: %(default)s"
    )
    parser.add_argument("--half", choices=HALVES, help="evaluate one half of the samples, split by key")
    parser.add_argument("--num_overlay", type=int, default=16, help="hands on each sheet; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap and the random hands")
    parser.add_argument("--submission", choices=CHALLENGES, help="also write pred.json and pred.zip for a challenge")
    parser.add_argument("--order", type=Path, help="the challenge's list of images (HO-3D: evaluation.txt)")
    args = parser.parse_intermixed_args(argv)
    if args.num_bootstrap < 100 or args.num_overlay < 0:
        parser.error("--num_bootstrap must be at least 100 and --num_overlay at least 0")
    if args.submission == "ho3d" and args.order is None:
        parser.error("--submission ho3d needs --order: HO-3D's evaluation.txt, which defines the order")
    if args.half is not None and args.submission is not None:
        parser.error("--submission needs every image; remove --half")
    if args.order is not None and args.submission is None:
        parser.error("--order belongs to --submission")
    if wrong := [text for text in args.overrides if "=" not in text]:
        parser.error(f"{wrong[0]!r} is neither an option nor KEY=VALUE")
    return args


def parse_overrides(overrides: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Parse KEY=VALUE in Hydra's grammar. Returns: the data group, and dotted key -> value.

    Raises:
        ConfigError: an unknown key, a config group other than data, or a value that does not parse.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    overrides = quote_paths(overrides)
    check_command_line(overrides)
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        how = "quote lists for the shell, and names with brackets in them: 'KEY=[a,\"b [1]\"]'"
        raise ConfigError(f"{str(error).splitlines()[0]}; {how}") from error
    data, changes = None, {}
    for override in parsed:
        key, value = override.key_or_group, override.value()
        if key == "data":
            data = value
        elif key in GROUPS:
            raise ConfigError(f"{key}={value}: an evaluation uses the checkpoint's network and no augmentation")
        else:
            changes[key] = value
    return data, changes


def compose(saved: Mapping[str, Any], overrides: Sequence[str], whole: bool) -> Config:
    """The checkpoint's configuration with the overrides; `whole`: every validation frame. Raises ConfigError."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    from src.evaluate.settings import check_files_exist, evaluation_config

    data, changes = parse_overrides(overrides)
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            base = hydra.compose("stage1-base", overrides=[] if data is None else [f"+data={data}"])
    except HydraException as error:
        known = ", ".join(sorted(path.stem for path in (CONFIG_DIR / "data").glob("*.yaml")))
        raise ConfigError(f"data={data}: config/data has no such file; choose one of {known}") from error
    defaults = OmegaConf.to_container(base, resolve=True, throw_on_missing=False)
    if whole:
        changes = {**changes, "DATA.val.max_sample": None}
    cfg = evaluation_config(saved, defaults, changes, has_data_group=data is not None)
    check_files_exist(cfg)
    return cfg


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        parse_overrides(args.overrides)  # before the slow import of torch
    except ConfigError as error:
        return refuse(error)

    from src.checkpoint.network import read_configuration
    from src.data.health import BadDataError
    from src.evaluate.bootstrap import Bootstrap
    from src.evaluate.run import run_evaluation
    from src.evaluate.submission import read_order
    from src.evaluate.tables import summary_grids
    from src.evaluate.write import legend
    from src.utils.console import console, progress_bar, set_up_logging

    set_up_logging()
    bootstrap = Bootstrap(args.num_bootstrap, args.resample, args.seed)
    try:
        checkpoint, saved = read_configuration(args.checkpoint)
        cfg = compose(saved, args.overrides, whole=args.submission is not None)
        order = None if args.order is None else read_order(args.order)
        options = {"output": args.output, "num_overlay": args.num_overlay, "half": args.half, "order": order}
        options |= {"submission": args.submission, "bootstrap": bootstrap}
        with progress_bar() as progress:
            folder, groups = run_evaluation(checkpoint, cfg, progress, **options)
    except (ValueError, BadDataError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("evaluate: interrupted", file=sys.stderr)
        return 130
    for grid in summary_grids(groups):
        console.print(grid.as_rich(), "")
    console.print(legend(groups, bootstrap), soft_wrap=True)
    written = ", ".join(sorted(path.name for path in folder.iterdir()))
    console.print(f"written to {folder}: {written}", soft_wrap=True)
    return 0


def refuse(error: Exception) -> int:
    """Print the error; returns the exit code."""
    print(f"evaluate: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
