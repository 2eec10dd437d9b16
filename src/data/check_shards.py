"""Reads shards from end to end and reports corrupt samples by reason, with shard and key.

The result depends on the bytes alone, so a stored index cannot hide corruption. Where an up-to-date index is stored,
frames whose bytes no longer match its crc32 are reported as well: they have changed since it was built. A sample of
the healthy hands is checked for plausibility (src/data/plausibility).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from src.data.image import decode_image
from src.data.plausibility.report import check_hands_of_shard
from src.data.plausibility.tally import Tallies
from src.data.sample import make_sample
from src.data.shards.build_index import build_index, find_index, index_places
from src.data.shards.errors import detail_of, reason_of
from src.data.shards.index import MAX_NAMED, Bad, ShardIndex
from src.data.shards.losses import count_lost
from src.data.shards.processes import map_processes, worker_context
from src.data.shards.reader import ShardReader


@dataclass
class ShardReport:
    """The result of checking one shard."""

    shard: Path
    size: int = 0  # bytes
    num_sample: int = 0
    num_frame: int = 0  # healthy frames
    bad_count: Counter[str] = field(default_factory=Counter)  # reason -> frames
    bad: list[Bad] = field(default_factory=list)  # the first MAX_NAMED of them
    is_lost: bool = False  # nothing in it can be read
    has_stale_index: bool = False  # a stored index is out of date; the next run rebuilds it
    tallies: Tallies = field(default_factory=dict)  # implausible hands
    not_compared: list[str] = field(default_factory=list)  # hand models whose MANO parameters were not compared

    def add(self, bad: Bad) -> None:
        """Count a frame that was healthy so far as bad."""
        self.bad_count[bad.reason] += bad.num_frame
        self.num_frame -= bad.num_frame
        if len(self.bad) < MAX_NAMED:
            self.bad.append(bad)


def check_shards(
    shards: Sequence[Path],
    decode: bool = False,
    index_dir: str | Path | None = None,
    num_process: int = 1,
    progress: Callable[[int, int], None] | None = None,
    mano: Path | None = None,
) -> list[ShardReport]:
    """Check every shard; returns the reports in the order of `shards`.

    Args:
        decode: also decode every image and check its box against its size.
        index_dir: as DATA.index_dir, to find the stored indexes.
        num_process: how many shards are read at once.
        progress: called with (bytes done, bytes in total) after each shard.
        mano: MANO file that the joints are compared with.

    Raises:
        ValueError: the MANO file cannot be used.
    """
    sizes = {shard: shard.stat().st_size if shard.is_file() else 0 for shard in shards}
    reports: dict[Path, ShardReport] = {}
    work = [(shard, decode, index_dir, mano) for shard in shards]
    for report in map_processes(check_shard, work, num_process, worker_context()):
        reports[report.shard] = report
        if progress:
            progress(sum(sizes[done] for done in reports), sum(sizes.values()))
    return [reports[shard] for shard in shards]


def check_shard(
    shard: Path, decode: bool = False, index_dir: str | Path | None = None, mano: Path | None = None
) -> ShardReport:
    """Read one shard from end to end. A file that cannot be read is reported as `unreadable`."""
    try:
        index = build_index(shard)
        report = ShardReport(
            shard,
            index.shard_size,
            index.num_sample,
            index.num_frame(),
            Counter(index.bad_count),
            list(index.bad),
            index.is_lost,
        )
        _compare(report, index, index_dir)
        if decode:
            _decode(report, index)
        report.tallies, report.not_compared = check_hands_of_shard(index, mano)
    except OSError as error:
        bad = Bad(str(error.strerror), "unreadable")
        report = ShardReport(shard, bad_count=Counter(unreadable=1), bad=[bad], is_lost=True)
    return report


def _compare(report: ShardReport, index: ShardIndex, index_dir: str | Path | None) -> None:
    """Report frames whose bytes have changed since the stored index was built."""
    stored = find_index(index.shard, index_dir)
    if stored is None:
        report.has_stale_index = any(place.is_file() for place in index_places(index.shard, index_dir))
        return
    now, then = index.tables(), stored.tables()
    now_rows = _checksums(now.sample, now.frame)
    then_rows = _checksums(then.sample, then.frame)
    reader = ShardReader(stored, stride=1)
    for row, (place, (image, note)) in enumerate(then_rows.items()):
        if place in now_rows and now_rows[place] != (image, note):
            report.add(Bad(reader.describe(row), "crc_image" if now_rows[place][0] != image else "crc_note"))
    reader.close()


def _checksums(sample: np.ndarray, frame: np.ndarray) -> dict[tuple[int, int], tuple[int, int]]:
    """(offset of the sample, frame number) -> (crc32 of the image, crc32 of the annotations)."""
    owner = sample[frame["sample"]]
    places = zip(owner["offset"].tolist(), frame["frame"].tolist())
    return dict(zip(places, zip(frame["crc"].tolist(), owner["note_crc"].tolist())))


def _decode(report: ShardReport, index: ShardIndex) -> None:
    reader = ShardReader(index, stride=1)
    for row in range(index.num_frame()):
        try:
            key, clip, number, data = reader.read(row)
            make_sample(clip, number, decode_image(data), key, clip.hand_model)
        except OSError:
            raise
        except Exception as error:
            report.add(Bad(reader.describe(row), reason_of(error), detail=detail_of(error)))
    reader.close()


def merge(reports: Sequence[ShardReport]) -> tuple[Counter[str], int]:
    """Lost frames by reason over all shards, and how many shards cannot be read at all (`count_lost`)."""
    return count_lost((report.num_frame, report.bad_count, report.is_lost) for report in reports)


def details(reports: Sequence[ShardReport], reason: str, num: int = 3) -> list[str]:
    """The most frequent details of a reason, such as the value that was found and those that are read."""
    found = Counter(bad.detail for report in reports for bad in report.bad if bad.reason == reason and bad.detail)
    return [detail for detail, _ in found.most_common(num)]


def examples(reports: Sequence[ShardReport], reason: str, num: int = 3) -> list[str]:
    """The first `num` examples of a reason as "<key> in <shard>", taken from the shards in turn."""
    by_shard = [[bad for bad in report.bad if bad.reason == reason] for report in reports]
    found = [
        (turn, f"{bad} in {report.shard}")
        for report, of_shard in zip(reports, by_shard)
        for turn, bad in enumerate(of_shard[:num])
    ]
    return [text for _, text in sorted(found, key=lambda item: item[0])[:num]]
