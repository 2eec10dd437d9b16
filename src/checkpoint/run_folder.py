"""Folders of runs: made so that two runs never share one, found again, locked; and text files written whole.

A run lives in `<root>/<YYYY-MM-DD>/<HH-MM-SS>_<config>/`; a second one of the same second gets `-2`, and so on.
"""

from __future__ import annotations

import fcntl
import os
import re
from datetime import datetime
from pathlib import Path
from typing import IO


def create_run_folder(root: Path, config_name: str) -> Path:
    """Make and return a new, empty run folder below `root`; never one that exists already.

    `os.mkdir` is atomic on every file system we know, NFS included: of two runs that ask for one name, one gets it.
    Raises ValueError where the folder cannot be made (read-only, full, or a file in the way).
    """
    now = datetime.now()
    stem = f"{now:%H-%M-%S}_{_plain(config_name)}"
    day = Path(root) / f"{now:%Y-%m-%d}"
    try:
        day.mkdir(parents=True, exist_ok=True)
        return make_new_folder(day, stem)
    except OSError as error:
        raise ValueError(
            f"cannot make a run folder below {root}: {error.strerror or error}; name a folder that you may write"
        ) from error


def make_new_folder(parent: Path, stem: str) -> Path:
    """Make and return `parent/stem`, or `stem-2`, `stem-3`, ... where that exists already. Raises OSError."""
    attempt = 1
    while True:
        folder = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            os.mkdir(folder)
            return folder
        except FileExistsError:
            attempt += 1


def _plain(config_name: str) -> str:
    """`config_name` with only characters that are safe in a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", config_name)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a crash, meets the old file or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def find_run(root: Path, config_name: str) -> Path | None:
    """The newest run folder of `config_name` below `root`, by the date and time that name it; None where none is."""
    pattern = re.compile(rf"(\d\d-\d\d-\d\d)_{re.escape(_plain(config_name))}(?:-(\d+))?")
    found = []
    for folder in Path(root).glob("[0-9]*-[0-9]*-[0-9]*/*"):
        match = pattern.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((folder.parent.name, match[1], int(match[2] or 1), folder))
    return max(found)[-1] if found else None


def lock_run_folder(run_folder: Path) -> IO[str]:
    """Claim `run_folder` for this process until it ends or the returned file is closed. Keep the file referenced.

    A POSIX record lock: it is not inherited by forked data workers and goes with the process, however that ends.
    Raises ValueError when another living process writes there.
    """
    file = open(run_folder / ".lock", "a")  # noqa: SIM115  (it stays open as long as the run)
    if not try_lock(file):
        file.close()
        raise ValueError(f"another process is training in {run_folder}; wait for it or start a new run")
    return file


def try_lock(file: IO[str]) -> bool:
    """Take the POSIX lock of an open file; False when another process holds it, True where locks do not exist."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # a file system without locks: nothing to hold on to
    return True
