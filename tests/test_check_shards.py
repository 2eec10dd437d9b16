"""script/check_shards.py reports every kind of corruption by reason, shard and key, and draws the loader's output."""

from __future__ import annotations

import glob
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from script.check_shards import main as check_main
from script.make_shards import main as make_main
from src.data.check_shards import ShardReport, check_shard, check_shards, examples, merge
from src.data.contact_sheet import contact_sheet, spread_places
from src.data.shards.build_index import build_index, open_indexes
from tests.data_shards import lab_sample, native_sample, raw_members, write_shard, write_tar
from tests.helpers import ROOT


def nan_in(sample: dict[str, Any], name: str, value: float) -> dict[str, Any]:
    array = sample[name].copy()
    array[0, 0] = value
    return {**sample, name: array}


class Thing:
    """An object that a pickle may contain but that must never be built."""


def broken_samples() -> dict[str, dict[str, Any]]:
    """Reason -> a sample that is bad for that reason."""
    sample = native_sample(1)
    image = sample["png"]
    return {
        "wrong_shape": {**sample, "joint_img.npy": sample["joint_img.npy"][:, :20]},
        "wrong_dtype": {**sample, "joint_cam.npy": sample["joint_cam.npy"].astype(np.complex64)},
        "not_finite": nan_in(sample, "joint_cam.npy", np.nan),
        "bad_bbox": {**sample, "hand_bbox.npy": np.array([[5.0, 5, 5, 5]])},
        "bad_intrinsics": {**sample, "focal.npy": np.array([[-1.0, 5]])},
        "missing_member": {name: value for name, value in sample.items() if name != "png"},
        "bad_json": {**sample, "json": [1]},
        "undecodable_image": {**sample, "png": image[:60] + bytes(len(image) - 60)},
        "unsafe_pickle": {**lab_sample(1, 1, 1), "img_bytes.pickle": pickle.dumps([Thing()])},
        "bad_pickle": {**lab_sample(1, 1, 1), "img_bytes.pickle": pickle.dumps([b"x" * 500])[:-30]},
    }


@pytest.fixture(scope="module")
def corrupt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one shard for each kind of corruption, and `healthy.tar`."""
    root = tmp_path_factory.mktemp("corrupt")
    healthy = [native_sample(n) for n in range(4)]
    write_shard(root / "healthy.tar", healthy)
    for reason, sample in broken_samples().items():
        write_shard(root / f"{reason}.tar", [native_sample(0), {**sample, "__key__": f"bad_{reason}"}])
    objects = raw_members({**native_sample(5), "__key__": "bad_object_array"})
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    objects["bad_object_array.joint_img.npy"] = (
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickle.dumps([Thing()])
    )
    write_tar(root / "object_array.tar", objects)
    (root / "empty_shard.tar").write_bytes(bytes(10240))
    whole = write_shard(root / "truncated.tar", healthy).read_bytes()
    last = build_index(root / "truncated.tar").tables().sample[3]
    os.truncate(root / "truncated.tar", int(last["offset"] + last["image_begin"]) + 700)  # in the image's data
    (root / "zeroed.tar").write_bytes(whole[: int(last["offset"])] + bytes(int(last["size"])) + whole[-1024:])
    rot = write_shard(root / "crc_image.tar", healthy)
    (index,) = open_indexes([rot])
    stat, data, tables = rot.stat(), bytearray(whole), index.tables()
    data[int(tables.sample["offset"][2]) + int(tables.frame["begin"][2]) + 200] ^= 4
    rot.write_bytes(data)
    os.utime(rot, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return root


def report_of(corrupt: Path, name: str, decode: bool = False) -> ShardReport:
    return check_shard(corrupt / f"{name}.tar", decode=decode)


@pytest.mark.parametrize("reason", [*(r for r in broken_samples() if r != "undecodable_image"), "object_array"])
def test_bad_samples_are_reported(corrupt: Path, reason: str) -> None:
    report = report_of(corrupt, reason)
    assert report.bad_count == {reason: 1}
    assert report.bad[0].key.startswith(f"bad_{reason}")
    assert report.num_frame == (0 if reason == "object_array" else 1)
    assert examples([report], reason) == [f"{report.bad[0].key} in {corrupt / reason}.tar"]


def test_images_are_decoded_on_request(corrupt: Path) -> None:
    assert not report_of(corrupt, "undecodable_image").bad_count
    report = report_of(corrupt, "undecodable_image", decode=True)
    assert (report.bad_count, report.num_frame) == ({"undecodable_image": 1}, 1)
    assert report.bad[0].key == "bad_undecodable_image/0"


def test_corrupt_archives_are_reported(corrupt: Path) -> None:
    assert report_of(corrupt, "truncated").bad_count["truncated"] == 1
    assert report_of(corrupt, "truncated").num_frame == 3
    assert report_of(corrupt, "zeroed").bad_count == {"zeroed": 1}
    assert report_of(corrupt, "empty_shard").bad_count == {"empty_shard": 1}
    rot = report_of(corrupt, "crc_image")
    assert (rot.bad_count, rot.bad[0].key, rot.num_frame) == ({"crc_image": 1}, "00002/0", 3)
    gone = check_shard(corrupt / "gone.tar")
    assert gone.bad_count == {"unreadable": 1}
    assert not report_of(corrupt, "healthy", decode=True).bad_count


def test_a_stale_index_is_detected(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [native_sample(0)])
    open_indexes([shard])
    assert not check_shard(shard).has_stale_index
    write_shard(shard, [native_sample(0), native_sample(1)])
    report = check_shard(shard)
    assert (report.has_stale_index, report.num_frame, report.bad_count) == (True, 2, {})


def test_the_number_of_processes_does_not_matter(corrupt: Path) -> None:
    shards = sorted(corrupt.glob("*.tar"))
    seen: list[tuple[int, int]] = []
    one = check_shards(shards, decode=True, progress=lambda done, total: seen.append((done, total)))
    two = check_shards(shards, decode=True, num_process=2)
    assert one == two
    assert [report.shard for report in one] == shards
    assert seen[-1] == (sum(shard.stat().st_size for shard in shards),) * 2
    assert {*broken_samples(), "object_array", "truncated", "empty_shard", "crc_image"} <= merge(one)[0].keys()


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "script" / "check_shards.py", *arguments]
    environment = {**os.environ, "COLUMNS": "300"}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, check=False)


def test_output_and_exit_code_of_the_script(corrupt: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    good = check("healthy.tar", "--root", corrupt, "--sheet", sheet, "--num_hand", 3)
    assert good.returncode == 0, good.stderr
    assert "4 healthy frames, 0 corrupt" in good.stdout
    assert cv2.imread(str(sheet)).shape == (3 * 224, 3 * 224, 3)
    bad = check(corrupt, "--decode")
    assert bad.returncode == 1
    for reason in ("not_finite", "unsafe_pickle", "undecodable_image", "crc_image"):
        assert reason in bad.stdout
    assert f"bad_unsafe_pickle in {corrupt / 'unsafe_pickle.tar'}" in bad.stdout
    for wrong in (["pipe:touch x"], ["nothing/*"], ["healthy.tar", "--num_hand", 0], ["a.tar", "--sheet", "a.txt"], []):
        refused = check(*wrong, *(["--root", corrupt] if wrong else []))
        assert refused.returncode == 2
        assert refused.stderr
        assert "Traceback" not in refused.stderr


def test_paths_are_printed_unchanged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich would interpret `[x]` as markup and `:x:` as an emoji."""
    monkeypatch.setenv("COLUMNS", "300")
    folder = tmp_path / "[x]:x:"
    shard = write_shard(folder / "a.tar", [native_sample(0), nan_in(native_sample(1), "joint_cam.npy", np.nan)])
    open_indexes([shard])
    os.utime(shard, (0, 0))
    sheet = folder / "a.png"
    check_main([glob.escape(str(folder)), "--num_process", "1", "--num_hand", "1", "--sheet", str(sheet)])
    out = capsys.readouterr().out
    assert f"00001/0 in {shard}" in out
    assert f"the next run rebuilds them: {shard}\n" in out
    assert f"contact sheet: {sheet}\n" in out
    demo = ["demo", "--output", str(folder), "--train_sample", "1", "--val_sample", "1", "--num_process", "1"]
    assert make_main(demo) == 0
    assert f"2 rendered hands in {folder} (" in capsys.readouterr().out


def test_a_sheet_shows_each_hand_plain_and_augmented(tmp_path: Path) -> None:
    shards = [
        write_shard(tmp_path / "0.tar", [native_sample(n, 3) for n in range(4)]),
        write_shard(tmp_path / "1.tar", [lab_sample(n, 2, 2) for n in range(3)]),
    ]
    indexes = open_indexes(shards)
    places = spread_places(indexes, 6)
    assert [p.shard for p in places] == [0, 0, 0, 0, 1, 1]
    assert (places[0].row, places[-1].row) == (0, 5)
    assert len(spread_places(indexes, 100)) == 18
    sheet = contact_sheet(indexes, num_hand=6, num_column=4, side=64)
    assert sheet.shape == (2 * 3 * 64, 4 * 64, 3)
    assert (contact_sheet(indexes, num_hand=6, num_column=4, side=64) == sheet).all()
    plain, moved = sheet[:64], sheet[64:128]
    assert (plain != moved).mean() > 0.5
    assert (sheet[-64:, -128:] == 24).all()  # two hands in the second group
    (tmp_path / "2.tar").touch()
    assert contact_sheet(open_indexes([tmp_path / "2.tar"])) is None
