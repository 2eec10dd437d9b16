"""Signals that ask a run to stop: SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C. Imports nothing heavy.

The first signal during start-up raises StopRequested where it strikes: nothing has been trained. While modules are
imported it waits for their end (`held`): a C extension turns what is raised within it into an ImportError. Once the
loop runs (`defer`), it is only noted; the loop finishes its step, writes a checkpoint and leaves with RESUMABLE. A
second signal ends the process at once, as if it had been killed.
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
ECHO = 0.5  # s within which the same signal again is an echo: a terminal and a launcher may both deliver it


class StopRequested(BaseException):
    """The run was asked to stop. No Exception, so that no part of the run mistakes it for an error of its own."""


class StopSignals:
    """What this process has been asked by signals. Without `install` nobody can ask."""

    def __init__(self) -> None:
        self.requested: str | None = None  # name of the first signal
        self._first: tuple[int, float] = (0, 0.0)
        self._deferred = False
        self._owner = os.getpid()

    def install(self) -> None:
        """From now on the signals are handled here, in this process."""
        self._owner = os.getpid()
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def defer(self) -> None:
        """From now on the first signal is only noted in `requested`. Raises StopRequested when one came before."""
        self._deferred = True
        if self.requested is not None:
            raise StopRequested(self.requested)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A signal that comes within waits for the end, which then raises StopRequested."""
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
                    child.kill()  # a pool that indexes shards would be waited for
                raise StopRequested(self.requested)
        elif number != self._first[0] or now - self._first[1] > ECHO:
            _leave_at_once(number)


def _leave_at_once(number: int) -> None:
    if sys.stdout.isatty():
        os.write(1, b"\x1b[?25h\n")  # a progress bar hides the cursor
    os.write(2, f"stage1: {signal.Signals(number).name} again: stopped at once\n".encode())
    os._exit(128 + number)
