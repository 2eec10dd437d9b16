"""The benchmark of the data layer at a small size, and the helpers that all benchmarks share."""

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
from script.benchmarks.measurement import (
    Figure,
    figure_table,
    median_figure,
    ratio_figure,
    seconds_per_call,
    write_figures,
)
from script.benchmarks.shards import noise_image
from tests.helpers import ROOT


def test_figures_and_their_bounds(tmp_path: Path) -> None:
    figures = [Figure("a", 5.0, "s", at_most=4.0), Figure("b", 5.0, "x/s", at_least=5.0), Figure("c", 12345.6, "MB")]
    assert [figure.holds for figure in figures] == [False, True, None]
    assert [figure.promise for figure in figures] == ["<= 4", ">= 5", ""]
    assert figure_table("title", figures).row_count == 3
    write_figures(tmp_path / "data.json", "data", figures)
    stored = json.loads((tmp_path / "data.json").read_text())
    assert [row["holds"] for row in stored["figures"]] == [False, True, None]
    assert "cores" in stored["machine"]


def test_medians_of_repetitions() -> None:
    assert median_figure("a", [3.0, 1.0, 2.0], "s", "x") == Figure("a", 2.0, "s", note="1 to 3 over 3; x")
    ratio = ratio_figure("a", [2.0, 9.0, 4.0], [1.0, 3.0, 1.0], at_most=3.0)
    assert ratio == Figure("a", 3.0, "", at_most=3.0, note="2 to 4 over 3"), "the median of ratios, not their ratio"
    with pytest.raises(ValueError, match="shorter"):
        ratio_figure("a", [1.0, 2.0], [1.0])


def test_functions_take_turns() -> None:
    calls: list[tuple[str, int]] = []
    seconds = seconds_per_call((lambda i: calls.append(("a", i)), lambda i: calls.append(("b", i))), 0.0, num=2)
    assert calls == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] * 3
    assert all(0 < s < 0.1 for s in seconds)


def test_all_figures_of_the_data_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "BIG_NUM_FRAME", 40_000)
    monkeypatch.setattr(data, "BIG_NUM_SHARD", 20)
    monkeypatch.setattr(data, "EFFORT", {"quick": (0.0, 32, 2, 300)})
    threads = cv2.getNumThreads()
    shown: list[str] = []
    try:
        figures = data.run(argparse.Namespace(quick=True), shown.append)
    finally:
        cv2.setNumThreads(threads)
    values = {figure.name: figure.value for figure in figures}
    assert all(np.isfinite(value) and value > 0 for value in values.values()), values
    for kind in ("jpg", "webp"):
        ratio = values[f"full sample, {kind}"] / values[f"decode only, {kind}"]
        assert values[f"full over decode, {kind}"] == pytest.approx(ratio)
        assert 0 < ratio < 1
    assert len(figures) == len(values) == 21
    assert shown


def test_images_compress_like_photographs() -> None:
    image = noise_image(3)
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    assert 60_000 < len(jpeg) < 120_000


def test_unknown_subject() -> None:
    command = [sys.executable, str(ROOT / "script" / "bench.py"), "nothing"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "data" in refused.stderr
