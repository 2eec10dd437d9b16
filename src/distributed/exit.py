"""How a process leaves when something has failed, so that of several processes one tells the cause, once. No torch.

torchrun ends with a report on the process that failed first and shows there, as its last lines, what that process left
in TORCHELASTIC_ERROR_FILE. As long as it may restart the processes it reports nothing, so the cause is printed.
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

ENDED_WITHIN = 40.0  # s; torchrun ends the others at once and kills them after 30
PEER_SPEAKS_WITHIN = 5.0  # s that the process which broke off may take to say why


def several() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave(
    text: str, code: int, *, alike: bool = False, log: Path | None = None, last: Callable[[], None] | None = None
) -> NoReturn:
    """Tell `text`, unless another process of this node has told of a failure, and end with `code`.

    Args:
        alike: it will be the same after a restart (a configuration that is refused).
        log: a file that the text is appended to, too.
        last: what is left to do before the end.
    """
    if _error_file() is None:  # srun, or no launcher
        if os.environ.get("RANK", "0") != "0":
            _wait_to_be_ended(PEER_SPEAKS_WITHIN)  # with srun --kill-on-bad-exit
        _tell(text, log)
    elif not _is_first():
        _wait_to_be_ended(ENDED_WITHIN)
    elif _is_last_attempt():
        when = {"py_callstack": text, "timestamp": str(int(time.time()))}
        _error_file().write_text(json.dumps({"message": {"message": text, "extraInfo": when}}))
        _append(text, log)
    elif not alike:
        _tell(text, log)
    if last is not None:
        last()
    if several():  # an orderly end would wait for the other processes
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def leave_after_peer(text: str, *, asked: bool = False, **how: object) -> NoReturn:
    """Leave because another process is gone. It or the launcher tells why; `text` is for where nobody does.

    `asked`: a signal to stop has come before the loss was noticed. It was the launcher's, if a process has told of a
    failure, and no second one would come: waiting for it would last until the launcher kills, after 30 s.
    """
    if asked and is_told():
        os._exit(1)
    _wait_to_be_ended(PEER_SPEAKS_WITHIN)
    leave(text, 1, **how)


def is_told() -> bool:
    """Whether a process of this node has told of a failure: a signal to stop then comes from the launcher."""
    return _error_file() is not None and _mark().exists()


def _tell(text: str, log: Path | None) -> None:
    print(text, file=sys.stderr, flush=True)
    _append(text, log)


def _append(text: str, log: Path | None) -> None:
    if log is not None:
        with suppress(OSError), open(log, "a", encoding="utf-8") as file:  # the failure may be that of the disk
            file.write(text + "\n")


def _error_file() -> Path | None:
    """`.../attempt_<restart>/<local rank>/error.json`, where torchrun is the launcher."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(path) if path else None


def _mark() -> Path:
    return _error_file().parent.parent / "told"


def _is_first() -> bool:
    try:
        _mark().touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # nowhere to look: rather twice than never
    return True


def _is_last_attempt() -> bool:
    env = os.environ
    return int(env.get("TORCHELASTIC_RESTART_COUNT", "0")) >= int(env.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def _wait_to_be_ended(seconds: float) -> None:
    """The launcher ends all processes when one has left: go without a word."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(seconds)
