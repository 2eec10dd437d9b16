"""Builds the index of a shard: reads the archive once, checks every sample and counts those that cannot be used."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np

from src.data.shards.errors import SampleError, reason_of
from src.data.shards.format import find_images, is_image, parse_clip
from src.data.shards.index import (
    FRAME,
    MAX_NAMED,
    SAMPLE,
    Bad,
    ShardIndex,
    Tables,
    cache_dir,
    index_path,
    key_hash,
    load_index,
    save_index,
)
from src.data.shards.processes import map_processes, worker_context
from src.data.shards.safe_parse import stored_image
from src.data.shards.tar import BLOCK, CorruptRegion, Member, TarReader, split_name


class _Builder:
    def __init__(self, file: int) -> None:
        self.file = file  # descriptor of the archive
        self.sample_rows: list[tuple[int, ...]] = []
        self.frame_rows: list[tuple[int, ...]] = []
        self.bad: list[Bad] = []
        self.corrupt: list[CorruptRegion] = []
        self.suspect: list[tuple[str, list[tuple[str, Member]]]] = []  # samples next to a corrupt region
        self.layouts: set[frozenset[str]] = set()  # sets of suffixes of healthy samples

    def read(self, items: Iterable[Member | CorruptRegion]) -> None:
        """Group members into samples, which are runs of members with one key, and add them as (suffix, member).

        Samples next to a corrupt region are added last: they count as complete only if some healthy sample has the
        same members.
        """
        key, members, is_suspect = "", [], False
        for item in items:
            if isinstance(item, CorruptRegion):
                self.corrupt.append(item)
                if members and _may_reach_into(item, members[-1][1]):
                    self.bad.append(Bad(key, "incomplete"))
                else:
                    self._close(key, members, True)
                key, members, is_suspect = "", [], True
            elif parts := split_name(item.name):
                if members and parts[0] != key:
                    self._close(key, members, is_suspect)
                    members, is_suspect = [], False
                key = parts[0]
                members.append((parts[1], item))
        self._close(key, members, is_suspect)
        self._count_lost_frames()
        for key, members in self.suspect:
            if frozenset(suffix for suffix, _ in members) in self.layouts:
                self._close(key, members, False)
            else:
                self.bad.append(Bad(key, "incomplete"))

    def _count_lost_frames(self) -> None:
        """Estimate how many frames each corrupt region has cost from the mean size of the healthy ones."""
        size = sum(row[2] for row in self.sample_rows) / max(1, len(self.frame_rows))
        for region in self.corrupt:
            lost = max(1, round(region.size / size)) if size else 1
            self.bad.append(Bad(region.name or f"byte {region.offset}", region.reason, lost))

    def _close(self, key: str, members: list[tuple[str, Member]], is_suspect: bool) -> None:
        """Add a sample whose members have all been read, or keep it for later."""
        if is_suspect and members:
            self.suspect.append((key, members))
        elif members:
            try:
                self._add(key, members)
            except OSError:
                raise
            except Exception as error:
                self.bad.append(Bad(key, reason_of(error)))

    def _add(self, key: str, members: list[tuple[str, Member]]) -> None:
        by_suffix = dict(members)
        if len(by_suffix) != len(members):
            raise SampleError("duplicate_member", key)
        images = find_images({suffix: m.data for suffix, m in by_suffix.items()})
        clip = parse_clip({suffix: m.data for suffix, m in by_suffix.items() if not is_image(suffix)})
        if clip.num_frame != len(images):
            raise SampleError("wrong_shape", f"{len(images)} images, {clip.num_frame} annotated frames")
        offset = members[0][1].begin
        size = members[-1][1].end - offset
        if size >= 1 << 32:
            raise SampleError("too_large", f"{size} bytes")
        holds_image = [is_image(suffix) for suffix, _ in members] + [False]  # the images are the first run of members
        first = holds_image.index(True)
        image_begin = members[first][1].begin - offset
        image_end = members[holds_image.index(False, first) - 1][1].end - offset
        note = os.pread(self.file, image_begin, offset) + os.pread(self.file, size - image_end, offset + image_end)
        row = len(self.sample_rows)
        self.sample_rows.append((offset, key_hash(key), size, image_begin, image_end, crc32(note)))
        for number, image in enumerate(images):
            if number in clip.bad_frame:
                self.bad.append(Bad(f"{key}/{number}", clip.bad_frame[number]))
                continue
            member = by_suffix[image.suffix]
            stored = memoryview(member.data)[image.begin : image.begin + image.size]
            begin, crc = member.offset - offset + image.begin, crc32(stored_image(stored, image.is_text))
            self.frame_rows.append((row, number, begin, image.size, crc, image.is_text))
        self.layouts.add(frozenset(by_suffix))


def build_index(shard: Path) -> ShardIndex:
    """Read a shard from end to end and count its corrupt samples. Raises OSError if the file cannot be read."""
    stat = shard.stat()
    try:
        with shard.open("rb", buffering=1 << 22) as file:
            builder = _Builder(file.fileno())
            builder.read(TarReader(file, stat.st_size))
    except OSError as error:  # the error of a failed read does not name the file
        raise OSError(error.errno, error.strerror or str(error), str(shard)) from error
    if not builder.sample_rows and not builder.bad:
        builder.bad.append(Bad("", "empty_shard"))
    tables = Tables(np.array(sorted(builder.sample_rows), SAMPLE), _sorted_frames(builder))
    counts: Counter[str] = Counter()
    for bad in builder.bad:
        counts[bad.reason] += bad.num_frame
    return ShardIndex(
        shard=shard,
        shard_size=stat.st_size,
        shard_mtime_ns=stat.st_mtime_ns,
        num_sample=len(tables.sample),
        frame_number_count=np.bincount(tables.frame["frame"]).tolist(),
        bad_count=dict(sorted(counts.items())),
        bad=builder.bad[:MAX_NAMED],
        in_memory=tables,
    )


def _sorted_frames(builder: _Builder) -> np.ndarray:
    """The frame table in archive order (samples next to corrupt regions were added last)."""
    frame = np.array(builder.frame_rows, FRAME)
    if builder.suspect and len(frame):
        order = sorted(range(len(builder.sample_rows)), key=builder.sample_rows.__getitem__)
        rank = np.empty(len(order), np.uint32)
        rank[order] = np.arange(len(order), dtype=np.uint32)
        frame["sample"] = rank[frame["sample"]]
        frame = frame[np.argsort(frame["sample"], kind="stable")]
    return frame


def _may_reach_into(region: CorruptRegion, member: Member) -> bool:
    """Whether corruption found at a header may have begun in the data of the member before it.

    That member has the right length whatever its data is. Corrupt bytes may always have begun there, zeros only if
    the member's last block is zeros as well.
    """
    last = member.data[-(len(member.data) % BLOCK or BLOCK) :]
    return region.reason == "bad_header" or (region.reason == "zeroed" and not last.strip(b"\0"))


def index_places(shard: Path, index_dir: str | Path | None) -> list[Path]:
    """Where the index of a shard may be stored, the preferred place first."""
    places = [index_path(shard, index_dir)]
    return places if index_dir is not None else [*places, index_path(shard, cache_dir())]


def find_index(shard: Path, index_dir: str | Path | None) -> ShardIndex | None:
    """The stored index of a shard; None if there is none that is up to date."""
    loaded = (load_index(shard, place) for place in index_places(shard, index_dir))
    return next((index for index in loaded if index is not None), None)


def _make_index(shard: Path, index_dir: str | Path | None) -> ShardIndex:
    """Build the index and store it; where no place can be written, it is kept in memory."""
    index = build_index(shard)
    for place in index_places(shard, index_dir):
        try:
            return save_index(index, place)
        except OSError:
            continue
    return index


def open_indexes(
    shards: Sequence[Path],
    index_dir: str | Path | None = None,
    num_process: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[ShardIndex]:
    """The indexes of `shards`: loaded where the stored one is up to date, otherwise built and stored.

    Args:
        index_dir: where indexes are stored; None: beside the shards, or in `cache_dir()` if that cannot be written.
        num_process: how many shards are read at once.
        progress: called with (shards done, shards to build) while indexes are built.
    """
    indexes = {shard: find_index(shard, index_dir) for shard in shards}
    missing = [(shard, index_dir) for shard, index in indexes.items() if index is None]
    for done, index in enumerate(map_processes(_make_index, missing, num_process, worker_context()), 1):
        indexes[index.shard] = index
        if progress:
            progress(done, len(missing))
    return [indexes[shard] for shard in shards]
