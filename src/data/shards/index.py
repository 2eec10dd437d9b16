"""The index of one shard: offset, size and checksum of every frame, and which samples are corrupt.

A shard is read once, in order. The index is one small file: a JSON header, then two arrays that are memory-mapped, so
that twenty million frames cost address space and not memory. It contains the shard's size and modification time and is
rebuilt when they change. It is written to a temporary file and renamed, so several builders may race.

    <shard>.index (beside the shards, or in index_dir)
        8 bytes magic, uint32 header length, uint32 crc32 of everything that follows,
        header (JSON), zeros up to a multiple of 64, SAMPLE rows, FRAME rows
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from zlib import crc32

import numpy as np

from src.utils.files import write_atomic
from src.utils.text import one_line

VERSION = 5  # increase it also when the definition of a healthy frame changes
_MAGIC = b"HANDIDX\0"
_HEAD = struct.Struct("<8sII")  # magic, length of the header, checksum of everything after this
_ALIGN = 64
MAX_NAMED = 200  # corrupt samples listed by key; the counts are complete

SAMPLE = np.dtype(
    [
        ("offset", "<u8"),  # of the sample's first header in the shard
        ("key_hash", "<u8"),
        ("size", "<u4"),  # bytes in the archive, headers included
        ("image_begin", "<u4"),  # the image members are [image_begin, image_end), relative to `offset`
        ("image_end", "<u4"),
        ("note_crc", "<u4"),  # crc32 of all other bytes of the sample, headers included
    ]
)
FRAME = np.dtype(
    [
        ("sample", "<u4"),  # row in the sample table
        ("frame", "<u4"),  # number within the clip
        ("begin", "<u4"),  # of the encoded image, relative to the sample's offset
        ("size", "<u4"),
        ("crc", "<u4"),  # crc32 of the encoded image
        ("is_text", "u1"),  # 1: stored as UTF-8 of latin-1 text, see safe_parse.stored_image
    ]
)


@dataclass(frozen=True)
class Bad:
    """`num_frame` frames of the sample `key` cannot be used."""

    key: str
    reason: str
    num_frame: int = 1
    detail: str = ""  # which member, which value, what is expected

    def __str__(self) -> str:
        key = one_line(self.key) or "(no key)"
        return key if self.num_frame == 1 else f"{key} ({self.num_frame} frames)"


@dataclass(frozen=True)
class Tables:
    """The rows of an index; all frames in them are healthy."""

    sample: np.ndarray  # [num_sample] SAMPLE
    frame: np.ndarray  # [num_frame] FRAME

    def rows(self, stride: int) -> np.ndarray | None:
        """Rows of every stride-th frame of each clip; None for all rows."""
        return None if stride == 1 else np.flatnonzero(self.frame["frame"] % stride == 0).astype(np.uint32)


# fields of ShardIndex that are stored in the header, besides `bad`
_STORED = ("shard_size", "shard_mtime_ns", "num_sample", "frame_number_count", "bad_count", "is_lost")


@dataclass
class ShardIndex:
    """The header of a shard's index. The rows are mapped on demand, because every mapping keeps a file open."""

    shard: Path
    shard_size: int
    shard_mtime_ns: int
    num_sample: int
    frame_number_count: list[int]  # how many healthy frames have number 0, 1, 2, ... in their clip
    bad_count: dict[str, int]  # reason -> frames
    bad: list[Bad]  # the first MAX_NAMED of them
    is_lost: bool = False  # nothing in it can be read, so `bad_count` cannot state how many frames that costs
    stored: tuple[Path, int] | None = None  # the file with the rows, and their offset in it
    in_memory: Tables | None = field(default=None, repr=False)  # the rows themselves, if they could not be stored

    def num_frame(self, stride: int = 1) -> int:
        """The number of healthy frames, counting every stride-th frame of each clip."""
        return sum(self.frame_number_count[::stride])

    def tables(self) -> Tables:
        """The rows. Each call maps the file again: keep the result only as long as needed."""
        if self.in_memory is not None:
            return self.in_memory
        assert self.stored is not None
        path, start = self.stored
        middle = start + self.num_sample * SAMPLE.itemsize
        end = middle + self.num_frame() * FRAME.itemsize
        if end == start:
            return Tables(np.empty(0, SAMPLE), np.empty(0, FRAME))
        data = np.memmap(path, np.uint8, "r", shape=(end,)).view(np.ndarray)
        return Tables(data[start:middle].view(SAMPLE), data[middle:end].view(FRAME))


def key_hash(key: str) -> int:
    """64 bits of a sample's key."""
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def index_path(shard: Path, index_dir: str | Path | None = None) -> Path:
    """Where the index of `shard` is stored: beside it, or in `index_dir` under a unique name."""
    shard = Path(shard).absolute()
    if index_dir is None:
        return shard.with_name(shard.name + ".index")
    digest = blake2b(os.fsencode(shard), digest_size=8).hexdigest()
    return Path(index_dir).expanduser() / f"{shard.stem}-{digest}.index"


def cache_dir() -> Path:
    """Where indexes are stored if the shards' own folder is not writable."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "handpose" / "index"


def save_index(index: ShardIndex, path: Path) -> ShardIndex:
    """Write an index atomically; returns it as stored.

    Raises:
        OSError: the folder is not writable.
    """
    tables = index.tables()
    stored = {name: getattr(index, name) for name in _STORED}
    text = json.dumps({"version": VERSION, **stored, "bad": [asdict(bad) for bad in index.bad]}).encode()
    start = -(-(_HEAD.size + len(text)) // _ALIGN) * _ALIGN
    rest = text.ljust(start - _HEAD.size, b"\0") + tables.sample.tobytes() + tables.frame.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, _HEAD.pack(_MAGIC, len(text), crc32(rest)) + rest)
    return replace(index, stored=(path, start), in_memory=None)


def load_index(shard: Path, path: Path) -> ShardIndex | None:
    """The index of `shard` stored at `path`; None if it is missing or corrupt, or if the shard has changed since."""
    try:
        stat = shard.stat()
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size or not head.startswith(_MAGIC):
                return None
            _, length, checksum = _HEAD.unpack(head)
            rest = file.read()
        header = json.loads(rest[:length])
        if header["version"] != VERSION or crc32(rest) != checksum:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if (header["shard_size"], header["shard_mtime_ns"]) != (stat.st_size, stat.st_mtime_ns):
        return None
    start = -(-(_HEAD.size + length) // _ALIGN) * _ALIGN
    stored = {name: header[name] for name in _STORED}
    return ShardIndex(shard, **stored, bad=[Bad(**bad) for bad in header["bad"]], stored=(path, start))
