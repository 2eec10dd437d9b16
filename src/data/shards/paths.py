"""From the patterns a user writes to the tar shards on the disk. Imports next to nothing: config checks use it."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand

_SCHEME = re.compile(r"^(pipe|[A-Za-z][A-Za-z0-9+.\-]*(?=://)):")


def resolve_source(root: str | Path, patterns: str | Iterable[str], key: str = "DATA.train.source") -> list[Path]:
    """The tar shards that the patterns mean, sorted, each once.

    A pattern is a path below `root` or an absolute one, with `*`, `?`, `[...]`, `**` and `{a,b}` / `{000..131}`.
    A folder stands for the `*.tar` files in it; files with another ending are passed over.

    Raises:
        ValueError: a pattern starts a program or names a scheme, or matches no shard; the message names `key`.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError(f"{key}=[]: names no shard; give at least one pattern, e.g. ['DexYCB/s1/train/*']")
    shards: set[Path] = set()
    for pattern in patterns:
        shards.update(_resolve_pattern(Path(root).expanduser(), pattern, key))
    return sorted(shards)


def _resolve_pattern(root: Path, pattern: str, key: str) -> set[Path]:
    if scheme := _SCHEME.match(pattern):
        raise ValueError(
            f"{key}={pattern!r}: {scheme.group(1)}: is refused, shards are read from files only; "
            "copy or mount the shards and give their path"
        )
    try:
        pieces = list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise ValueError(f"{key}={pattern!r}: the braces do not close ({error}); write e.g. {{000..131}}") from None
    shards: set[Path] = set()
    for piece in pieces:
        found = _match(root / Path(piece).expanduser())
        if not found:
            what = f"{piece!r} of it" if len(pieces) > 1 else "it"
            raise ValueError(
                f"{key}={pattern!r}: {what} matches no *.tar file below DATA.root={str(root)!r}; correct the pattern, "
                "or set DATA.root (check_shards.py: --root; default of both HAND_DATA_ROOT) to the shards' folder"
            )
        shards |= found
    return shards


def _match(path: Path) -> set[Path]:
    """The shards that one pattern without braces means."""
    found: set[Path] = set()
    for name in glob.iglob(str(path), recursive=True):
        match = Path(name)
        candidates = match.glob("*.tar") if match.is_dir() else [match]
        found.update(c.absolute() for c in candidates if c.suffix == ".tar" and c.is_file())
    return found
