"""Signals that ask a run to stop: SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C. Imports nothing heavy.

During start-up the first signal raises StopRequested immediately: nothing has been trained. While modules are imported
it is held back (`hold`), because a C extension turns an exception raised inside it into an ImportError. Once the loop
runs (`defer`), the signal is only recorded; the loop finishes its step, writes a checkpoint and exits with RESUMABLE. A
second signal ends the process immediately, as a kill would.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
RESUMABLE = 75  # exit code of a stop on request; EX_TEMPFAIL of sysexits.h: try again later
ECHO = 0.5  # s within which a repeated signal counts as one: a terminal and a launcher may both deliver it


class StopRequested(BaseException):
    """The run was asked to stop. A BaseException, so that no `except Exception` swallows it."""


class StopSignals:
    """The stop signals that this process has received; none before `install`."""

    def __init__(self) -> None:
        self.requested: str | None = None  # name of the first signal
        self._first: tuple[int, float] = (0, 0.0)
        self._deferred = False
        self._owner = os.getpid()

    def install(self) -> None:
        """Handle the signals here, in this process, from now on."""
        self._owner = os.getpid()
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def defer(self) -> None:
        """Only record the first signal in `requested` from now on. Raises StopRequested if one came before."""
        self._deferred = True
        if self.requested is not None:
            raise StopRequested(self.requested)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold a signal back until the end of the block, which then raises StopRequested."""
        self._deferred = True
        yield
        self._deferred = False
        if self.requested is not None:
            raise StopRequested(self.requested)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked helper of the start-up (data workers ignore signals)
            os._exit(128 + number)
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._first = signal.Signals(number).name, (number, now)
            if not self._deferred:
                for child in multiprocessing.active_children():
                    child.kill()  # otherwise the exit waits for a pool that indexes shards
                raise StopRequested(self.requested)
        elif number != self._first[0] or now - self._first[1] > ECHO:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h\n")  # a progress bar hides the cursor
            os.write(2, f"stage1: {signal.Signals(number).name} again: stopped at once\n".encode())
            os._exit(128 + number)
