"""Reads tar archives (ustar, GNU long names, pax) block by block and continues after corrupt regions.

`tarfile` silently stops at the first zeroed block and raises at the first invalid one, losing the rest of the shard.
Here corrupt regions are yielded among the members, and reading continues at the next valid header.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

BLOCK = 512
_EMPTY = bytes(BLOCK)
_CHUNK = 1 << 20
_RECORD = 20 * BLOCK  # an archive ends with two blocks of zeros, padded to a whole record
_MAX_RECORD = 1 << 20  # larger ones (tar -b) are powers of two
_REGULAR = frozenset(b"0\x007")
_EXTENSION = frozenset(b"LKxX")  # long name, long link target, pax (POSIX, Solaris): they describe the next header
_NO_DATA = frozenset(b"123456")  # links, devices, folders, pipes: the size field does not count, as in tarfile
_NOT_STORED = {ord("1"): "linked_member", ord("2"): "linked_member", ord("S"): "sparse_member"}
_KEY = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")


class TarError(Exception):
    """Invalid tar header."""


_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}


@dataclass(frozen=True)
class Member:
    """One file in the archive."""

    name: str
    begin: int  # byte offset of its first header (which may be that of a long name)
    offset: int  # byte offset of its data
    data: bytes
    problem: str = ""  # linked_member or sparse_member: the archive does not hold its data in one piece; `data` is b""

    @property
    def end(self) -> int:
        """Offset of the first block after its data."""
        return self.offset + padded(len(self.data))


@dataclass(frozen=True)
class CorruptRegion:
    """`size` corrupt or missing bytes (0: unknown) at `offset`; `name` is the affected member, where it is known."""

    offset: int
    reason: str
    name: str = ""
    size: int = 0


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return (size + BLOCK - 1) // BLOCK * BLOCK


@lru_cache(maxsize=1024)  # indexing looks up the names of one sample several times
def split_name(name: str) -> tuple[str, str] | None:
    """(sample key, suffix) of a member by webdataset's rule: the key ends at the basename's first dot.

    The suffix is lower-cased, as in webdataset. None for `__meta__` entries, names without a dot, and hidden files such
    as macOS's `._000000.jpg` (which webdataset ignores at the top of an archive only).
    """
    match = None if _META.match(name) else _KEY.match(name)
    return (match.group(1), match.group(2).lower()) if match else None


def _number(field: bytes) -> int:
    """The value of an octal field, or of GNU's base-256 form for large values."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def read_header(block: bytes, check: bool = True) -> tuple[str, int, int]:
    """(name, size, type flag) in a header block. Raises TarError for a wrong checksum or an invalid number."""
    try:
        if check and sum(block[:148]) + 256 + sum(block[156:BLOCK]) != _number(block[148:156]):
            raise TarError("checksum")
        size = _number(block[124:136])
    except (ValueError, IndexError) as error:
        raise TarError(str(error)) from None
    if size < 0:  # int() accepts a sign; a negative size would move the reader backwards, in an endless loop
        raise TarError(f"size {size}")
    name = _text(block[:100])
    if block[345] and block[257:263] == b"ustar\0":  # GNU tar uses the prefix field differently
        name = f"{_text(block[345:500])}/{name}"
    return name, size, block[156]


def compression(head: bytes) -> str | None:
    """The format of a compressed file, from its first block; None for anything else, e.g. a tar."""
    try:
        read_header(head.ljust(BLOCK, b"\0"))
    except TarError:
        return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
    return None  # a tar whose first member happens to be named like that


def _pax_fields(data: bytes) -> dict[str, str]:
    """The records `<length> <key>=<value>\\n` of a pax header."""
    fields, at = {}, 0
    while at < len(data) and data[at] != 0:
        length, _, _ = data[at : at + 20].partition(b" ")
        end = at + int(length)
        if end <= at:
            raise TarError("pax record")
        key, _, value = data[at + len(length) + 1 : end - 1].partition(b"=")
        fields[key.decode()] = value.decode("utf-8", "surrogateescape")
        at = end
    return fields


def _extension(flag: int, data: bytes) -> dict[str, str]:
    """What a long-name or pax header sets for the next member: "path", "size" and, for sparse files, "sparse".

    Empty if it does not parse.
    """
    if flag in b"LK":
        return {"path": _text(data)} if flag in b"L" else {}
    try:
        fields = _pax_fields(data)
    except (TarError, ValueError):
        return {}
    found = {name: fields[name] for name in ("path", "size") if name in fields}
    if any(name.startswith("GNU.sparse.") for name in fields):
        found |= {"sparse": "1", "path": fields.get("GNU.sparse.name", found.get("path", ""))}
    return found


def _read_entry(block: bytes, override: dict[str, str], check: bool = True) -> tuple[str, int, int]:
    """`read_header`, with the values from preceding extension headers applied."""
    name, size, flag = read_header(block, check)
    if flag in _REGULAR and "size" in override:
        try:
            size = int(override["size"])
        except ValueError as error:
            raise TarError(str(error)) from None
        if size < 0:
            raise TarError(f"size {size}")
    return override.get("path") or name, 0 if flag in _NO_DATA else size, flag


def span_layout(span: bytes) -> tuple[str, dict[str, tuple[int, int]]]:
    """(key, {suffix: (begin, end) of the data}) of one sample, from the bytes of its members in the archive.

    Header checksums are not verified, because the index has a checksum over all these bytes. Raises TarError.
    """
    members, at, key, prefix, override = {}, 0, "", b"", {}
    while at + BLOCK <= len(span):
        # Fast path: nearly all members share the first one's prefix and need no full parse of the header.
        if prefix and span.startswith(prefix, at) and is_plain(span, at):
            suffix, size = span[at + len(prefix) : span.index(b"\0", at)], _plain_size(span[at + 124 : at + 136])
            if size >= 0 and len(prefix) + len(suffix) < 100 and b"/" not in suffix and not override:
                members[_text(suffix).lower()] = (at + BLOCK, at + BLOCK + size)
                at += BLOCK + padded(size)
                continue
        name, size, flag = _read_entry(span[at : at + BLOCK], override, check=False)
        begin, end = at + BLOCK, at + BLOCK + size
        at = begin + padded(size)
        if flag in _EXTENSION:
            override.update(_extension(flag, span[begin:end]))
            continue
        if flag in _REGULAR and (parts := split_name(name)):
            key, members[parts[1]] = parts[0], (begin, end)
            prefix = b"" if "path" in override or len(key) > 90 else key.encode("utf-8", "surrogateescape") + b"."
        override = {}
    return key, members


def is_plain(span: bytes, at: int) -> bool:
    """Whether the header at `at` is that of a regular file and contains the whole name."""
    return span[at + 156] in _REGULAR and not span[at + 345]


def plain_key(span: bytes, tail: bytes) -> bytes | None:
    """The sample's key, if the first header's name is just the key and `tail` (".<suffix>" and a zero)."""
    end = span.find(tail, 0, 100)
    key = span[:end] if end > 0 else b""
    return None if not key or b"." in key.rpartition(b"/")[2] or b"__" in key or b"\0" in key else key


def _plain_size(field: bytes) -> int:
    """The size in an octal field; -1 for any other form."""
    digits = field[:11]
    return int(digits, 8) if digits.isdigit() else -1


class TarReader:
    """Iterates over the members and corrupt regions of an open archive, in order of their offsets."""

    def __init__(self, file: BinaryIO, file_size: int) -> None:
        self.file, self.size, self.at = file, file_size, 0

    def __iter__(self) -> Iterator[Member | CorruptRegion]:
        begin, override = 0, {}
        while self.at < self.size:
            header_at, block = self.at, self._read(BLOCK)
            if len(block) < BLOCK:
                yield CorruptRegion(header_at, "truncated")
                return
            if block == _EMPTY:
                if self._only_zeros_follow():
                    if (rest := self.size - header_at) > self._max_end():  # no writer pads this much: members are lost
                        yield CorruptRegion(header_at, "zeroed", size=rest - 2 * BLOCK)
                    return
                begin, override = self._resync(header_at + BLOCK), {}
                yield CorruptRegion(header_at, "zeroed", size=begin - header_at)
                continue
            try:
                name, size, flag = _read_entry(block, override)
            except TarError:
                begin, override = self._resync(header_at + BLOCK), {}
                yield CorruptRegion(header_at, "bad_header", size=begin - header_at)
                continue
            if flag in b"S":
                self._skip_sparse_map(block)
            if self.at + size > self.size:
                yield CorruptRegion(header_at, "truncated", name, BLOCK + padded(size))
                return
            data = self._read(padded(size))[:size]
            if flag in _EXTENSION:
                override.update(_extension(flag, data))
                continue
            if problem := "sparse_member" if "sparse" in override else _NOT_STORED.get(flag, ""):
                yield Member(name, begin, header_at + BLOCK, b"", problem)
            elif flag in _REGULAR:
                yield Member(name, begin, header_at + BLOCK, data)
            begin, override = self.at, {}
        yield CorruptRegion(self.size, "no_end_of_archive")

    def _max_end(self) -> int:
        """The most zeros that a writer leaves at the end of an archive of this size."""
        power_of_two = self.size & -self.size  # the largest that divides it
        return 2 * BLOCK + max(_RECORD, min(power_of_two, _MAX_RECORD))

    def _read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.at += len(data)
        return data

    def _skip_sparse_map(self, header: bytes) -> None:
        """Skip the blocks that continue the map of a sparse file (GNU's old format)."""
        is_extended = header[482]
        while is_extended and len(block := self._read(BLOCK)) == BLOCK:
            is_extended = block[504]

    def _only_zeros_follow(self) -> bool:
        """Whether only zeros follow; the file position is restored."""
        at, empty = self.at, True
        while empty and (chunk := self.file.read(_CHUNK)):
            empty = not chunk.strip(b"\0")
        self.file.seek(at)
        return empty

    def _resync(self, start: int) -> int:
        """Seek to the first valid header at or after `start`, or to the end; returns its offset."""
        self.file.seek(start)
        self.at = start
        while len(block := self._read(BLOCK)) == BLOCK:
            if block[257:262] == b"ustar" and block != _EMPTY:
                try:
                    read_header(block)
                except TarError:
                    continue
                self.at -= BLOCK
                break
        self.file.seek(self.at)
        return self.at
