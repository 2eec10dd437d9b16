"""An append-only file that survives a full or read-only disk without an exception."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger("stage1.append_file")  # below the logger of src/utils/console.py


class AppendFile:
    """Appends bytes with one unbuffered `write` each, so that they survive if the process is killed.

    What the disk refuses waits in memory, in order, and is retried with the next append; there is one warning.
    """

    def __init__(self, path: Path) -> None:
        """Open or create `path`. Raises OSError."""
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._written = os.fstat(self._file).st_size
        self._waiting = b""
        self._warned = False

    @property
    def size(self) -> int:
        """Length in bytes, including what waits in memory."""
        return self._written + len(self._waiting)

    def append(self, data: bytes) -> None:
        """Write `data` after what waits in memory."""
        self._waiting += data
        self.flush()

    def flush(self) -> None:
        """Retry writing what waits in memory."""
        try:
            while self._waiting:
                count = os.write(self._file, self._waiting)
                self._written += count
                self._waiting = self._waiting[count:]
        except OSError as error:
            first, self._warned = not self._warned, True  # the warning itself may be appended here
            if first:
                logger.warning("%s cannot be written (%s): lines wait in memory; free disk space", self._path, error)

    def close(self) -> None:
        """Retry once more and close; a warning reports what is lost. Safe to call twice."""
        if self._file < 0:
            return
        self.flush()
        if self._waiting:
            logger.warning("%d bytes of %s are lost: they could not be written", len(self._waiting), self._path)
        os.close(self._file)
        self._file = -1
