"""Trains the stage-1 network: DINOv2 backbone, hand decoder, MANO.

    python script/stage1.py --config-name=stage1-dino_large
    python script/stage1.py --config-name=stage1-demo GENERAL.total_step=200
    accelerate launch --num_processes 2 --cpu script/stage1.py --config-name=stage1-demo

Heavy imports come after the checks of the configuration and of the files that it names: a typing mistake costs two
seconds.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from src.config import Config, ConfigError
from src.config_parse import check_overrides, parse_config
from src.distributed.exit import exit_on_invalid_config, failure_is_reported
from src.distributed.launch import adopt_slurm_variables, check_launcher, start_missing_processes
from src.distributed.signals import RESUMABLE, StopRequested, StopSignals
from src.train.preflight import check_files

SIGNALS = StopSignals()


@hydra.main(version_base="1.3", config_path="../config", config_name="stage1-dino_large")
def main(composed: DictConfig) -> None:
    """Check everything that can be checked, then train."""
    SIGNALS.install()  # again for a launcher that calls this function in a process of its own
    adopt_slurm_variables()
    try:
        cfg = parse_config(composed)
        check_files(cfg)
    except ConfigError as error:
        exit_on_invalid_config(error)
    train(cfg, HydraConfig.get().job.config_name)


def train(cfg: Config, config_name: str) -> None:
    """The training loop. src/train/ending.py handles every way it can end."""
    with SIGNALS.hold():
        from src.train.ending import Ending
        from src.utils.console import progress_bar, set_up_logging

    set_up_logging()
    with progress_bar() as progress, Ending(SIGNALS) as ending:
        run = ending.build_run(cfg, config_name, progress)
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
        check_overrides(sys.argv[1:])
        check_launcher(os.environ)
        start_missing_processes()
        main()
    except ConfigError as error:
        exit_on_invalid_config(error)
    except StopRequested as stop:  # during start-up
        if not failure_is_reported():
            print(f"stage1: {stop}: stopped before the first step; start the same command again", file=sys.stderr)
        sys.exit(RESUMABLE)
