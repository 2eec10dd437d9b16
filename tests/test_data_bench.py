"""The benchmark of the data layer measures what it says, small enough for every day."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from script.benchmarks import data
from script.benchmarks.measurement import Figure, figure_json, figure_table, seconds_per_call
from script.benchmarks.shards import picture
from tests.helpers import ROOT


def test_a_figure_knows_its_promise() -> None:
    figures = [Figure("a", 5.0, "s", at_most=4.0), Figure("b", 5.0, "x/s", at_least=5.0), Figure("c", 12345.6, "MB")]
    assert [figure.holds for figure in figures] == [False, True, None]
    assert [figure.promise for figure in figures] == ["<= 4", ">= 5", ""]
    assert figure_table("title", figures).row_count == 3
    stored = json.loads(json.dumps(figure_json("data", figures)))
    assert [row["holds"] for row in stored["figures"]] == [False, True, None]
    assert "cores" in stored["machine"]


def test_functions_take_turns() -> None:
    calls: list[tuple[str, int]] = []
    seconds = seconds_per_call((lambda i: calls.append(("a", i)), lambda i: calls.append(("b", i))), 0.0, num=2)
    assert calls == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] * 3
    assert all(0 < s < 0.1 for s in seconds)


def test_every_figure_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "BIG_NUM_FRAME", 40_000)
    monkeypatch.setattr(data, "BIG_NUM_SHARD", 20)
    monkeypatch.setattr(data, "EFFORT", {"quick": data.Effort(0.0, 32, 300, 2), "full": data.Effort(0.0, 32, 300, 2)})
    threads = cv2.getNumThreads()
    said: list[str] = []
    try:
        figures = data.run(argparse.Namespace(quick=True, seed=0), said.append)
    finally:
        cv2.setNumThreads(threads)
    values = {figure.name: figure.value for figure in figures}
    assert all(np.isfinite(value) and value > 0 for value in values.values()), values
    for kind in ("jpg", "webp"):
        ratio = values[f"full sample, {kind}"] / values[f"decode only, {kind}"]
        assert values[f"full over decode, {kind}"] == pytest.approx(ratio)
        assert 0 < ratio < 1
    assert len(figures) == len(values) == 17
    assert said


def test_the_pictures_are_as_heavy_as_photographs() -> None:
    image = picture(3)
    assert (image == picture(3)).all()
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    assert 60_000 < len(jpeg) < 120_000


def test_the_script_knows_its_subjects() -> None:
    command = [sys.executable, str(ROOT / "script" / "bench.py"), "nothing"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "data" in refused.stderr
