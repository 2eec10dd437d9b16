"""Reads single frames of one shard: the bytes that the index points to, verified by checksum, then parsed.

"Note" is everything of a sample except its image members, headers included. Most samples of a shard have members with
the same names and sizes. The layouts of earlier samples of the same size are tried first, because comparing names and
sizes is cheaper than parsing headers.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict, deque
from io import BytesIO
from operator import itemgetter
from zlib import crc32

from src.data.shards.annotation import Clip
from src.data.shards.errors import SampleError
from src.data.shards.format import parse_clip
from src.data.shards.index import ShardIndex
from src.data.shards.safe_parse import stored_image
from src.data.shards.tar import BLOCK, TarError, TarReader, is_plain, padded, plain_key, span_layout, split_name
from src.utils.text import one_line

_WHOLE_SIZE = 1 << 18  # bytes; samples up to this size are read in one piece
_CLIP_MEMORY = 64 << 20  # bytes of annotations cached per process
_FRAME_SIZE = 1200  # bytes of a frame's annotations, approximately
_HEAD_SIZE = 16 * BLOCK  # bytes in which the name of a sample's first member is looked for; long names have their own
_NUM_LAYOUT = 4  # kept per sample size; "left" and "right" alone make two


class Layout:
    """Where the members of a sample are, and a quick test whether another sample has the same layout."""

    def __init__(self, note: bytes, places: dict[str, tuple[int, int]]) -> None:
        self.places = places
        at = [begin - BLOCK for begin, _ in places.values()]
        tails = [b"." + suffix.encode("utf-8", "surrogateescape") + b"\0" for suffix in places]
        self._names = list(zip(at, tails))
        self._is_plain = bool(at) and _covers(places, len(note)) and all(is_plain(note, begin) for begin in at)
        # size, type flag and prefix of each header; one call gets them all
        parts = [slice(a + b, a + e) for a in at for b, e in ((124, 136), (156, 157), (345, 346))]
        self._fields = itemgetter(*parts or [slice(0)])
        self._values = self._fields(note)

    def key(self, note: bytes) -> str | None:
        """The key of a sample of the same size if it has this layout, else None."""
        if not self._is_plain or self._fields(note) != self._values:
            return None
        key = plain_key(note, self._names[0][1])
        if key is None or not all(note.startswith(key + tail, at) for at, tail in self._names):
            return None
        return key.decode("utf-8", "surrogateescape")


def _covers(places: dict[str, tuple[int, int]], size: int) -> bool:
    """Whether the members, each with a header of one block, make up all `size` bytes."""
    at = 0
    for begin, end in places.values():
        if begin != at + BLOCK:
            return False
        at = begin + padded(end - begin)
    return at == size


class ClipCache:
    """Annotations of clips with several frames, least recently used first to go."""

    def __init__(self) -> None:
        self.size = 0
        self._clips: OrderedDict[tuple[str, int], tuple[str, Clip]] = OrderedDict()

    def get(self, at: tuple[str, int]) -> tuple[str, Clip] | None:
        """(key, clip) of a sample, if it is cached."""
        if (found := self._clips.get(at)) is not None:
            self._clips.move_to_end(at)
        return found

    def put(self, at: tuple[str, int], key: str, clip: Clip) -> None:
        """Cache a clip; clips of a single frame are not cached, because they are read once per epoch."""
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
        self._layouts: dict[int, deque[Layout]] = {}  # by the size of the note, newest first

    def close(self) -> None:
        """Close the shard; also happens when the reader is garbage-collected."""
        self._close()

    def describe(self, row: int) -> str:
        """ "<sample key>/<frame>" of a row, from its tar headers alone, for reports of frames that fail to read."""
        if self.rows is not None:
            row = int(self.rows[row])
        sample_row, number = self.tables.frame[row].item()[:2]
        offset = int(self.tables.sample["offset"][sample_row])
        try:
            head = os.pread(self.fd, _HEAD_SIZE, offset)
        except OSError:
            head = b""
        first = next(iter(TarReader(BytesIO(head), len(head))), None)
        parts = split_name(first.name) if first else None
        return f"{one_line(parts[0]) if parts else f'byte {offset}'}/{number}"

    def _pread(self, offset: int, size: int) -> bytes:
        data = os.pread(self.fd, size, offset)
        if len(data) != size:
            raise self._changed("truncated", f"{self.name} ends at byte {offset + len(data)}")
        return data

    def read(self, row: int) -> tuple[str, Clip, int, memoryview]:
        """(key, annotations, frame number, encoded image) of a row. Raises SampleError, OSError."""
        if self.rows is not None:
            row = int(self.rows[row])
        sample_row, number, begin, size, crc, is_text = self.tables.frame[row].item()
        offset, _, sample_size, image_begin, image_end, _ = self.tables.sample[sample_row].item()
        known, note = self.clips.get((self.name, sample_row)), None
        if known is not None or sample_size > _WHOLE_SIZE:
            image = memoryview(self._pread(offset + begin, size))
        else:
            whole = self._pread(offset, sample_size)
            note, image = whole[:image_begin] + whole[image_end:], memoryview(whole)[begin : begin + size]
        if is_text:
            image = memoryview(stored_image(image, True))
        if crc32(image) != crc:
            raise self._changed("crc_image", f"frame {number} of the sample at byte {offset} of {self.name}")
        key, clip = known or self._clip(sample_row, note)
        return key, clip, number, image

    def annotation(self, row: int) -> tuple[Clip, int]:
        """(annotations, frame number) of a row, without reading the image. Raises SampleError, OSError."""
        if self.rows is not None:
            row = int(self.rows[row])
        sample_row, number = self.tables.frame[row].item()[:2]
        return (self.clips.get((self.name, sample_row)) or self._clip(sample_row, None))[1], number

    def image_head(self, row: int, size: int) -> bytes:
        """The first `size` bytes of a row's encoded image, or fewer if it is smaller; not checked. Raises OSError."""
        if self.rows is not None:
            row = int(self.rows[row])
        sample_row, _, begin, image_size, _, is_text = self.tables.frame[row].item()
        head = os.pread(self.fd, min(size, image_size), int(self.tables.sample["offset"][sample_row]) + begin)
        return bytes(stored_image(head, is_text))

    def _clip(self, sample_row: int, note: bytes | None) -> tuple[str, Clip]:
        """(key, annotations) of a sample from its note; None: read it."""
        offset, _, sample_size, image_begin, image_end, crc = self.tables.sample[sample_row].item()
        if note is None:
            note = self._pread(offset, image_begin) if image_begin else b""
            note += self._pread(offset + image_end, sample_size - image_end) if image_end < sample_size else b""
        if crc32(note) != crc:
            raise self._changed("crc_note", f"annotations of the sample at byte {offset} of {self.name}")
        key, places = self._places(note)
        view = memoryview(note)
        clip = parse_clip({suffix: view[begin:end] for suffix, (begin, end) in places.items()}, check=False)
        self.clips.put((self.name, sample_row), key, clip)
        return key, clip

    def _changed(self, reason: str, detail: str) -> SampleError:
        """The error for bytes that differ from those indexed: they are corrupt, or the shard has been rewritten."""
        stat = os.fstat(self.fd)
        if self.stamp != (stat.st_size, stat.st_mtime_ns):
            reason, detail = "stale_index", f"{detail}; the shard has been rewritten since it was indexed"
        return SampleError(reason, detail)

    def _places(self, note: bytes) -> tuple[str, dict[str, tuple[int, int]]]:
        """(key, {suffix: (begin, end)}) of a sample's members in its note."""
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
