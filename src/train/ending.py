"""Every way a run can end: what is saved first, the message, and the exit code.

0   finished, or `GENERAL.resume_path=auto` found a complete run
1   failed: an error, corrupt data, too many skipped steps, a checkpoint that cannot be written
2   invalid configuration
75  stopped by a signal (RESUMABLE): start the same command again
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn

from rich.progress import Progress

from src.checkpoint.save import CheckpointError
from src.config import Config
from src.data.health import BadDataError
from src.distributed.exit import exit_after_peer, exit_on_invalid_config, exit_with_error, is_distributed
from src.distributed.launch import requeue_slurm_job
from src.distributed.processes import is_peer_lost
from src.distributed.signals import RESUMABLE, StopRequested, StopSignals
from src.train.bad_batch import NumbersError
from src.train.resume import RunComplete
from src.train.run import Run
from src.utils.console import logger

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)
FINISH_TIMEOUT, STOP_TIMEOUT = 60.0, 10.0  # s for AIM to receive the last points of a run that finishes or ends early


class Ending:
    """A context that closes the run built in it and turns the exception that ended it into a message and exit code."""

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self.run: Run | None = None

    def build_run(self, cfg: Config, config_name: str, progress: Progress, overrides: Sequence[str]) -> Run:
        """Build the run; on a configuration or disk error print the reason and exit."""
        try:
            self.run = Run(cfg, config_name, progress, self.signals, overrides)
        except ValueError as error:
            exit_on_invalid_config(error)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            advice = "Free some space or fix the permissions, then start the same command again"
            exit_with_error(f"stage1: cannot start: {error}\n{advice}", 1)
        return self.run

    def __enter__(self) -> Ending:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        try:
            if isinstance(error, RunComplete):
                logger.info(str(error))
                return True
            if isinstance(error, StopRequested):
                self._exit_on_stop(error)
            if isinstance(error, (BadDataError, CheckpointError, NumbersError)):
                self._exit_on_failure(error)
            if isinstance(error, Exception) and is_distributed():
                self._exit_on_crash(error)
            return False  # an unexpected error of a single process is raised
        finally:
            if self.run is not None:
                self.run.close(FINISH_TIMEOUT if error is None else STOP_TIMEOUT)
            requeue_slurm_job(self.signals.requested)

    def _exit_on_stop(self, stop: StopRequested) -> NoReturn:
        """Save the steps done so far and exit with RESUMABLE."""
        if self.run is None or self.run.state.step == 0:
            text = "stopped before the first step, nothing is lost; start the same command again."
        else:
            try:
                self.run.save_now()
            except CheckpointError as error:
                self._exit_on_failure(error)
            text = f"stopped after step {self.run.state.step}; {self.run.resume_hint()} (or =auto)."
        logger.info(f"{stop}: {text} Exit code {RESUMABLE}")
        sys.exit(RESUMABLE)

    def _exit_on_failure(self, error: Exception) -> NoReturn:
        """Exit with the reason and how to resume, for an error that says enough without a traceback."""
        run = self.run
        exit_with_error(
            f"stopped at step {run.state.step}: {error}\n{run.resume_hint()}",
            1,
            log=run.folder / "log.txt",
            cleanup=lambda: run.close(STOP_TIMEOUT, wait_for_peers=not is_distributed()),
        )

    def _exit_on_crash(self, error: Exception) -> NoReturn:
        """Exit because of an unexpected error, or because another process has exited."""
        run = self.run
        log = run and run.folder / "log.txt"
        if is_peer_lost(error):
            step = f" at step {run.state.step}; {run.resume_hint()}" if run else ""
            text = f"lost contact with another process{step}\n({str(error).splitlines()[0]})"
            exit_after_peer(text, stop_requested=self.signals.requested is not None, log=log)
        exit_with_error("".join(traceback.format_exception(error)), 1, log=log)
