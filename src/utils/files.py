"""Small helpers around files: atomic writes, locks, new folders, encoded images. Standard library only at import."""

from __future__ import annotations

import fcntl
import glob
import itertools
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to a temporary file and rename it to `path`.

    A reader, or a crash of this process, sees the old file or the new one, never a part. Nothing is synced to the disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_new_folder(parent: Path, stem: str) -> Path:
    """Create and return `parent/stem`, or `stem-2`, `stem-3`, ... if that exists already. Raises OSError."""
    for attempt in itertools.count(1):
        folder = parent / (stem if attempt == 1 else f"{stem}-{attempt}")
        with suppress(FileExistsError):
            os.mkdir(folder)
            return folder


def make_output(asked: Path | None, default: Path) -> Path:
    """Create `asked`, empty if it exists already, or a new folder `default`, `default-2`, ... Raises ValueError."""
    try:
        if asked is None:
            default.parent.mkdir(parents=True, exist_ok=True)
            return make_new_folder(default.parent, default.name)
        asked.mkdir(parents=True, exist_ok=True)
        is_empty = not any(asked.iterdir())
    except OSError as error:
        raise ValueError(f"cannot create {asked or default}: {error}; choose another folder with --output") from error
    if not is_empty:
        raise ValueError(f"--output {asked}: is not empty; name a new folder")
    return asked


def is_hidden(path: str | Path) -> bool:
    """Whether a file's name begins with a dot, as do the `._name` copies that macOS adds to folders and archives."""
    return Path(path).name.startswith(".")


def walk_pattern(folder: Path, pattern: str) -> Iterator[Path]:
    """The paths that match a glob pattern below `folder`, or an absolute one, in no order.

    Each part of the pattern that exists literally stands for itself; hidden files match only if they are named.
    """
    parts = Path(pattern).parts
    if not parts:
        yield folder
        return
    head, rest = parts[0], str(Path(*parts[1:]))
    if head == "**":
        yield from walk_pattern(folder, rest)
        for below in glob.iglob("**/", root_dir=folder, recursive=True):
            yield from walk_pattern(folder / below, rest)
    elif (folder / head).exists():
        yield from walk_pattern(folder / head, rest)
    else:
        for name in glob.iglob(head, root_dir=folder):
            yield from walk_pattern(folder / name, rest)


def try_lock(file: IO[str]) -> bool:
    """Take the POSIX lock of an open file. False if another process holds it; True on file systems without locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def encode_image(image: np.ndarray, suffix: str = ".jpg", jpeg_quality: int | None = None) -> bytes:
    """The content of an image file: [H, W, 3] uint8 RGB encoded as `suffix` says. Raises ValueError."""
    import cv2  # most users of this module do not need it

    how = [] if jpeg_quality is None else [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality]
    ok, data = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), how)
    if not ok:
        raise ValueError(f"OpenCV cannot encode an image {image.dtype} {list(image.shape)} as {suffix}")
    return data.tobytes()
