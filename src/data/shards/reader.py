"""Reads single frames of one shard: the bytes that its index points to, checked against its checksums, then parsed.

Most samples of a shard have members of the same names and sizes. So the layouts of earlier samples of the same size are
tried first: a look at names and sizes is enough then.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict, deque
from zlib import crc32

from src.data.shards.annotation import Clip
from src.data.shards.errors import SampleError
from src.data.shards.format import parse_clip
from src.data.shards.index import ShardIndex
from src.data.shards.tar import BLOCK, TarError, is_plain, padded, plain_key, read_header, span_layout, split_name

_WHOLE_SIZE = 1 << 18  # samples up to this size are read in one piece
_CLIP_MEMORY = 64 << 20  # bytes of annotations that one process keeps
_FRAME_SIZE = 1200  # bytes of a frame's annotations, about
_NUM_LAYOUT = 4  # kept for each size of a sample: "left" and "right" alone make two


class Layout:
    """Where the members of a sample lie, and how to tell that those of another one lie in the same places."""

    def __init__(self, note: bytes, places: dict[str, tuple[int, int]]) -> None:
        self.places = places
        tails = [
            (begin - BLOCK, b"." + suffix.encode("utf-8", "surrogateescape")) for suffix, (begin, _) in places.items()
        ]
        self._heads = [(at, tail + b"\0", at + 124, note[at + 124 : at + 136]) for at, tail in tails]
        self._is_plain = bool(tails) and _covers(places, len(note))

    def key(self, note: bytes) -> str | None:
        """The key of a sample (as long as the one that was looked at) whose members lie in these places, else None."""
        key = plain_key(note, self._heads[0][1]) if self._is_plain else None
        if key is None:
            return None
        for at, tail, size_at, size in self._heads:
            if not note.startswith(key, at) or not note.startswith(tail, at + len(key)):
                return None
            if not note.startswith(size, size_at) or not is_plain(note, at):
                return None
        return key.decode("utf-8", "surrogateescape")


def _covers(places: dict[str, tuple[int, int]], size: int) -> bool:
    """Whether the members, with a header of one block each, are all there is."""
    at = 0
    for begin, end in places.values():
        if begin != at + BLOCK:
            return False
        at = begin + padded(end - begin)
    return at == size


class ClipCache:
    """Annotations of clips of several frames, which are asked for again and again; the longest unused go first."""

    def __init__(self) -> None:
        self.size = 0
        self._clips: OrderedDict[tuple[str, int], tuple[str, Clip]] = OrderedDict()

    def get(self, at: tuple[str, int]) -> tuple[str, Clip] | None:
        """(key, clip) of what was put there, if it is still kept."""
        if (found := self._clips.get(at)) is not None:
            self._clips.move_to_end(at)
        return found

    def put(self, at: tuple[str, int], key: str, clip: Clip) -> None:
        """Keep a clip; a single frame is not worth it, since it has its turn once in an epoch."""
        if clip.num_frame < 2:
            return
        self._clips[at] = (key, clip)
        self.size += clip.num_frame * _FRAME_SIZE
        while self.size > _CLIP_MEMORY and len(self._clips) > 1:
            self.size -= self._clips.popitem(last=False)[1][1].num_frame * _FRAME_SIZE


class ShardReader:
    """Reads single frames of one shard."""

    def __init__(self, index: ShardIndex, stride: int, clips: ClipCache | None = None) -> None:
        self.name, self.fd = str(index.shard), os.open(index.shard, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self.fd)
        self.stamp = index.shard_size, index.shard_mtime_ns
        self.tables = index.tables()
        self.rows = self.tables.rows(stride)
        self.clips = ClipCache() if clips is None else clips
        self._layouts: dict[int, deque[Layout]] = {}  # by the size of a sample without its images, last found first

    def close(self) -> None:
        """Close the shard; a reader that nobody holds any more does so by itself."""
        self._close()

    def describe(self, row: int) -> str:
        """ "<sample key>/<frame>" of a row that cannot be read otherwise, from its header in the archive."""
        if self.rows is not None:
            row = int(self.rows[row])
        sample_row, number = self.tables.frame[row].item()[:2]
        offset = int(self.tables.sample["offset"][sample_row])
        try:
            parts = split_name(read_header(os.pread(self.fd, BLOCK, offset))[0])
        except (TarError, OSError):
            parts = None
        return f"{parts[0] if parts else f'byte {offset}'}/{number}"

    def _pread(self, offset: int, size: int) -> bytes:
        data = os.pread(self.fd, size, offset)
        if len(data) != size:
            raise self._changed("truncated", f"{self.name} ends at {offset + len(data)}")
        return data

    def read(self, row: int) -> tuple[str, Clip, int, memoryview]:
        """(key, annotations, frame number, encoded image) of a row. Raises SampleError, OSError."""
        if self.rows is not None:
            row = int(self.rows[row])
        sample_row, number, begin, size, crc = self.tables.frame[row].item()
        offset, _, sample_size, image_begin, image_end, _ = self.tables.sample[sample_row].item()
        known, note = self.clips.get((self.name, sample_row)), None
        if known is not None or sample_size > _WHOLE_SIZE:
            image = memoryview(self._pread(offset + begin, size))
        else:
            whole = self._pread(offset, sample_size)
            note, image = whole[:image_begin] + whole[image_end:], memoryview(whole)[begin : begin + size]
        if crc32(image) != crc:
            raise self._changed("crc_image", f"frame {number} behind byte {offset} of {self.name}")
        key, clip = known or self._clip(sample_row, note)
        return key, clip, number, image

    def annotation(self, row: int) -> tuple[Clip, int]:
        """(annotations, frame number) of a row; the image is not even read. Raises SampleError, OSError."""
        if self.rows is not None:
            row = int(self.rows[row])
        sample_row, number = self.tables.frame[row].item()[:2]
        return (self.clips.get((self.name, sample_row)) or self._clip(sample_row, None))[1], number

    def _clip(self, sample_row: int, note: bytes | None) -> tuple[str, Clip]:
        """(key, annotations) of a sample, from the bytes in front of and behind its images; None: read them."""
        offset, _, sample_size, image_begin, image_end, crc = self.tables.sample[sample_row].item()
        if note is None:
            note = self._pread(offset, image_begin) if image_begin else b""
            note += self._pread(offset + image_end, sample_size - image_end) if image_end < sample_size else b""
        key, members = self._members(note, crc)
        clip = parse_clip(members, check=False)
        self.clips.put((self.name, sample_row), key, clip)
        return key, clip

    def _changed(self, reason: str, detail: str) -> SampleError:
        """The error for bytes that differ from those indexed: they have rotted, or somebody wrote the shard anew."""
        stat = os.fstat(self.fd)
        if self.stamp != (stat.st_size, stat.st_mtime_ns):
            reason, detail = "stale_index", f"{detail}; the shard was written after it was indexed"
        return SampleError(reason, detail)

    def _members(self, note: bytes, crc: int) -> tuple[str, dict[str, memoryview]]:
        """(key, members by suffix) of a sample whose bytes without images have the checksum `crc`."""
        if crc32(note) != crc:
            raise self._changed("crc_note", f"annotations {self._key_of(note)}")
        key, places = self._places(note)
        view = memoryview(note)
        return key, {suffix: view[begin:end] for suffix, (begin, end) in places.items()}

    def _places(self, note: bytes) -> tuple[str, dict[str, tuple[int, int]]]:
        """(key, where each member begins and ends, by suffix) of a sample."""
        layouts = self._layouts.setdefault(len(note), deque(maxlen=_NUM_LAYOUT))
        for layout in layouts:
            if (key := layout.key(note)) is not None:
                return key, layout.places
        try:
            key, places = span_layout(note)
        except TarError as error:
            raise self._changed("crc_note", f"a header does not parse ({error})") from None
        layouts.appendleft(Layout(note, places))
        return key, places

    @staticmethod
    def _key_of(note: bytes) -> str:
        try:
            return f"of {span_layout(note)[0]!r}"
        except TarError:
            return "of a sample whose name does not parse"
