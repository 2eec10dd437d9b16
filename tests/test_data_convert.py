"""Converted shards are plain webdataset shards and preserve the data set's annotations."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from src.data.convert.chunk import Request
from src.data.convert.realhands import convert_realhands
from src.data.loader import build_val_loader
from src.data.shards.build_index import build_index
from src.data.shards.writer import HandRecord, write_shard
from tests.data_shards import data_config, encode, hand_arrays, image_of
from tests.helpers import REALHANDS, ROOT

needs_realhands = pytest.mark.skipif(not REALHANDS.is_dir(), reason=f"{REALHANDS} is not there")


def record(number: int) -> HandRecord:
    arrays = {name: value[0] for name, value in hand_arrays(number, 1).items()}
    image = encode(image_of(number), "png")
    return HandRecord(f"{number:03d}", image, "png", "left", "test", hand_model="mano", flat_hand_mean=True, **arrays)


def test_shards_are_byte_identical_and_readable_by_webdataset(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for first, num in ((0, 2), (2, 2), (4, 1)):
            records = (record(number) for number in range(first, first + num))
            assert write_shard(records, tmp_path / name / f"{first:06d}.tar") == num
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["000000.tar", "000002.tar", "000004.tar"]
    shards = sorted((tmp_path / "a").iterdir())
    assert all(shard.read_bytes() == (tmp_path / "b" / shard.name).read_bytes() for shard in shards)
    for number, theirs in enumerate(wds.WebDataset([str(s) for s in shards], shardshuffle=False).decode("rgb8")):
        assert theirs["__key__"] == f"{number:03d}"
        assert (theirs["png"] == image_of(number)).all()
        assert (theirs["mano_pose.npy"] == hand_arrays(number, 1)["mano_pose"]).all()
        assert theirs["json"]["flat_hand_mean"] is True


@needs_realhands
def test_real_hands_are_preserved(tmp_path: Path) -> None:
    entries = json.loads((REALHANDS / "annotations.json").read_text(encoding="utf-8"))
    assert convert_realhands(Request(REALHANDS, tmp_path / "val", "all")).num_hand == len(entries)
    index = build_index(tmp_path / "val" / "000000.tar")
    assert (index.num_frame(), index.bad_count) == (len(entries), {})
    batches = list(build_val_loader(data_config(tmp_path, sample_per_device=32), "mano"))
    rows = [(b, i) for b in batches for i, position in enumerate(b.position.tolist()) if position >= 0]
    count = Counter((b.source[i], bool(b.is_right[i]), bool(b.has_intr[i])) for b, i in rows)
    assert count == Counter((e["source"], e["handedness"] == "right", e["focal"] is not None) for e in entries)
    for batch, i in rows:
        assert not batch.has_mano[i]
        assert bool(batch.joint_3d_valid[i].any()) == bool(batch.has_intr[i])
        if batch.has_intr[i]:
            projected = batch.joint_cam[i, :, :2] / batch.joint_cam[i, :, 2:].clamp(min=1)
            projected = projected * batch.patch_focal[i] + batch.patch_princpt[i]
            valid = (batch.joint_2d_valid[i] * batch.joint_3d_valid[i]) > 0
            assert (projected - batch.joint_patch[i])[valid].abs().max() < 0.2  # the annotations agree to 0.1 source px


@needs_realhands
def test_the_script_prints_a_summary(tmp_path: Path) -> None:
    def run(source: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "script/make_shards.py", "realhands", "--input", str(source)]
        return subprocess.run([*command, "--output", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)

    good, bad = run(REALHANDS), run(tmp_path)
    assert (good.returncode, bad.returncode) == (0, 2)
    assert "157 hands in 1 shards" in good.stdout
    assert "annotations.json" in bad.stderr
    assert np.all([p.suffix == ".tar" for p in (tmp_path / "out").iterdir()])
