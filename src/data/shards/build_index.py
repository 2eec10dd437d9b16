"""Builds the index of a shard: reads the archive once, checks every sample and counts those that cannot be used."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np

from src.data.shards.errors import SampleError, detail_of, reason_of
from src.data.shards.format import find_images, is_image, is_known_format, parse_clip
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
from src.data.shards.losses import count_annotated, count_frames, count_images, is_used, is_whole, split_dotted
from src.data.shards.processes import map_processes, worker_context
from src.data.shards.runs import Run, judge
from src.data.shards.safe_parse import stored_image
from src.data.shards.tar import BLOCK, CorruptRegion, Member, TarReader, compression, split_name

# a sample that fails for one of these may be several, merged by dots in their names
_MAY_BE_DOTTED = frozenset({"missing_member", "wrong_shape", "duplicate_member", "dotted_name"})


class _Builder:
    """Groups members into runs and checks each of them."""

    def __init__(self, file: int) -> None:
        self.file = file  # descriptor of the archive
        self.runs: list[Run] = []
        self.regions: list[tuple[CorruptRegion, int]] = []  # each with the number of runs before it
        self._undotted: set[frozenset[str]] = set()  # sets of suffixes without dotted names

    def read(self, items: Iterable[Member | CorruptRegion]) -> None:
        """Add the runs of members with one key, and the corrupt regions between them."""
        key, members, is_suspect = "", [], False
        for item in items:
            if isinstance(item, CorruptRegion):
                may_reach = bool(members) and _may_reach_into(item, members[-1][1])
                self._close(key, members, True, "incomplete" if may_reach else "")
                self.regions.append((item, len(self.runs)))
                key, members, is_suspect = "", [], True
            elif (parts := split_name(item.name)) and not (item.problem == "linked_member" and not is_used(parts[1])):
                if members and parts[0] != key:
                    self._close(key, members, is_suspect)
                    members, is_suspect = [], False
                key = parts[0]
                members.append((parts[1], item))
        self._close(key, members, is_suspect)

    def _close(self, key: str, members: list[tuple[str, Member]], is_suspect: bool, reason: str = "") -> None:
        """Add a run whose members have all been read, and check it."""
        if not members:
            return
        by_suffix, size = dict(members), members[-1][1].end - members[0][1].begin
        data = {suffix: member.data for suffix, member in members if not member.problem}
        run = Run(key, frozenset(by_suffix), size, reason, is_suspect=is_suspect)
        self.runs.append(run)
        try:
            if problem := next((member.problem for _, member in members if member.problem), ""):
                raise SampleError(problem)
            if len(by_suffix) != len(members):
                run.num_image = sum(map(count_images, _versions(members)))
                raise SampleError("duplicate_member")
            self._check(run, by_suffix, data)
        except OSError:
            raise
        except Exception as error:
            if not run.reason:
                run.reason, run.detail = reason_of(error), detail_of(error)
            self._count(run, data)

    def _count(self, run: Run, data: dict[str, bytes]) -> None:
        """Count the frames of a run that cannot be used."""
        if run.reason in _MAY_BE_DOTTED and (hands := split_dotted(data)):
            run.reason, run.detail, run.num_image = "dotted_name", "", sum(map(count_frames, hands.values()))
        else:
            run.num_image, run.num_annotated = run.num_image or count_images(data), count_annotated(data)

    def _check(self, run: Run, members: dict[str, Member], data: dict[str, bytes]) -> None:
        """Fill the rows of a run that can be used. Raises SampleError, or anything else for malformed bytes."""
        images = find_images(data)
        clip = parse_clip({suffix: content for suffix, content in data.items() if not is_image(suffix)})
        if clip.num_frame != len(images):
            raise SampleError("wrong_shape", f"{len(images)} images, {clip.num_frame} annotated frames")
        if run.size >= 1 << 32:
            raise SampleError("too_large", f"{run.size} bytes")
        if run.suffixes not in self._undotted:
            if any(beginning and is_whole(hand) for beginning, hand in split_dotted(data).items()):
                raise SampleError("dotted_name")
            self._undotted.add(run.suffixes)
        run.sample_row = self._sample_row(run, list(members.items()))
        for number, image in enumerate(images):
            member = members[image.suffix]
            stored = memoryview(member.data)[image.begin : image.begin + image.size]
            encoded = stored_image(stored, image.is_text)
            if number in clip.bad_frame or not is_known_format(encoded):
                unknown = "undecodable_image", f"it begins with the bytes {bytes(encoded[:8]).hex(' ')}"
                reason, detail = clip.bad_frame.get(number, unknown)
                run.bad.append(Bad(f"{run.key}/{number}", reason, detail=detail))
                continue
            begin = member.offset - run.sample_row[0] + image.begin
            run.frame_rows.append((number, begin, image.size, crc32(encoded), image.is_text))

    def _sample_row(self, run: Run, members: list[tuple[str, Member]]) -> tuple[int, ...]:
        offset = members[0][1].begin
        holds_image = [is_image(suffix) for suffix, _ in members] + [False]  # the images are the first run of members
        first = holds_image.index(True)
        image_begin = members[first][1].begin - offset
        image_end = members[holds_image.index(False, first) - 1][1].end - offset
        note = os.pread(self.file, image_begin, offset) + os.pread(self.file, run.size - image_end, offset + image_end)
        return offset, key_hash(run.key), run.size, image_begin, image_end, crc32(note)

    def tables(self) -> Tables:
        """The rows of the healthy runs, in archive order."""
        healthy = [run for run in self.runs if not run.reason]
        frames = [(row, *frame) for row, run in enumerate(healthy) for frame in run.frame_rows]
        return Tables(np.array([run.sample_row for run in healthy], SAMPLE), np.array(frames, FRAME))


def _versions(members: list[tuple[str, Member]]) -> list[dict[str, bytes]]:
    """The samples in a run of members in which suffixes repeat: the n-th of each suffix belongs to the n-th sample."""
    versions: list[dict[str, bytes]] = []
    for suffix, member in members:
        version = next((each for each in versions if suffix not in each), None)
        if version is None:
            versions.append(version := {})
        version[suffix] = member.data
    return versions


def build_index(shard: Path) -> ShardIndex:
    """Read a shard from end to end and count its corrupt samples. Raises OSError if the file cannot be read."""
    stat = shard.stat()
    try:
        with shard.open("rb", buffering=1 << 22) as file:
            builder, packed = _Builder(file.fileno()), compression(file.peek(BLOCK)[:BLOCK])
            if not packed:
                builder.read(TarReader(file, stat.st_size))
    except OSError as error:  # the error of a failed read does not name the file
        raise OSError(error.errno, error.strerror or str(error), str(shard)) from error
    bad = judge(builder.runs, builder.regions)
    if not builder.runs:
        bad = bad[:1] or [Bad(f"{packed} file", "compressed") if packed else Bad("", "empty_shard")]
    tables = builder.tables()
    counts: Counter[str] = Counter()
    for each in bad:
        counts[each.reason] += each.num_frame
    return ShardIndex(
        shard=shard,
        shard_size=stat.st_size,
        shard_mtime_ns=stat.st_mtime_ns,
        num_sample=len(tables.sample),
        frame_number_count=np.bincount(tables.frame["frame"]).tolist(),
        bad_count=dict(sorted(counts.items())),
        bad=bad[:MAX_NAMED],
        is_lost=not builder.runs and bad[0].reason != "empty_shard",
        in_memory=tables,
    )


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
