"""Trains the stage-1 network: DINOv2 backbone, hand decoder, MANO.

    python script/stage1.py --config-name=stage1-dino_large
    python script/stage1.py --config-name=stage1-demo GENERAL.total_step=200
    accelerate launch --num_processes 2 --cpu script/stage1.py --config-name=stage1-demo

Heavy imports come after the checks of the configuration and of the files that it names: a typing mistake costs two
seconds.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import src.utils.environment  # noqa: F401  (checks that the packages below are installed)

# isort: split
import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from src.config import Config, ConfigError
from src.config_parse import check_command_line, parse_config, quote_paths
from src.distributed.exit import exit_on_invalid_config, failure_is_reported
from src.distributed.launch import check_launcher, slurm_variables, start_missing_processes
from src.distributed.signals import RESUMABLE, StopRequested, StopSignals
from src.train.preflight import check_files

SIGNALS = StopSignals()


def print_sweep_point() -> None:
    """In a Hydra sweep, print which point this is: `stage1: sweep point 2 of 20: GENERAL.seed=1 dropout=gate`."""
    job, arguments = HydraConfig.get(), sys.argv[1:]
    if job.mode != RunMode.MULTIRUN or os.environ.get("RANK", "0") != "0":
        return
    point, total = job.overrides.task, ""
    if {"-m", "--multirun"} & {*arguments}:  # otherwise a cluster's launcher started this point in a new process
        texts = [f"{key}={value}" for key, value in (job.sweeper.get("params") or {}).items()]
        texts += [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
        parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(texts)
        last = {override.get_key_element(): override for override in parsed}  # the command line replaces the config
        swept = {key: len([*o.sweep_string_iterator()]) for key, o in last.items() if o.is_sweep_override()}
        point = [text for text in point if text.partition("=")[0] in swept]
        total = f" of {math.prod(swept.values())}"
    print(f"stage1: sweep point {job.job.num + 1}{total}: {' '.join(point)}", flush=True)


@hydra.main(version_base="1.3", config_path="../config", config_name="stage1-dino_large")
def main(composed: DictConfig) -> None:
    """Check everything that can be checked, then train."""
    SIGNALS.install()  # again for a launcher that calls this function in a process of its own
    os.environ.update(slurm_variables(os.environ))
    try:
        print_sweep_point()
        cfg = parse_config(composed)
        check_files(cfg)
    except ConfigError as error:
        exit_on_invalid_config(error)
    train(cfg, HydraConfig.get().job.config_name, HydraConfig.get().overrides.task)


def train(cfg: Config, config_name: str, overrides: Sequence[str] = ()) -> None:
    """The training loop. src/train/ending.py handles every way it can end."""
    with SIGNALS.hold():
        from src.train.ending import Ending
        from src.utils.console import progress_bar, set_up_logging

    set_up_logging()
    with progress_bar() as progress, Ending(SIGNALS) as ending:
        run = ending.build_run(cfg, config_name, progress, overrides)
        SIGNALS.defer()
        run.catch_up()
        for micro_batches in run.micro_batches():
            result = run.step(micro_batches)
            if run.is_due(cfg.GENERAL.log_step):
                run.log(result)
            if run.is_due(cfg.GENERAL.vis_step):
                run.draw(micro_batches[0])
            if run.is_due(cfg.GENERAL.checkpoint_step, at_end=True):
                run.save(is_best=run.validate())
            run.check_stop()
        run.finish()


if __name__ == "__main__":
    SIGNALS.install()
    try:
        sys.argv[1:] = quote_paths(sys.argv[1:])
        check_command_line(sys.argv[1:])
        check_launcher(os.environ)
        start_missing_processes()
        main()
    except ConfigError as error:
        exit_on_invalid_config(error)
    except StopRequested as stop:  # during start-up
        if not failure_is_reported():
            print(f"stage1: {stop}: stopped before the first step; start the same command again", file=sys.stderr)
        sys.exit(RESUMABLE)
