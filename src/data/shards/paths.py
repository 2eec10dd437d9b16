"""Resolves the user's patterns to tar shards on disk. Imports little, because config checks use it."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand

_SCHEME = re.compile(r"^(pipe|[A-Za-z][A-Za-z0-9+.\-]*(?=://)):")


def resolve_source(root: str | Path, patterns: str | Iterable[str], key: str = "DATA.train.source") -> list[Path]:
    """The tar shards that match the patterns, sorted, without duplicates.

    A pattern is a path below `root` or an absolute path, with `*`, `?`, `[...]`, `**` and `{a,b}` / `{000..131}`.
    A folder means the `*.tar` files in it; files with other extensions are ignored.

    Raises:
        ValueError: a pattern that would start a program or contains a URL scheme, or patterns that match no shard: the
            message names `key` and all of them.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError(f"{key}=[]: is empty; give at least one pattern, e.g. ['DexYCB/s1/train/*']")
    shards: set[Path] = set()
    missing = []
    for pattern in patterns:
        found = {piece: _match(Path(root).expanduser() / Path(piece).expanduser()) for piece in _expand(pattern, key)}
        shards.update(*found.values())
        if empty := [piece for piece, matches in found.items() if not matches]:
            missing.append(pattern if len(found) == 1 else f"{pattern}: {empty[0]}")
    if missing:
        raise ValueError(
            f"{key}={missing}: no *.tar file below DATA.root={str(root)!r} matches; correct the patterns, or set "
            "DATA.root or HAND_DATA_ROOT (check_shards.py: --root) to the folder with the shards"
        )
    return sorted(shards)


def _expand(pattern: str, key: str) -> list[str]:
    """`pattern` with its braces expanded. Raises ValueError for anything but a path."""
    if scheme := _SCHEME.match(pattern):
        raise ValueError(
            f"{key}={pattern!r}: {scheme.group(1)}: is not supported, shards are read from files only; "
            "copy or mount the shards and give their path"
        )
    try:
        return list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise ValueError(f"{key}={pattern!r}: unbalanced braces ({error}); write e.g. {{000..131}}") from None


def _match(path: Path) -> set[Path]:
    found: set[Path] = set()
    for name in glob.iglob(str(path), recursive=True):
        match = Path(name)
        candidates = match.glob("*.tar") if match.is_dir() else [match]
        found.update(c.absolute() for c in candidates if c.suffix == ".tar" and c.is_file())
    return found
