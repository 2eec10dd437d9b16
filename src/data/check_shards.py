"""Reads shards from end to end and reports what is damaged in them, by reason, with shard and key.

Works on the bytes alone, so nothing that an index remembers can hide damage; where an up-to-date index is stored, it is
used the other way round: frames whose bytes no longer have its crc32 have rotted since.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from src.data.image import decode_image
from src.data.sample import make_sample
from src.data.shards.build_index import build_index, index_places, worker_context
from src.data.shards.errors import reason_of
from src.data.shards.index import MAX_NAMED, Bad, ShardIndex, load_index
from src.data.shards.reader import ShardReader
from src.utils.text import printable

STALE_INDEX = "stale_index"


@dataclass
class ShardReport:
    """What is known about one shard after reading it."""

    shard: Path
    size: int = 0  # bytes
    num_sample: int = 0
    num_frame: int = 0  # healthy ones
    bad_count: Counter[str] = field(default_factory=Counter)  # reason -> frames
    bad: list[Bad] = field(default_factory=list)  # the first of them by key
    has_stale_index: bool = False  # its index is older than the shard; the next run makes it anew

    def add(self, bad: Bad) -> None:
        """Count a frame that the index of the same bytes took for healthy."""
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
) -> list[ShardReport]:
    """Check every shard; damage of any kind ends up in the reports, in the order of `shards`.

    Args:
        decode: also decode every image, and check its box against its size.
        index_dir: as DATA.index_dir, to find the stored indexes.
        num_process: how many shards are read at once.
        progress: called with (bytes done, bytes in all) after each shard.
    """
    check = partial(check_shard, decode=decode, index_dir=index_dir)
    reports: dict[Path, ShardReport] = {}
    sizes = {shard: _size(shard) for shard in shards}
    total = sum(sizes.values())

    def take(report: ShardReport) -> None:
        reports[report.shard] = report
        if progress:
            progress(sum(sizes[shard] for shard in reports), total)

    if min(num_process, len(shards)) <= 1:
        for shard in shards:
            take(check(shard))
    else:
        with ProcessPoolExecutor(num_process, worker_context()) as pool:
            for future in as_completed([pool.submit(check, shard) for shard in shards]):
                take(future.result())
    return [reports[shard] for shard in shards]


def _size(shard: Path) -> int:
    try:
        return shard.stat().st_size
    except OSError:
        return 0


def check_shard(shard: Path, decode: bool = False, index_dir: str | Path | None = None) -> ShardReport:
    """Read one shard from end to end. A file that cannot be read is reported, too (`unreadable`)."""
    try:
        index = build_index(shard)
        report = ShardReport(
            shard, index.shard_size, index.num_sample, index.num_frame(), Counter(index.bad_count), list(index.bad)
        )
        _compare(report, index, index_dir)
        if decode:
            _decode(report, index)
    except OSError as error:
        report = ShardReport(shard, bad_count=Counter(unreadable=1), bad=[Bad(str(error.strerror), "unreadable")])
    return report


def _compare(report: ShardReport, index: ShardIndex, index_dir: str | Path | None) -> None:
    """Report frames whose bytes have changed since the stored index was made."""
    places = [place for place in index_places(index.shard, index_dir) if place.is_file()]
    stored = next((found for place in places if (found := load_index(index.shard, place)) is not None), None)
    if stored is None:
        report.has_stale_index = bool(places)
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
    """(sample's offset, frame number) -> (crc32 of the image, crc32 of the annotations)."""
    owner = sample[frame["sample"]]
    places = zip(owner["offset"].tolist(), frame["frame"].tolist())
    return dict(zip(places, zip(frame["crc"].tolist(), owner["note_crc"].tolist())))


def _decode(report: ShardReport, index: ShardIndex) -> None:
    """Decode every frame that has passed so far."""
    reader = ShardReader(index, stride=1)
    for row in range(index.num_frame()):
        try:
            key, clip, number, data = reader.read(row)
            make_sample(clip, number, decode_image(data), key, clip.hand_model)
        except OSError:
            raise
        except Exception as error:
            report.add(Bad(reader.describe(row), reason_of(error)))
    reader.close()


def merge(reports: Sequence[ShardReport]) -> Counter[str]:
    """Bad frames by reason over all shards."""
    return sum((report.bad_count for report in reports), Counter())


def examples(reports: Sequence[ShardReport], reason: str, num: int = 3) -> list[str]:
    """The first few `key in shard` of one reason, one shard after the other in turn."""
    by_shard = [[bad.key for bad in report.bad if bad.reason == reason] for report in reports]
    found = [
        (turn, f"{printable(key) or '(no key)'} in {report.shard}")
        for report, keys in zip(reports, by_shard)
        for turn, key in enumerate(keys[:num])
    ]
    return [text for _, text in sorted(found, key=lambda item: item[0])[:num]]
