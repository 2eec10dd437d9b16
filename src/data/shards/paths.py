"""Resolves the user's patterns to tar shards on disk. Imports little, because config checks use it.

What exists under its literal name is never a pattern, so folders may have `[ ]`, `{ }`, `*` or `~` in their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand

from src.utils.files import is_hidden, walk_pattern

_SCHEME = re.compile(r"^(pipe|[A-Za-z][A-Za-z0-9+.\-]*(?=://)):")
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


def resolve_source(root: str | Path, patterns: str | Iterable[str], key: str = "DATA.train.source") -> list[Path]:
    """The tar shards that match the patterns, sorted, without duplicates.

    A pattern is a path below `root` or an absolute path, with `*`, `?`, `[...]`, `**` and `{a,b}` / `{000..131}`.
    A folder means the `*.tar` files in it (in capitals, too); hidden files and other extensions are ignored.

    Raises:
        ValueError: a pattern that would start a program or contains a URL scheme, or patterns that match no shard: the
            message names `key` and all of them.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError(f"{key}=[]: is empty; give at least one pattern, e.g. ['DexYCB/s1/train/*']")
    shards: set[Path] = set()
    missing, hints = [], []
    for pattern in patterns:
        found = dict(_find(Path(root), pattern, key))
        tars = {piece: {shard for path in paths for shard in _tars(path)} for piece, paths in found.items()}
        shards.update(*tars.values())
        if empty := [piece for piece, matches in tars.items() if not matches]:
            missing.append(pattern if len(found) == 1 else f"{pattern}: {empty[0]}")
            hints += [hint for piece in empty for path in found[piece] for hint in _hints(path)]
    if missing:
        why = f"no *.tar file below DATA.root={str(root)!r} matches{''.join(hints[:1])}"
        raise ValueError(
            f"{key}={missing}: {why}; correct the patterns, or set DATA.root or HAND_DATA_ROOT (check_shards.py: "
            "--root) to the folder with the shards"
        )
    return sorted(shards)


def _find(root: Path, pattern: str, key: str) -> Iterator[tuple[str, list[Path]]]:
    """(pattern, paths that match it) for each pattern that the braces of `pattern` make.

    Raises ValueError for anything but a path.
    """
    if scheme := _SCHEME.match(pattern):
        raise ValueError(
            f"{key}={pattern!r}: {scheme.group(1)}: is not supported, shards are read from files only; "
            "copy or mount the shards and give their path"
        )
    folder, parts, num_literal = _expand_user(root), Path(pattern).parts, 0
    if parts and not (folder / parts[0]).exists():
        parts = _expand_user(Path(pattern)).parts
    while num_literal < len(parts) and (folder / parts[num_literal]).exists():
        folder, num_literal = folder / parts[num_literal], num_literal + 1
    rest = "/".join(parts[num_literal:])
    is_literal = "{" not in rest or next(walk_pattern(folder, rest), None)  # braces are ordinary characters there
    try:
        for piece in [rest] if is_literal else braceexpand(rest, escape=False):
            yield str(Path(*parts[:num_literal], piece)), [*walk_pattern(folder, piece)]
    except UnbalancedBracesError as error:
        raise ValueError(f"{key}={pattern!r}: unbalanced braces ({error}); write e.g. {{000..131}}") from None


def _expand_user(path: Path) -> Path:
    """`path` with a leading `~` or `~name` replaced by the home folder, unless it exists as it is."""
    try:
        return path if path.exists() else path.expanduser()
    except RuntimeError:  # no such user
        return path


def _tars(path: Path) -> Iterator[Path]:
    files = path.iterdir() if path.is_dir() else [path]
    for file in files:
        is_named_tar = file.suffix.lower() == ".tar" and (file == path or not is_hidden(file))
        # a folder and a broken link are reported when they are opened; opening a pipe would wait for ever
        if is_named_tar and (file.is_file() or file.is_dir() or not file.exists()):
            yield file.absolute()


def _hints(path: Path) -> Iterator[str]:
    """Why a path that matches a pattern has no shard."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if _COMPRESSED.search(file.name) and not is_hidden(file):
            yield f"; {file} is compressed: unpack it to a .tar"
        elif file.is_dir() and next(_tars(file), None):
            yield f"; the folders in {path} contain shards: add '/*' to the pattern"
