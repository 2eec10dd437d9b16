"""`script/bench.py mediapipe` with a fake detector: matching, metrics, figures."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from script.benchmarks import mediapipe_hands
from script.benchmarks.mediapipe_hands import Detection, match, measure_hand
from src.batch import Sample
from tests.data_shards import native_sample, write_shard
from tests.helpers import REALHANDS
from tests.test_bench import measure


def sample(is_right: bool = True) -> Sample:
    rng = np.random.default_rng(2)
    joint_img = rng.uniform(100, 300, (21, 2)).astype(np.float32)
    joint_img[0], joint_img[1] = (100, 150), (300, 250)  # the box is 200 wide
    one = np.ones(21, np.float32)
    return Sample(
        "k/0", "a", np.zeros((400, 400, 3), np.uint8), is_right, np.array([100, 100, 300, 300]), joint_img, one,
        rng.normal([0, 0, 500], 40, (21, 3)).astype(np.float32), one, np.zeros(48), np.zeros(10), False, True,
        np.full(2, 400.0), np.full(2, 199.5), True,
    )  # fmt: skip


def at(hand: Sample, offset: float) -> Detection:
    """The hand itself, `offset` px to the right; in 3D rotated, scaled and moved, which PA-MPJPE ignores."""
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    return Detection(hand.joint_img + np.array([offset, 0.0]), hand.joint_cam @ turn * 0.8 + 7.0)


@pytest.mark.parametrize("is_right", [True, False])
def test_nearest_detection_is_measured_in_the_source_image(is_right: bool) -> None:
    """18 px of 200 are 0.09 of the box; neither hand is mirrored."""
    hand = sample(is_right)
    values = measure_hand(hand, [at(hand, 60.0), at(hand, 18.0)])
    got = {name: values[name].total.sum() / values[name].count.sum() for name in mediapipe_hands.SHOWN}
    assert got == pytest.approx(
        {"found": 1, "pck05_2d": 0, "pck10_2d": 1, "pck15_2d": 1, "pck20_2d": 1, "auc_2d": 0.55, "mpjpe_pa": 0},
        abs=5e-3,
    )


def test_missed_hand_is_wrong_in_2d_and_excluded_in_3d() -> None:
    hand = sample()
    for detections in ([], [at(hand, 201.0)]):
        values = measure_hand(hand, detections)
        assert [values[name].total.sum() for name in mediapipe_hands.SHOWN] == [0.0] * 7
        assert [values[name].count.sum() for name in ("found", "pck10_2d", "auc_2d", "mpjpe_pa")] == [1, 21, 21, 0]


def test_a_hand_with_one_known_joint_is_neither_found_nor_missed() -> None:
    """It has no box, which the matching distance and 2D PCK are relative to."""
    hand = replace(sample(), joint_2d_valid=np.eye(21, dtype=np.float32)[0])
    values = measure_hand(hand, [at(hand, 1.0)])
    assert [values[name].count.sum() for name in mediapipe_hands.SHOWN] == [0.0] * 7


def test_matching_uses_valid_joints_only() -> None:
    hand = sample()
    valid = np.ones(21, np.float32)
    valid[10:] = 0
    place = hand.joint_img.copy()
    place[10:] = 1e6
    hand = replace(hand, joint_2d_valid=valid, joint_img=place)
    near = Detection(np.where(valid[:, None] > 0, place + 3, 0), np.zeros((21, 3)))
    assert match(hand, [near]) is near
    assert measure_hand(hand, [near])["pck05_2d"].count.tolist() == [[10]]
    assert match(replace(hand, joint_2d_valid=np.zeros(21, np.float32)), [near]) is None


def test_figures_over_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hand counts once, with its source, also a missed one; the halves add up."""
    for source in ("x", "y"):
        numbers = range(10) if source == "x" else range(10, 20)
        write_shard(tmp_path / "val" / f"{source}.tar", [native_sample(n, data_source=source) for n in numbers])
    seen = []

    def load_detector(confidence: float, pad: float):
        assert (confidence, pad) == (0.5, 0.1)
        return lambda image: seen.append(image.shape) or []

    monkeypatch.setattr(mediapipe_hands, "load_detector", load_detector)
    arguments = [f"DATA.root={tmp_path}", "DATA.val.source=[val/*]", "--num_bootstrap", "100", "--pad", "0.1"]
    figures = measure("mediapipe", *arguments)
    assert set(seen) == {(64, 96, 3)}
    assert len(seen) == 20
    assert (figures["all: found"].value, figures["all: found"].note) == (0.0, "[0, 0] of 20 hands")
    assert "of 10 hands" in figures["source x: pck10_2d"].note
    assert "all: mpjpe_pa" not in figures
    num = {half: measure("mediapipe", *arguments, "--half", half)["all: found"].note for half in "ab"}
    assert sum(int(note.split()[-2]) for note in num.values()) == 20


@pytest.mark.skipif(importlib.util.find_spec("mediapipe") is not None, reason="MediaPipe is installed")
def test_missing_mediapipe_prints_the_install_command() -> None:
    with pytest.raises(SystemExit, match=r"pip install -e \. mediapipe==0\.10\.14"):
        measure("mediapipe", "DATA.root=nix", "DATA.val.source=[nix/*]")


@pytest.mark.skipif(importlib.util.find_spec("mediapipe") is None, reason="MediaPipe is not installed")
@pytest.mark.skipif(not REALHANDS.is_dir(), reason=f"no {REALHANDS}")
def test_mediapipe_detects_a_real_hand() -> None:
    entries = json.loads((REALHANDS / "annotations.json").read_text())
    entry = next(entry for entry in entries if entry["source"] == "hand_graph_cnn")
    image = cv2.imread(str(REALHANDS / entry["image"]), cv2.IMREAD_COLOR_RGB)
    for pad in (0.0, 0.25):
        (detection,) = mediapipe_hands.load_detector(0.5, pad)(image)
        assert np.abs(detection.joint_img - entry["joint_img"]).mean() < 8
        assert 50 < np.ptp(detection.joint_world, axis=0).max() < 250, "mm"
