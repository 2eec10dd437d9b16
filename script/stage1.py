"""Trains the stage-1 network: DINOv2 backbone, hand decoder, MANO.

    python script/stage1.py --config-name=stage1-dino_large
    python script/stage1.py --config-name=stage1-demo GENERAL.total_step=200
    accelerate launch --num_processes 2 --cpu script/stage1.py --config-name=stage1-demo

Heavy imports wait until the configuration and what it points at are known to be good: a typing mistake costs two
seconds.
"""

from __future__ import annotations

import errno
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

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
from src.config_parse import check_command_line, parse_config
from src.distributed.exit import is_told, leave, leave_after_peer, several
from src.distributed.launch import adopt_slurm_step, check_launcher, requeue_slurm_job, start_missing_processes
from src.distributed.signals import RESUMABLE, StopRequested, StopSignals
from src.train.preflight import check_files

if TYPE_CHECKING:
    from src.train.run import Run

T = TypeVar("T")
SIGNALS = StopSignals()
DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)
STOP_PATIENCE = 10.0  # s that AIM gets to take the last points of a run that was asked to stop


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
    SIGNALS.install()  # again where a launcher calls this function in a process of its own
    adopt_slurm_step()
    try:
        print_sweep_point()
        cfg = parse_config(composed)
        check_files(cfg)
    except ConfigError as error:
        refuse(error)
    train(cfg, HydraConfig.get().job.config_name, HydraConfig.get().overrides.task)


def train(cfg: Config, config_name: str, overrides: Sequence[str] = ()) -> None:
    """The training loop."""
    with SIGNALS.held():
        from src.checkpoint.save import CheckpointError
        from src.data.health import BadDataError
        from src.train.bad_batch import NumbersError
        from src.train.resume import RunComplete
        from src.train.run import Run
        from src.utils.console import logger, progress_bar, set_up_logging

    set_up_logging()
    run, patience = None, 60.0
    with progress_bar() as progress:
        try:
            run = build(Run, cfg, config_name, progress, SIGNALS, overrides)
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
        except RunComplete as complete:
            logger.info(str(complete))
        except StopRequested as stop:
            patience = STOP_PATIENCE
            stop_early(run, stop)
        except (BadDataError, CheckpointError, NumbersError) as error:
            patience = STOP_PATIENCE
            give_up(run, str(error))
        except Exception as error:
            patience = STOP_PATIENCE
            break_off(run, error)
        finally:
            if run is not None:
                run.close(patience)
            requeue_slurm_job(SIGNALS.requested)


def stop_early(run: Run | None, stop: StopRequested) -> NoReturn:
    """Save what there is and leave with the code that says: run the same command again."""
    from src.checkpoint.save import CheckpointError
    from src.utils.console import logger

    if run is None or run.state.step == 0:
        logger.info(
            f"{stop}: stopped before the first step, nothing is lost; start the same command again. "
            f"Exit code {RESUMABLE}"
        )
    else:
        try:
            run.save_now()
        except CheckpointError as error:
            give_up(run, str(error))
        logger.info(
            f"{stop}: stopped after step {run.state.step}; {run.how_to_go_on()} (or =auto). Exit code {RESUMABLE}"
        )
    sys.exit(RESUMABLE)


def give_up(run: Run, reason: str) -> NoReturn:
    """Leave with code 1 and tell the reason and how to go on."""
    text = f"stopped at step {run.state.step}: {reason}\n{run.how_to_go_on()}"
    leave(text, 1, log=run.folder / "log.txt", last=lambda: run.close(STOP_PATIENCE, in_order=not several()))


def break_off(run: Run | None, error: Exception) -> NoReturn:
    """Leave because of an error that nobody foresaw, or because another process has left."""
    from src.distributed.processes import is_lost_contact

    if not several():
        raise error
    log = run and run.folder / "log.txt"
    if is_lost_contact(error):
        step = f" at step {run.state.step}; {run.how_to_go_on()}" if run else ""
        text = f"lost contact with another process{step}\n({str(error).splitlines()[0]})"
        leave_after_peer(text, asked=SIGNALS.requested is not None, log=log)
    leave(traceback.format_exc(), 1, log=log)


def build(kind: Callable[..., T], *parts: object) -> T:
    """The run, or a word to the user about what it cannot be built from."""
    try:
        return kind(*parts)
    except ValueError as error:
        refuse(error)
    except OSError as error:
        if error.errno not in DISK_REFUSES:
            raise
        advice = "Make room, or what is named here readable or writable, then start the same command again"
        leave(f"stage1: cannot begin: {error}\n{advice}", 1)


def refuse(error: ValueError) -> NoReturn:
    """Tell what is wrong with the configuration and leave; HYDRA_FULL_ERROR=1 shows where it was noticed."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    leave(f"stage1: this configuration cannot be run\n{error}", 2, alike=isinstance(error, ConfigError))


if __name__ == "__main__":
    SIGNALS.install()
    try:
        check_command_line(sys.argv[1:])
        check_launcher(os.environ)
        start_missing_processes()
        main()
    except ConfigError as error:
        refuse(error)
    except StopRequested as stop:  # before the parts of a run, and a place to log to, were there
        if not is_told():
            print(f"stage1: {stop}: stopped before the first step; start the same command again", file=sys.stderr)
        sys.exit(RESUMABLE)
