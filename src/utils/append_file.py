"""A file that is only appended to, and that a full or read-only disk cannot turn into an exception."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger("stage1.append_file")  # below the logger of src/utils/console.py


class AppendFile:
    """Appends bytes with one unbuffered `write` each: what was appended outlives a killed process.

    What the disk does not take waits in memory, in order, and is tried again with the next append; one warning says so.
    """

    def __init__(self, path: Path) -> None:
        """Open or create `path`. Raises OSError where that is not possible."""
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._written = os.fstat(self._file).st_size
        self._waiting = b""
        self._warned = False

    @property
    def size(self) -> int:
        """Length in bytes, with what still waits."""
        return self._written + len(self._waiting)

    def append(self, data: bytes) -> None:
        """Write `data` after what waits already."""
        self._waiting += data
        self.flush()

    def flush(self) -> None:
        """Try again to write what waits."""
        try:
            while self._waiting:
                count = os.write(self._file, self._waiting)
                self._written += count
                self._waiting = self._waiting[count:]
        except OSError as error:
            first, self._warned = not self._warned, True  # the warning itself may be appended here
            if first:
                logger.warning("%s cannot be written (%s): its lines wait in memory; make room", self._path, error)

    def close(self) -> None:
        """A last try; a warning says how much is lost. Safe to call twice."""
        if self._file < 0:
            return
        self.flush()
        if self._waiting:
            logger.warning("%d bytes of %s are lost: the disk never took them", len(self._waiting), self._path)
        os.close(self._file)
        self._file = -1
