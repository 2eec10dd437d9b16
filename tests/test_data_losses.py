"""Whatever a shard loses is counted in frames, under a reason that says what to do."""

from __future__ import annotations

import ast
import gzip
import io
import os
import pickle
import re
import shutil
import subprocess
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from script.check_shards import main as check_main
from src.data.check_shards import check_shards, merge
from src.data.health import BadDataError, DataHealth
from src.data.loader import build_val_loader
from src.data.shards.build_index import build_index, open_indexes
from src.data.shards.errors import REASONS
from src.data.shards.reader import ShardReader
from src.data.shards.tar import BLOCK
from tests.data_shards import (
    data_config,
    lab_sample,
    native_sample,
    raw_members,
    write_shard,
    write_tar,
)
from tests.helpers import ROOT

LONG = 90  # frames of the clip that breaks
NUM = 4  # samples of one frame
Members = list[tuple[str, bytes]]


def members_of(*samples: dict[str, Any]) -> Members:
    return [member for sample in samples for member in raw_members(sample).items()]


def native(keys: list[str]) -> Members:
    return members_of(*({**native_sample(n), "__key__": key} for n, key in enumerate(keys)))


lab_clip = cache(lab_sample)  # encoding its images takes a second


def long_clip(**change: Any) -> dict[str, Any]:
    """A clip of LONG frames in the labs' format with changed members; None removes one."""
    sample = {**lab_clip(1, LONG, 1), "__key__": "long", **change}
    return {name: value for name, value in sample.items() if value is not None}


def write_members(path: Path, members: Members) -> Path:
    """A tar of members, whose names may repeat; bytes None makes a hard link to the first member."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.LNKTYPE, members[0][0]
            else:
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data or b""))
    return path


def suffix_of(member: tuple[str, bytes]) -> str:
    return member[0].partition(".")[2]


BROKEN = {
    "bad_json": {"handedness.json": b"{"},
    "bad_value": {"handedness.json": b'"both"'},
    "wrong_shape": {"focal.npy": np.full(LONG, 600.0)},
    "missing_member": {"img_bytes.pickle": None},
    "bad_pickle": {"img_bytes.pickle": pickle.dumps([b"image"] * LONG)[:-9], "imgs_path.json": None},
    "undecodable_image": {"img_bytes.pickle": pickle.dumps([b"nothing"] * LONG)},
    "bad_npy": {"joint_cam.npy": b"\x93NUMPY"},
    "not_finite": {"joint_cam.npy": np.full((LONG, 21, 3), np.nan)},
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_clip_counts_all_its_frames(tmp_path: Path, reason: str) -> None:
    clips = [lab_clip(0, 10, 1), long_clip(**BROKEN[reason])]
    index = build_index(write_shard(tmp_path / "a.tar", clips))
    assert (index.bad_count, index.num_frame()) == ({reason: LONG}, 10)


def test_one_unknown_image_costs_one_frame(tmp_path: Path) -> None:
    clip = long_clip()
    images = pickle.loads(clip["img_bytes.pickle"])
    images[3] = b"nothing"
    index = build_index(write_shard(tmp_path / "a.tar", [{**clip, "img_bytes.pickle": pickle.dumps(images)}]))
    assert (index.bad_count, index.num_frame()) == ({"undecodable_image": 1}, LONG - 1)
    assert [bad.key for bad in index.bad] == ["long/3"]


def test_the_value_that_costs_a_frame_is_named(tmp_path: Path) -> None:
    sample = native_sample(0, 3)
    sample["joint_cam.npy"][1, 4, 2] = np.nan
    sample["hand_bbox.npy"][2] = (50, 60, 40, 30)
    index = build_index(write_shard(tmp_path / "a.tar", [sample]))
    found = [(bad.key, bad.reason, bad.detail) for bad in index.bad]
    assert found == [
        (f"{sample['__key__']}/1", "not_finite", "joint_cam is or contains nan"),
        (f"{sample['__key__']}/2", "bad_bbox", "hand_bbox is [50.0, 60.0, 40.0, 30.0]"),
    ]


def test_index_log_limit_and_check_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = [{**lab_clip(0, 10, 1), "__key__": f"{n}"} for n in range(30)]
    (tmp_path / "val").mkdir()
    shard = write_shard(tmp_path / "val" / "0.tar", [*clips, long_clip(**BROKEN["bad_value"])])
    health = DataHealth([open_indexes([shard])], 0.01)
    assert health.counts() == health.indexed == {"bad_value": LONG} == merge(check_shards([shard]))[0]
    assert "90 of 390 frames" in health.summary()
    assert f"bad_value: long ({LONG} frames) in {shard}: handedness must be" in health.table()
    assert REASONS["bad_value"] in health.table()
    with pytest.raises(BadDataError, match="90 of 390 frames"):
        build_val_loader(data_config(tmp_path, stride=10), "mano")
    assert check_main([str(shard), "--num_process", "1"]) == 1
    assert "300 healthy frames, 90 corrupt" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["images", "array"])
@pytest.mark.parametrize("how", ["cut", "zeroed", "bad_header"])
def test_a_clip_next_to_corruption_counts_about_all_its_frames(tmp_path: Path, where: str, how: str) -> None:
    shard = write_shard(tmp_path / "a.tar", [lab_clip(0, 10, 1), long_clip(**{"imgs_path.json": None})])
    with tarfile.open(shard) as archive:
        member = archive.getmember("long.img_bytes.pickle" if where == "images" else "long.joint_cam.npy")
    data = shard.read_bytes()
    if how == "cut":
        shard.write_bytes(data[: member.offset_data + member.size // 2])
    else:
        block = {"zeroed": bytes(BLOCK), "bad_header": b"\xa5" * BLOCK}[how]
        shard.write_bytes(data[: member.offset] + block + data[member.offset + BLOCK :])
    index = build_index(shard)
    # the sample before may reach into a bad header, and is then counted as well
    lost = sum(index.bad_count.values()) - (10 - index.num_frame())
    assert 0.7 * LONG <= lost <= LONG + 1
    assert where == "images" or lost - (how != "cut") == LONG


def has_gnu_tar() -> bool:
    return bool(shutil.which("tar")) and b"GNU" in subprocess.run(["tar", "--version"], capture_output=True).stdout


def tar(command: str, folder: Path) -> None:
    subprocess.run(f"tar {command}", shell=True, cwd=folder, check=True)


@pytest.mark.skipif(not has_gnu_tar(), reason="needs GNU tar")
def test_archives_as_people_write_them(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name, data in native([f"{n:06d}" for n in range(NUM)]):
        (folder / name).write_bytes(data)

    def counted() -> tuple[int, dict[str, int]]:
        index = build_index(tmp_path / "x.tar")
        return index.num_frame(), index.bad_count

    tar("cf ../x.tar *.png *.json *.npy", folder)
    assert counted() == (0, {"scattered_members": NUM})
    tar("cf ../x.tar --sort=name .", folder)
    assert counted() == (NUM, {})
    (folder / "000001.json").write_bytes(b'{"handedness": "left", "flat_hand_mean": true}')
    tar("rf ../x.tar ./000001.json", folder)
    assert counted() == (NUM - 1, {"duplicate_member": 1})
    tar("cf ../x.tar --sort=name .", folder)
    tar("rf ../x.tar ./000003.json", folder)  # adjacent to the sample that it corrects
    assert counted() == (NUM - 1, {"duplicate_member": 1})
    (folder / "000002.png").unlink()
    os.link(folder / "000000.png", folder / "000002.png")
    tar("cf ../x.tar --sort=name .", folder)
    assert counted() == (NUM - 1, {"linked_member": 1})
    tar("cf ../x.tar --hard-dereference --sort=name .", folder)
    assert counted() == (NUM, {})
    os.truncate(folder / "000000.joint_cam.npy", 100_000)
    for form in ("gnu", "posix --sparse-version=0.0", "posix --sparse-version=1.0"):
        tar(f"cSf ../x.tar --hard-dereference --format={form} --sort=name .", folder)
        assert counted() == (NUM - 1, {"sparse_member": 1}), form


def test_scattered_repeated_and_linked_clips_count_their_frames(tmp_path: Path) -> None:
    def counted(members: Members) -> tuple[int, dict[str, int]]:
        index = build_index(write_members(tmp_path / "a.tar", members))
        return index.num_frame(), index.bad_count

    clips = members_of(native_sample(0, 3), native_sample(1, 5))
    assert counted(sorted(clips, key=suffix_of)) == (0, {"scattered_members": 8})
    first, second = members_of(lab_sample(0, 3, 1)), members_of(lab_sample(1, 5, 1))
    assert counted([*first, *second, *first[-1:]]) == (5, {"duplicate_member": 3})
    assert counted([*first, *second, *first]) == (11, {})  # as webdataset: both are complete
    assert counted([*first, *second, *first, *second, *first[:3]]) == (10, {"duplicate_member": 6})
    same = [(name.replace("00001", "00000"), data) for name, data in second]
    assert counted([*first, *same]) == (0, {"duplicate_member": 8})  # adjacent, with one key
    assert counted([*first, *second[:-1], ("clip/00001.mano_valid.npy", None)]) == (3, {"linked_member": 5})
    assert counted([*first, *second, ("clip/00001.txt", None)]) == (8, {})  # not read in any case


@pytest.mark.parametrize("name", ["img.{:04d}", "cam.2024.06.{:02d}", "v1.0_{:03d}", "img{}.rgb", "img{}."])
def test_dotted_names_count_every_sample(tmp_path: Path, name: str) -> None:
    keys = [*(f"{n:06d}" for n in range(NUM)), *(name.format(n) for n in range(7))]
    for members in (native(keys), [(f"folder.1/{name}", data) for name, data in native(keys)]):
        index = build_index(write_tar(tmp_path / "a.tar", dict(members)))
        assert (index.num_frame(), index.bad_count) == (NUM, {"dotted_name": 7})


def test_dotted_names_beside_a_sample_and_dotted_clips(tmp_path: Path) -> None:
    for second, lost in ((["img.2"], 2), (["img.v2"], 2), (["img.1", "img.2"], 3)):
        index = build_index(write_members(tmp_path / "a.tar", native(["0", "img", *second])))
        assert (index.num_frame(), index.bad_count["dotted_name"]) == (1, lost)
    clips = members_of(*({**lab_sample(n, 20, 1), "__key__": f"clip.{n}"} for n in range(3)))
    assert build_index(write_members(tmp_path / "a.tar", clips)).bad_count == {"dotted_name": 60}


@pytest.mark.parametrize("folder", ["", "./", "a/", "./a.b/"])
def test_files_that_macos_adds_change_nothing(tmp_path: Path, folder: str) -> None:
    """bsdtar writes `._name` before each file that has extended attributes."""
    members = [(f"{folder}{name}", data) for name, data in native([f"{n}" for n in range(NUM)])]
    plain = write_members(tmp_path / "plain.tar", members)
    junk = b"\0\5\x16\7Mac OS X" + bytes(90)
    added = [(f"{folder}.DS_Store", junk), ("__MACOSX/._0.png", junk)]
    for name, data in members:
        added += [(f"{folder}._{name[len(folder) :]}", junk), (name, data)]
    index = build_index(write_members(tmp_path / "mac.tar", added))
    assert index.bad_count == {}
    reader = ShardReader(index, 1)
    read = {reader.read(row)[0]: bytes(reader.read(row)[3]) for row in range(index.num_frame())}
    assert read == {s["__key__"]: s["png"] for s in wds.WebDataset(str(plain), shardshuffle=False)}


def test_a_shard_that_cannot_be_read_counts_as_much_as_the_others(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / f"{i}.tar", [native_sample(n) for n in range(10)]) for i in range(3)]
    shards[1].write_bytes(gzip.compress(shards[1].read_bytes()))
    assert build_index(shards[1]).bad_count == {"compressed": 1}
    (tmp_path / "3.tar").touch()
    health = DataHealth([open_indexes([*shards, tmp_path / "3.tar"])], 0.01)
    assert health.indexed == {"compressed": 10, "no_end_of_archive": 10}
    assert "20 of 40 frames (shards that cannot be read at all: 2)" in health.summary()
    with pytest.raises(BadDataError):
        health.check()
    assert merge(check_shards([*shards, tmp_path / "3.tar", tmp_path / "gone.tar"])) == (
        {"compressed": 10, "no_end_of_archive": 10, "unreadable": 10},
        3,
    )
    named_like_gzip = write_members(tmp_path / "4.tar", native(["BZh9"]))
    assert build_index(named_like_gzip).num_frame() == 1


def test_padding_of_validation_batches_does_not_count_as_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "val" / "0.tar", [native_sample(n) for n in range(6)])
    loader = build_val_loader(data_config(tmp_path), "mano")
    assert len(list(loader)) == 2
    assert loader.health.num_read == 6


def test_every_reason_is_documented_with_what_to_do() -> None:
    text = (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8")
    table = text[text.index("| reason | meaning |") : text.index("EXIF orientation is ignored")]
    assert dict(re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", table, re.MULTILINE)) == REASONS
    files = [*ROOT.glob("src/data/shards/*.py"), *ROOT.glob("src/data/*.py"), ROOT / "src/utils/restricted_pickle.py"]
    calls = [node for path in files for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = {"SampleError": 0, "PickleError": 0, "Bad": 1, "CorruptRegion": 1}
    used = {
        call.args[named[call.func.id]].value
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in named and len(call.args) > named[call.func.id]
        if isinstance(call.args[named[call.func.id]], ast.Constant)
    }
    assert len(used) > 10
    assert used <= REASONS.keys()
