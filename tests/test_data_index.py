"""Corruption in a shard is found and counted without losing other samples; indexes are stored and rebuilt on change."""

from __future__ import annotations

import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from src.data.dataset import Fetched, HandDataset
from src.data.health import BadDataError, DataHealth
from src.data.order.plan import MixedPlan, SourcePlan, validation_plan
from src.data.shards.build_index import build_index, open_indexes
from src.data.shards.index import cache_dir, index_path, load_index
from src.data.shards.reader import ShardReader
from src.data.shards.tar import BLOCK, TarReader
from tests.data_shards import native_sample, raw_members, write_shard, write_tar

NUM = 8


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shard(tmp_path / "a.tar", [native_sample(number) for number in range(NUM)])


def spans(path: Path) -> list[tuple[int, int]]:
    """(begin, end) of every sample in a healthy shard."""
    return [(int(s["offset"]), int(s["offset"] + s["size"])) for s in build_index(path).tables().sample]


def keys(path: Path) -> list[str]:
    index = build_index(path)
    reader = ShardReader(index, 1)
    return [reader.read(row)[0] for row in range(index.num_frame())]


@pytest.mark.parametrize(
    ("where", "lost"),
    [
        (lambda begin, end: begin, 0),  # between two samples: every sample before is complete
        (lambda begin, end: begin + 100, 0),  # in the first header
        (lambda begin, end: begin + BLOCK + 10, 1),  # in data
        (lambda begin, end: end - BLOCK - 7, 1),  # in the last member
    ],
)
def test_samples_before_a_truncation_are_kept(shard: Path, where, lost: int) -> None:
    begin, end = spans(shard)[5]
    os.truncate(shard, where(begin, end))
    assert keys(shard) == [f"{n:05d}" for n in range(5)]
    bad = build_index(shard).bad_count
    assert bad.keys() <= {"truncated", "incomplete", "no_end_of_archive"}
    assert sum(bad.values()) >= 1


def test_truncation_between_two_members_is_detected(shard: Path) -> None:
    with shard.open("rb") as file:
        ends = [member.end for member in TarReader(file, shard.stat().st_size)]
    per_sample = len(ends) // NUM
    os.truncate(shard, ends[5 * per_sample + per_sample - 2])  # cuts one member of sample 5, which would be optional
    assert keys(shard) == [f"{n:05d}" for n in range(5)]
    assert build_index(shard).bad_count == {"incomplete": 1, "no_end_of_archive": 1}


@pytest.mark.parametrize("fill", [b"\0", b"\xa5"])
def test_reading_continues_after_a_corrupt_region(shard: Path, fill: bytes) -> None:
    all_spans = spans(shard)
    begin, end = all_spans[2][0] + 3 * BLOCK, all_spans[3][0] + 2 * BLOCK
    data = bytearray(shard.read_bytes())
    data[begin:end] = fill * (end - begin)
    shard.write_bytes(data)
    assert keys(shard) == [f"{n:05d}" for n in (0, 1, 4, 5, 6, 7)]
    bad = build_index(shard).bad_count
    assert "zeroed" in bad or "bad_header" in bad
    assert bad["incomplete"] == 2


@pytest.mark.parametrize("how", ["zero", "garbage", "cut"])
def test_corruption_that_starts_in_the_last_member_of_a_sample(shard: Path, how: str) -> None:
    """The member keeps its length, so only the invalid header after it shows that its data is corrupt."""
    end = spans(shard)[2][1]
    data = bytearray(shard.read_bytes())
    rest = data[end : end + BLOCK]  # the next header
    corrupt = {"zero": bytes(2 * BLOCK), "garbage": b"\xa5" * (2 * BLOCK), "cut": rest}[how]
    data[end - BLOCK : end + BLOCK] = corrupt
    shard.write_bytes(data)
    assert keys(shard) == [f"{n:05d}" for n in (0, 1, 4, 5, 6, 7)]
    bad = build_index(shard).bad_count
    assert bad["incomplete"] + bad.get("missing_member", 0) == 2
    assert bad["zeroed" if how == "zero" else "bad_header"] == 1


@pytest.mark.parametrize("record", [BLOCK, 20 * BLOCK, 512 * BLOCK, 2048 * BLOCK])  # tar -b; 20 is the default
def test_zeros_that_pad_the_last_record_are_not_corrupt(shard: Path, record: int) -> None:
    content = spans(shard)[-1][1] + 2 * BLOCK
    os.truncate(shard, content + -content % record)
    assert (build_index(shard).num_frame(), build_index(shard).bad_count) == (NUM, {})
    os.truncate(shard, content + -content % record + 2048 * BLOCK)
    assert build_index(shard).bad_count.keys() == {"zeroed"}


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_frames_are_described_by_key_whatever_its_length_and_characters(tmp_path: Path, tar_format: int) -> None:
    key = f"手/{'k' * 120}\n\x1b[31m\udce4"
    sample = {**native_sample(0), "__key__": key}
    index = build_index(write_tar(tmp_path / "a.tar", raw_members(sample), tar_format))
    reader = ShardReader(index, 1)
    assert reader.describe(0) == f"手/{'k' * 120}\\n\\x1b[31m\\udce4/0"
    assert reader.read(0)[0] == key


def test_empty_shards_and_files_that_are_not_shards(tmp_path: Path) -> None:
    (tmp_path / "empty.tar").touch()
    (tmp_path / "text.tar").write_bytes(b"no archive" * 400)
    write_shard(tmp_path / "none.tar", [])
    for name in ("empty", "text", "none"):
        index = build_index(tmp_path / f"{name}.tar")
        assert index.num_frame() == 0
        assert sum(index.bad_count.values()) >= 1


def dataset_of(path: Path) -> HandDataset:
    (index,) = open_indexes([path])
    plan = MixedPlan([SourcePlan([index], 1, 0)], [1.0], 0)
    return HandDataset([[index]], plan, stride=1, hand_model="mano", img_size=16, expansion_ratio=1.5)


def test_frames_corrupted_after_indexing_are_replaced_and_counted(shard: Path) -> None:
    healthy = dataset_of(shard).__getitems__(range(NUM))
    stat = shard.stat()
    data = bytearray(shard.read_bytes())
    data[spans(shard)[4][0] + int(build_index(shard).tables().frame["begin"][4]) + 50] ^= 1  # in the image
    data[spans(shard)[6][0] + BLOCK + 3] ^= 1  # in the first array
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    first, again = (dataset_of(shard).__getitems__(range(NUM)) for _ in range(2))
    assert sorted({bad.reason for bad in first.bad}) == ["crc_image", "crc_note"]
    assert {bad.key for bad in first.bad} == {"00004/0", "00006/0"}
    assert first.batch.key == again.batch.key
    assert (first.batch.patch == again.batch.patch).all()
    assert not {"00004/0", "00006/0"} & set(first.batch.key)
    kept = [(a, b) for a, b in zip(healthy.batch.key, first.batch.key) if a not in ("00004/0", "00006/0")]
    assert all(a == b for a, b in kept)
    assert len(kept) == NUM - 2


def test_validation_pads_rows_of_unreadable_frames(shard: Path) -> None:
    (index,) = open_indexes([shard])
    plan = validation_plan([index], 1, 42, None)
    dataset = HandDataset([[index]], plan, stride=1, hand_model="mano", img_size=16, expansion_ratio=1.5)
    assert sorted(dataset.__getitems__(range(NUM)).batch.key) == [f"{n:05d}/0" for n in range(NUM)]
    shard.unlink()
    dataset = HandDataset([[index]], plan, stride=1, hand_model="mano", img_size=16, expansion_ratio=1.5)
    fetched = dataset.__getitems__(range(2))
    assert fetched.batch.position.tolist() == [-1, -1]
    assert [bad.reason for bad in fetched.bad] == ["unreadable"] * 2


def test_validation_pads_a_row_whose_image_does_not_decode(tmp_path: Path) -> None:
    """Its labels are filled before the image is decoded, and must not remain."""
    png = native_sample(2)["png"]
    bad = {**native_sample(2), "png": png[:60] + bytes(len(png) - 60)}
    (index,) = open_indexes([write_shard(tmp_path / "a.tar", [native_sample(0), native_sample(1), bad])])
    plan = validation_plan([index], 1, 42, None)
    dataset = HandDataset([[index]], plan, stride=1, hand_model="mano", img_size=16, expansion_ratio=1.5)
    fetched = dataset.__getitems__([0, 1, 2, -1])
    assert [(bad.key, bad.reason) for bad in fetched.bad] == [("00002/0", "undecodable_image")]
    assert sorted(fetched.batch.key) == ["", "", "00000/0", "00001/0"]
    failed = fetched.batch.key.index("")
    for name, value in vars(fetched.batch).items():
        assert np.array_equal(value[failed], value[3]), name


def test_too_many_corrupt_samples_stop_the_run(shard: Path) -> None:
    os.truncate(shard, spans(shard)[6][0])
    index = build_index(shard)
    DataHealth([[index]], 0.5).check()
    with pytest.raises(BadDataError, match="no_end_of_archive") as caught:
        DataHealth([[index]], 0.01).check()
    assert "DATA.max_bad_fraction=0.01" in str(caught.value)


def test_an_index_is_rebuilt_when_its_shard_changes(shard: Path) -> None:
    (first,) = open_indexes([shard])
    stored = index_path(shard)
    before = stored.stat().st_mtime_ns
    (again,) = open_indexes([shard])
    assert stored.stat().st_mtime_ns == before
    assert (again.tables().frame == first.tables().frame).all()
    write_shard(shard, [native_sample(number) for number in range(3)])
    assert load_index(shard, stored) is None
    (new,) = open_indexes([shard])
    assert new.num_frame() == 3
    stored.write_bytes(stored.read_bytes()[:-5])
    assert load_index(shard, stored) is None
    assert open_indexes([shard])[0].num_frame() == 3


def test_builders_may_race_and_folders_may_be_read_only(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor(8) as pool:
        indexes = list(pool.map(lambda _: open_indexes([shard])[0], range(8)))
    assert {index.num_frame() for index in indexes} == {NUM}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.index"]
    index_path(shard).unlink()
    index_path(shard).mkdir()  # simulates a read-only folder, since root can write anywhere
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (index,) = open_indexes([shard])
    assert index.stored is not None
    assert index.stored[0].parent == cache_dir()
    (own,) = open_indexes([shard], tmp_path / "own")
    assert own.stored is not None
    assert own.stored[0].parent == tmp_path / "own"


def test_stride_selects_frames_of_each_clip(tmp_path: Path) -> None:
    index = build_index(write_shard(tmp_path / "a.tar", [native_sample(n, t) for n, t in enumerate((5, 3, 1, 6))]))
    for stride in (1, 2, 4):
        rows = index.tables().rows(stride)
        numbers = index.tables().frame["frame"] if rows is None else index.tables().frame["frame"][rows]
        assert len(numbers) == index.num_frame(stride) == sum(-(-t // stride) for t in (5, 3, 1, 6))
        assert (numbers % stride == 0).all()


def test_indexes_are_built_by_several_processes(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / f"{i}.tar", [native_sample(i)]) for i in range(3)]
    seen: list[tuple[int, int]] = []
    indexes = open_indexes(shards, num_process=2, progress=lambda done, total: seen.append((done, total)))
    assert [index.shard for index in indexes] == shards
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert all(np.array_equal(i.tables().frame, build_index(s).tables().frame) for i, s in zip(indexes, shards))


def test_a_shard_that_is_rewritten_while_being_read(shard: Path, tmp_path: Path) -> None:
    other = write_shard(tmp_path / "b.tar", [native_sample(100 + number) for number in range(4 * NUM)])
    indexes = open_indexes([shard, other])
    write_shard(shard, [native_sample(50 + number, kind="webp") for number in range(NUM)])
    plan = MixedPlan([SourcePlan(indexes, 1, 0)], [1.0], 0)

    def fetch() -> Fetched:
        dataset = HandDataset([indexes], plan, stride=1, hand_model="mano", img_size=16, expansion_ratio=1.5)
        return dataset.__getitems__(range(5 * NUM))

    first, again = fetch(), fetch()
    assert {(bad.reason, bad.shard) for bad in first.bad} == {("stale_index", str(shard))}
    assert len({bad.position for bad in first.bad}) == NUM
    assert all(bad.key for bad in first.bad)
    assert first.batch.key == again.batch.key
    assert all(int(key[:5]) >= 100 for key in first.batch.key)
    assert first.bad == again.bad
