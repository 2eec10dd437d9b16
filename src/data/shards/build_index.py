"""Builds the index of a shard: walks the archive once, checks every sample, counts what is damaged and goes on."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
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
from src.data.shards.tar import BLOCK, Damage, Member, TarWalk, split_name


class _Builder:
    """Collects rows while the archive is walked; a sample is closed when the next key or damage comes."""

    def __init__(self, file: int) -> None:
        self.file = file  # descriptor of the archive
        self.sample_rows: list[tuple[int, ...]] = []
        self.frame_rows: list[tuple[int, ...]] = []
        self.bad: list[Bad] = []
        self.damage: list[Damage] = []
        self.suspect: list[tuple[str, list[Member]]] = []  # samples next to damage
        self.layouts: set[frozenset[str]] = set()  # sets of suffixes seen in healthy samples

    def close(self, key: str, members: list[Member]) -> None:
        """Take in a sample."""
        try:
            self._add(key, members)
        except OSError:
            raise
        except Exception as error:
            self.bad.append(Bad(key, reason_of(error)))

    def finish(self) -> None:
        """Count the damage; a sample beside it counts as complete only if healthy samples have the same members."""
        size = sum(row[2] for row in self.sample_rows) / max(1, len(self.frame_rows))
        for damage in self.damage:
            lost = max(1, round(damage.size / size)) if size else 1
            self.bad.append(Bad(damage.name or f"byte {damage.offset}", damage.reason, lost))
        for key, members in self.suspect:
            if frozenset(_suffix(m) for m in members) not in self.layouts:
                self.bad.append(Bad(key, "incomplete"))
                continue
            self.close(key, members)

    def _add(self, key: str, members: list[Member]) -> None:
        by_suffix = {_suffix(m): m for m in members}
        if len(by_suffix) != len(members):
            raise SampleError("duplicate_member", key)
        images = find_images({suffix: m.data for suffix, m in by_suffix.items()})
        clip = parse_clip({suffix: m.data for suffix, m in by_suffix.items() if not is_image(suffix)})
        if clip.num_frame != len(images):
            raise SampleError("wrong_shape", f"{len(images)} images, {clip.num_frame} annotated frames")
        offset, size = members[0].begin, members[-1].end - members[0].begin
        if size >= 1 << 32:
            raise SampleError("too_large", f"{size} bytes")
        image_begin, image_end = _image_region(members)
        note = os.pread(self.file, image_begin, offset) + os.pread(self.file, size - image_end, offset + image_end)
        row = len(self.sample_rows)
        self.sample_rows.append((offset, key_hash(key), size, image_begin, image_end, crc32(note)))
        for number, image in enumerate(images):
            if number in clip.bad_frame:
                self.bad.append(Bad(f"{key}/{number}", clip.bad_frame[number]))
                continue
            member = by_suffix[image.suffix]
            crc = crc32(memoryview(member.data)[image.begin : image.begin + image.size])
            self.frame_rows.append((row, number, member.offset - offset + image.begin, image.size, crc))
        self.layouts.add(frozenset(by_suffix))


def _suffix(member: Member) -> str:
    parts = split_name(member.name)
    assert parts is not None
    return parts[1]


def _image_region(members: list[Member]) -> tuple[int, int]:
    """(begin, end) behind the sample's offset of its first run of image members."""
    offset = members[0].begin
    image = [is_image(_suffix(m)) for m in members]
    first = last = image.index(True)
    while last + 1 < len(members) and image[last + 1]:
        last += 1
    return members[first].begin - offset, members[last].end - offset


def build_index(shard: Path) -> ShardIndex:
    """Read a shard from end to end. Damage is counted in the result; only an unreadable file raises (OSError)."""
    stat = shard.stat()
    try:
        with shard.open("rb", buffering=1 << 22) as file:
            builder = _Builder(file.fileno())
            _fill(builder, TarWalk(file, stat.st_size))
            builder.finish()
    except OSError as error:  # a failed read does not know its file's name
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
    """The frame table in order of the archive (samples beside damage were taken in last)."""
    frame = np.array(builder.frame_rows, FRAME)
    if builder.suspect and len(frame):
        order = sorted(range(len(builder.sample_rows)), key=builder.sample_rows.__getitem__)
        rank = np.empty(len(order), np.uint32)
        rank[order] = np.arange(len(order), dtype=np.uint32)
        frame["sample"] = rank[frame["sample"]]
        frame = frame[np.argsort(frame["sample"], kind="stable")]
    return frame


def _fill(builder: _Builder, walk: TarWalk) -> None:
    """Group the members into samples: runs with one key. What lies right before or behind damage is set aside."""
    key, members, hurt = "", [], False
    for item in walk:
        if isinstance(item, Damage):
            builder.damage.append(item)
            if members and _may_reach_into(item, members[-1]):
                builder.bad.append(Bad(key, "incomplete"))
            elif members:
                builder.suspect.append((key, members))
            key, members, hurt = "", [], True
            continue
        parts = split_name(item.name)
        if parts is None:
            continue
        if members and parts[0] != key:
            builder.suspect.append((key, members)) if hurt else builder.close(key, members)
            members, hurt = [], False
        key = parts[0]
        members.append(item)
    if members:
        builder.suspect.append((key, members)) if hurt else builder.close(key, members)


def _may_reach_into(damage: Damage, member: Member) -> bool:
    """Whether damage found at the next header may have begun in the data of the member before it, which has the right
    length whatever stands there: always for bytes of any kind; for zeros where its last block is zeros, too."""
    last = member.data[-(len(member.data) % BLOCK or BLOCK) :]
    return damage.reason == "bad_header" or (damage.reason == "zeroed" and not last.strip(b"\0"))


def _find_index(shard: Path, index_dir: str | Path | None) -> ShardIndex | None:
    for place in index_places(shard, index_dir):
        if (index := load_index(shard, place)) is not None:
            return index
    return None


def index_places(shard: Path, index_dir: str | Path | None) -> list[Path]:
    """Where the index of a shard may lie, the preferred place first."""
    places = [index_path(shard, index_dir)]
    return places if index_dir is not None else [*places, index_path(shard, cache_dir())]


def _make_index(shard: Path, index_dir: str | Path | None) -> ShardIndex:
    """Build the index and store it where that is possible; otherwise it is kept in memory."""
    index = build_index(shard)
    for place in index_places(shard, index_dir):
        try:
            return save_index(index, place)
        except OSError:
            continue
    return index


def worker_context() -> multiprocessing.context.BaseContext:
    """How data processes are started: forked where the system can, in milliseconds and without importing anew.

    They use neither CUDA nor a pool of threads, so nothing of the parent that does not survive a fork is touched.
    """
    return multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)


def open_indexes(
    shards: Sequence[Path],
    index_dir: str | Path | None = None,
    num_process: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[ShardIndex]:
    """The indexes of `shards`: stored ones where they are up to date, the others built now and stored.

    Args:
        index_dir: where indexes are kept; None: beside the shards, or in `cache_dir()` if that cannot be written.
        num_process: how many shards are read at once.
        progress: called with (shards done, shards to build) while indexes are built.
    """
    indexes = {shard: _find_index(shard, index_dir) for shard in shards}
    missing = [shard for shard, index in indexes.items() if index is None]
    make = partial(_make_index, index_dir=index_dir)
    if min(num_process, len(missing)) <= 1:
        for done, shard in enumerate(missing, 1):
            indexes[shard] = make(shard)
            if progress:
                progress(done, len(missing))
    else:
        with ProcessPoolExecutor(num_process, worker_context()) as pool:
            futures = {pool.submit(make, shard): shard for shard in missing}
            for done, future in enumerate(as_completed(futures), 1):
                indexes[futures[future]] = future.result()
                if progress:
                    progress(done, len(missing))
    return [index for shard in shards if (index := indexes[shard]) is not None]
