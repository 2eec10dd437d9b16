"""Exit on a failure such that exactly one of several processes reports the cause. Imports no torch.

torchrun ends with a report on the process that failed first; its last lines are what that process wrote to
TORCHELASTIC_ERROR_FILE. While torchrun may still restart the processes it reports nothing, so the cause is printed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from src.config import ConfigError

LAUNCHER_GRACE = 40.0  # s; torchrun terminates the other processes at once and kills them after 30
PEER_REPORT_TIMEOUT = 5.0  # s in which the process that failed first should report the cause


def is_distributed() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def exit_with_error(
    text: str,
    code: int,
    *,
    is_permanent: bool = False,
    log: Path | None = None,
    cleanup: Callable[[], None] | None = None,
) -> NoReturn:
    """Report `text`, unless another process of this node has reported a failure, and exit with `code`.

    Args:
        is_permanent: a restart would fail in the same way (an invalid configuration).
        log: a file that the text is appended to.
        cleanup: called before the exit.
    """
    if _error_file() is None:  # srun, or no launcher
        if os.environ.get("RANK", "0") != "0":
            _await_termination(PEER_REPORT_TIMEOUT)  # by srun --kill-on-bad-exit
        _report(text, log)
    elif not _is_first_failure():
        _await_termination(LAUNCHER_GRACE)
    elif _is_last_attempt():
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        _error_file().write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
        _append(text, log)
    elif not is_permanent:
        _report(text, log)
    if cleanup is not None:
        cleanup()
    if is_distributed():  # a normal exit would wait for the other processes
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def exit_after_peer(text: str, *, stop_requested: bool = False, log: Path | None = None) -> NoReturn:
    """Exit because another process is gone. It or the launcher reports the cause; `text` is printed if neither does.

    `stop_requested`: a stop signal came first. If a process has reported a failure, that signal was the launcher's and
    there will be no second one: waiting for it would last until the launcher kills, after 30 s.
    """
    if stop_requested and failure_is_reported():
        os._exit(1)
    _await_termination(PEER_REPORT_TIMEOUT)
    exit_with_error(text, 1, log=log)


def exit_on_invalid_config(error: ValueError) -> NoReturn:
    """Print what is wrong with the configuration and exit with code 2; HYDRA_FULL_ERROR=1 raises it instead."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    text = f"stage1: this configuration cannot be run\n{error}"
    exit_with_error(text, 2, is_permanent=isinstance(error, ConfigError))


def failure_is_reported() -> bool:
    """Whether a process of this node has reported a failure; a stop signal then came from the launcher."""
    return _error_file() is not None and _marker().exists()


def _report(text: str, log: Path | None) -> None:
    print(text, file=sys.stderr, flush=True)
    _append(text, log)


def _append(text: str, log: Path | None) -> None:
    if log is not None:
        with suppress(OSError), open(log, "a", encoding="utf-8") as file:  # the disk itself may have failed
            file.write(text + "\n")


def _error_file() -> Path | None:
    """`.../attempt_<restart>/<local rank>/error.json` under torchrun."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(path) if path else None


def _marker() -> Path:
    """Created by the first process of the node that reports a failure."""
    return _error_file().parent.parent / "reported"


def _is_first_failure() -> bool:
    try:
        _marker().touch(exist_ok=False)
    except OSError as error:  # without a shared folder: better reported twice than never
        return not isinstance(error, FileExistsError)
    return True


def _is_last_attempt() -> bool:
    env = os.environ
    return int(env.get("TORCHELASTIC_RESTART_COUNT", "0")) >= int(env.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def _await_termination(seconds: float) -> None:
    """Sleep until the launcher, which terminates all processes after one has exited, ends this one silently."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(seconds)
