"""Labels that parse but cannot be true: each kind is reported with count, example and cause; true labels never."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from script.check_shards import main as check_main
from script.make_shards import main as make_main
from src.data.convert.chunk import Request
from src.data.convert.realhands import convert_realhands
from src.data.demo.hand import draw_hands
from src.data.loader import build_train_loader, build_val_loader
from src.data.plausibility import report as plausibility_report
from src.data.plausibility.report import check_hands_of_shard, warn_if_implausible
from src.data.plausibility.side import chirality
from src.data.plausibility.tally import findings, merge
from src.data.shards.build_index import open_indexes
from src.data.shards.writer import HandRecord, write_shard
from src.geometry.patch import mirror_pose
from src.hand.kinematics import CHAIN_JOINTS, chain_joints
from src.hand.mano import ManoLayer
from src.hand.standin.build import build_standin_hand
from tests import convert_sets
from tests.data_shards import data_config, encode, image_of
from tests.helpers import REALHANDS

NUM, SIZE = 40, 256
Change = Callable[[HandRecord], HandRecord]


@lru_cache(maxsize=1)
def true_hands() -> list[HandRecord]:
    """Random hands of the stand-in, every other one a left hand, with camera, boxes and parameters."""
    draw = draw_hands([np.random.default_rng([3, n]) for n in range(NUM)], SIZE, 0.2)
    image, records = encode(image_of(0, SIZE, SIZE), "jpg"), []
    for n in range(NUM):
        is_left, princpt = n % 2 == 0, draw.princpt[n].astype(float)
        joint = draw.joint[n] * ([-1, 1, 1] if is_left else [1, 1, 1])
        pixel = joint[:, :2] / joint[:, 2:] * draw.focal[n] + princpt
        records.append(
            HandRecord(
                key=f"hand{n}",
                image=image,
                image_type="jpg",
                handedness="left" if is_left else "right",
                data_source="mine",
                hand_bbox=np.concatenate([pixel.min(axis=0), pixel.max(axis=0)]),
                joint_img=pixel,
                joint_cam=joint,
                mano_pose=mirror_pose(draw.pose[n]) if is_left else draw.pose[n],
                mano_shape=draw.shape[n],
                focal=draw.focal[n],
                princpt=princpt,
                hand_model="standin",
                flat_hand_mean=True,
            )
        )
    return records


def found(folder: Path, records: list[HandRecord], mano: Path | None = None) -> list[str]:
    """The findings on a shard of these hands."""
    write_shard(records, folder / "a.tar")
    return findings(check_hands_of_shard(*open_indexes([folder / "a.tar"]), mano)[0])


def of(**values: Callable[[HandRecord], Any]) -> Change:
    """A change of some fields, each computed from the record."""
    return lambda record: replace(record, **{name: value(record) for name, value in values.items()})


def opposite(record: HandRecord) -> str:
    return "left" if record.handedness == "right" else "right"


def moved(joint: np.ndarray, number: int, by: float) -> np.ndarray:
    joint = joint.copy()
    joint[number] += by
    return joint


def root_turned(record: HandRecord) -> np.ndarray:
    """The pose with its root in another camera frame."""
    other = cv2.Rodrigues(np.array([0.3, 1.2, -0.8]))[0] @ cv2.Rodrigues(np.float64(record.mano_pose[:3]))[0]
    return np.concatenate([cv2.Rodrigues(other)[0].ravel(), record.mano_pose[3:]])


def unknown_at(value: float, joint: np.ndarray) -> np.ndarray:
    """The joints with the value that some data sets store for unknown ones in three of them."""
    return np.where(np.isin(np.arange(21), (3, 7, 12))[:, None], value, joint)


TIP_TO_PALM = [0, *(finger + level for finger in range(1, 21, 4) for level in (3, 2, 1, 0))]
INTERHAND = np.argsort([20, 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12, 19, 18, 17, 16])
BROKEN: dict[str, tuple[Change, str, str]] = {  # name: (change, what is reported, the cause)
    "metres": (of(joint_cam=lambda r: r.joint_cam / 1000), "not hand-sized", "looks like metres: multiply by 1000"),
    "centimetres": (of(joint_cam=lambda r: r.joint_cam / 10), "not hand-sized", "centimetres: multiply by 10"),
    "inches": (of(joint_cam=lambda r: r.joint_cam / 25.4), "not hand-sized", "inches"),
    "ten times": (of(joint_cam=lambda r: r.joint_cam * 10), "not hand-sized", "10 times too large"),
    "scale 0": (of(joint_cam=lambda r: np.tile(r.joint_cam[:1], (21, 1))), "not hand-sized", "at the same point"),
    "wild joint": (of(joint_cam=lambda r: moved(r.joint_cam, 8, 150.0)), "out of proportion", ""),
    "joint order": (of(joint_cam=lambda r: r.joint_cam[convert_sets.TO_MANO]), "out of proportion", "MANO's order"),
    "joint order of InterHand": (of(joint_cam=lambda r: r.joint_cam[INTERHAND]), "of", "InterHand2.6M's order"),
    "x and y": (
        of(joint_img=lambda r: r.joint_img[:, ::-1]),
        "2D and projected 3D joints disagree",
        "x and y of joint",
    ),
    "princpt": (
        of(princpt=lambda r: np.add(r.princpt, [25, -10])),
        "2D and projected 3D joints disagree",
        "constant shift",
    ),
    "princpt by a few px": (of(princpt=lambda r: np.add(r.princpt, [7, 0])), "disagree", "constant shift"),
    "resized": (of(focal=lambda r: r.focal * 2, princpt=lambda r: r.princpt * 2), "disagree", "0.5 times as large"),
    "y up": (of(joint_cam=lambda r: r.joint_cam * [1, -1, 1]), "2D and projected 3D joints disagree", "y of joint_cam"),
    "opengl": (of(joint_cam=lambda r: r.joint_cam * [1, -1, -1]), "behind the camera", "OpenGL"),
    "relative": (of(joint_cam=lambda r: r.joint_cam - r.joint_cam[0]), "behind the camera", "relative to the wrist"),
    "x negated": (of(joint_cam=lambda r: r.joint_cam * [-1, 1, 1]), "right hands look like left hands", "mirrored"),
    "handedness": (of(handedness=opposite), "left hands look like right hands", "handedness swapped"),
    "all right": (of(handedness=lambda _: "right"), "right hands look like left hands", "may be a constant"),
    "flat_hand_mean": (of(flat_hand_mean=lambda _: False), "MANO parameters do not", "flat_hand_mean looks wrong"),
    "degrees": (of(mano_pose=lambda r: np.rad2deg(r.mano_pose)), "MANO parameters do not", "radians"),
    "mirrored poses": (of(mano_pose=lambda r: mirror_pose(r.mano_pose)), "MANO parameters do not", "look negated"),
    "root": (of(mano_pose=root_turned), "MANO parameters do not", "root rotation"),
    "xywh": (
        of(hand_bbox=lambda r: np.concatenate([r.hand_bbox[:2], r.hand_bbox[2:] - r.hand_bbox[:2]])),
        "hand_bbox does not match",
        "x, y, width, height",
    ),
    "normalised": (of(joint_img=lambda r: r.joint_img / 128 - 1), "span less than 4 px", "looks normalised"),
    "crop": (of(joint_img=lambda r: r.joint_img - r.hand_bbox[:2]), "hand_bbox does not match", "relative to the box"),
    "focal": (of(focal=lambda r: r.focal / 60), "focal does not match princpt", "mm or normalised"),
    "intrinsics": (
        of(focal=lambda r: r.focal / SIZE, princpt=lambda r: r.princpt / SIZE, joint_cam=lambda _: None),
        "focal does not match princpt",
        "princpt looks normalised",
    ),
    "shifted": (of(joint_img=lambda r: r.joint_img + 5, hand_bbox=lambda r: r.hand_bbox + 5), "", "constant shift"),
    "tip to palm": (of(joint_cam=lambda r: r.joint_cam[TIP_TO_PALM]), "out of proportion", "from tip to palm"),
    "wrist last": (of(joint_cam=lambda r: np.roll(r.joint_cam, -1, axis=0)), "out of proportion", "wrist looks last"),
    "side, a joint unknown": (
        of(handedness=opposite, mano_pose=lambda _: None, joint_3d_valid=lambda _: np.arange(21) != 15),
        "left hands look like right hands",
        "handedness swapped",
    ),
    "unknown at 0 px": (of(joint_img=lambda r: unknown_at(0.0, r.joint_img)), "flagged valid", ""),
    "unknown at -1 px": (
        of(joint_img=lambda r: unknown_at(-1.0, r.joint_img), joint_cam=lambda _: None),
        "flagged valid",
        "",
    ),
    "unknown at 0 mm": (of(joint_cam=lambda r: unknown_at(0.0, r.joint_cam)), "flagged valid", ""),
    "equal": (lambda r: replace(true_hands()[1], key=r.key), "all hands have the same joints", ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_source_with_wrong_labels_is_reported(name: str, tmp_path: Path) -> None:
    change, text, cause = BROKEN[name]
    lines = [line for line in found(tmp_path, [change(r) for r in true_hands()]) if text in line and cause in line]
    assert len(lines) == 1, f"{found(tmp_path, [change(r) for r in true_hands()])}"
    print(f"{name}: {lines[0].replace(str(tmp_path), '')}")
    assert lines[0].startswith("mine: ")
    assert " checked hands; " in lines[0]
    assert f"/0 in {tmp_path}/a.tar" in lines[0]


def test_true_labels_are_not_reported(tmp_path: Path) -> None:
    true = true_hands()
    assert found(tmp_path, true) == []
    unknown_camera = of(focal=lambda _: None, princpt=lambda _: None)
    assert found(tmp_path, [unknown_camera(r) for r in true]) == []
    only = {"joint_img", "joint_cam", "mano_pose"}
    for name in only:
        less = dict.fromkeys(only - {name}) | ({} if name == "mano_pose" else {"mano_shape": None})
        assert found(tmp_path, [replace(r, **less) for r in true]) == [], name
    hidden = np.ones(21)
    hidden[[0, 5, 8]] = 0
    wild = of(joint_cam=lambda r: moved(r.joint_cam, 8, 1e4), joint_3d_valid=lambda _: hidden)
    assert found(tmp_path, [wild(r) for r in true]) == []


def test_noisy_labels_are_not_reported(tmp_path: Path) -> None:
    """Annotated joints a few mm and px from the truth, parameters of a fitted hand, children's hands, loose boxes."""
    rng = np.random.default_rng(1)
    changes = (
        of(joint_cam=lambda r: r.joint_cam + rng.normal(0, 4, (21, 3))),
        of(joint_img=lambda r: r.joint_img + rng.normal(0, 3, (21, 2))),
        of(mano_shape=lambda r: r.mano_shape + rng.normal(0, 1, 10)),
        of(joint_cam=lambda r: 0.6 * r.joint_cam, mano_pose=lambda _: None, mano_shape=lambda _: None),
        of(hand_bbox=lambda _: np.array([0.0, 0, SIZE - 1, SIZE - 1])),
        of(hand_bbox=lambda r: np.clip(r.hand_bbox, 0, SIZE - 1)),
    )
    for number, change in enumerate(changes):
        assert found(tmp_path, [change(r) for r in true_hands()]) == [], number


def test_unusual_cameras_and_views_are_not_reported(tmp_path: Path) -> None:
    """Crops with the principal point near their corner, a long lens, small hands, hands that leave the image."""

    def crop(record: HandRecord) -> HandRecord:
        corner = np.subtract(record.princpt, (1.5, -2.0))
        box, pixel = record.hand_bbox - np.tile(corner, 2), record.joint_img - corner
        return replace(record, hand_bbox=box, joint_img=pixel, princpt=(1.5, -2.0))

    def far(record: HandRecord) -> HandRecord:
        focal, joint = 8000.0, np.add(record.joint_cam, (0, 0, 8000 - record.joint_cam[0, 2]))
        pixel = joint[:, :2] / joint[:, 2:] * focal + record.princpt
        box = np.concatenate([pixel.min(axis=0), pixel.max(axis=0)])
        return replace(record, focal=(focal, focal), joint_cam=joint, joint_img=pixel, hand_bbox=box)

    def leaves(record: HandRecord) -> HandRecord:
        shift = np.array([SIZE - 3 - record.hand_bbox[0], 0])
        moved = {"joint_img": record.joint_img + shift, "princpt": record.princpt + shift}
        return replace(record, hand_bbox=record.hand_bbox + np.tile(shift, 2), **moved)

    true = true_hands()
    for change in (crop, far):
        lines = found(tmp_path, [change(record) for record in true])
        assert not [line for line in lines if "outside the image" not in line], lines  # both move hands in the image
    assert found(tmp_path, [leaves(true[0]), *true[1:]]) == []
    small = of(joint_cam=lambda r: 0.43 * r.joint_cam, mano_pose=lambda _: None, mano_shape=lambda _: None)
    assert not [line for line in found(tmp_path, list(map(small, true))) if "order" in line]


def test_a_part_of_a_source_is_counted(tmp_path: Path) -> None:
    true = true_hands()
    swap, metres = BROKEN["handedness"][0], BROKEN["metres"][0]
    lines = found(tmp_path, [replace(swap(r), mano_pose=None, mano_shape=None) for r in true[:12]] + true[12:])
    assert [line.split(";")[0] for line in lines] == [
        "mine: right hands look like left hands: 6 of 20 checked hands",
        "mine: left hands look like right hands: 6 of 20 checked hands",
    ]
    other = replace(metres(true[3]), data_source="theirs", mano_pose=None, mano_shape=None)
    (line,) = found(tmp_path, [*true[:3], other])
    assert line.startswith("theirs: 3D joints are not hand-sized: 1 of 1 checked hands; joint_cam looks like metres")
    assert f"hand3/0 in {tmp_path}/a.tar" in line
    (line,) = found(tmp_path, [replace(other, data_source="a\n\x1b[31m[b]")])
    assert line.startswith("a\\n\\x1b[31m[b]: 3D joints")


def test_2d_and_3d_are_compared_without_a_camera(tmp_path: Path) -> None:
    def change(record: HandRecord) -> HandRecord:
        flipped = record.joint_cam * [1, -1, 1]
        return replace(record, joint_cam=flipped, focal=None, princpt=None, mano_pose=None, mano_shape=None)

    lines = found(tmp_path, [change(r) for r in true_hands()])
    assert any("differ in shape" in line and "y of joint_cam points up" in line for line in lines)


def test_parameters_alone_show_the_side(tmp_path: Path) -> None:
    swap = BROKEN["handedness"][0]
    lines = found(tmp_path, [replace(swap(r), joint_cam=None, joint_img=None) for r in true_hands()])
    assert len(lines) == 2
    assert all("hands look like" in line for line in lines)


def test_2d_alone_does_not_show_the_side(tmp_path: Path) -> None:
    only_2d = {"joint_cam": None, "mano_pose": None, "mano_shape": None}
    assert found(tmp_path, [replace(BROKEN["handedness"][0](r), **only_2d) for r in true_hands()]) == []


def test_kinematics_equal_the_mano_layer() -> None:
    hand, rng = build_standin_hand(), np.random.default_rng(0)
    pose, shape = rng.normal(0, 0.5, (6, 48)).astype(np.float32), rng.normal(0, 1, (6, 10)).astype(np.float32)
    layer, right = ManoLayer(hand), np.arange(6) % 2 == 0
    for flat in (False, True):
        own = torch.from_numpy(np.where(right[:, None], pose, mirror_pose(pose)))
        joint = layer(layer.pose_to_rotmat(own, flat), torch.from_numpy(shape)).joint.numpy()[:, CHAIN_JOINTS]
        joint[~right, :, 0] *= -1
        assert np.abs(chain_joints(hand, pose, shape, right, np.full(6, flat)) - joint).max() < 1e-3


def test_random_poses_rarely_look_like_the_other_side() -> None:
    """Even with finger angles of either sign, which no real hand has."""
    rng, num = np.random.default_rng(5), 500
    pose = np.concatenate([rng.normal(0, 1, (num, 3)), rng.normal(0, 0.25, (num, 45))], axis=1)
    right = np.arange(num) % 2 == 0
    joint = np.full((num, 21, 3), np.nan)
    joint[:, CHAIN_JOINTS] = chain_joints(
        build_standin_hand(), pose, rng.normal(0, 1, (num, 10)), right, np.full(num, True)
    )
    side = chirality(joint) * np.where(right, 1, -1)
    assert (side > 0.3).mean() > 0.9
    assert (side < -0.3).mean() < 0.005


@pytest.mark.skipif(not REALHANDS.is_dir(), reason=f"{REALHANDS} is not there")
def test_real_hands_are_plausible_and_swapped_ones_are_not(tmp_path: Path) -> None:
    convert_realhands(Request(REALHANDS, tmp_path, "all"))
    (shard,) = open_indexes([tmp_path / "000000.tar"])
    tallies, _ = check_hands_of_shard(shard, None)
    assert findings(tallies) == []
    sides = {source: counts.checked for (source, check), counts in tallies.items() if check in ("left", "right")}
    assert sides["hand_graph_cnn"] > 130, "the shape decides for almost all hands"
    entries = json.loads((REALHANDS / "annotations.json").read_text(encoding="utf-8"))
    for entry in entries[::3]:
        entry["handedness"] = {"left": "right", "right": "left"}[entry["handedness"]]
    (tmp_path / "annotations.json").write_text(json.dumps(entries))
    (tmp_path / "images").symlink_to(REALHANDS / "images")
    convert_realhands(Request(tmp_path, tmp_path / "swapped", "hand_graph_cnn"))
    tallies, _ = check_hands_of_shard(*open_indexes([tmp_path / "swapped" / "000000.tar"]), None)
    (line,) = findings(tallies)
    assert re.match(r"hand_graph_cnn: right hands look like left hands: (4[5-9]) of \1 checked hands", line)


@pytest.mark.parametrize("name", ["freihand", "interhand", "dexycb", "ho3d", "hamer"])
def test_converted_sets_are_plausible(name: str, tmp_path: Path) -> None:
    mano, source, output = convert_sets.write_mano(tmp_path / "mano.npz"), tmp_path / "in", tmp_path / "out"
    getattr(convert_sets, f"write_{name}")(source, mano)
    split = {"interhand": ["--split", "val"], "dexycb": ["--split", "s1/train"]}.get(name, [])
    command = [name, "--input", str(source), "--output", str(output), "--num_process", "1", *split]
    assert make_main([*command, "--mano", str(mano)]) == 0
    results = [check_hands_of_shard(shard, mano) for shard in open_indexes(sorted(output.glob("**/*.tar")))]
    tallies = merge(result[0] for result in results)
    assert findings(tallies) == []
    assert any(key.check == "mano" and counts.checked for key, counts in tallies.items())
    assert not any(missing for _, missing in results)


def test_missing_labels_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [replace(hand, joint_cam=None, mano_pose=None, mano_shape=None) for hand in true_hands()[:8]]
    write_shard(records, tmp_path / "a.tar")
    assert check_main([str(tmp_path), "--num_process", "1"]) == 0
    out = capsys.readouterr().out
    assert "mine: labels of 8 checked hands: 2D joints 100 %, 3D joints 0 %, MANO 0 %, intrinsics 100 %" in out
    assert "WARNING" not in out
    records = [replace(hand, joint_img=None) for hand in records]
    assert found(tmp_path / "none", records)[0].startswith(
        "mine: no label is known, so that nothing is supervised: 8 of 8"
    )


def test_check_shards_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard([BROKEN["metres"][0](r) for r in true_hands()], tmp_path / "a.tar")
    arguments = [str(tmp_path), "--num_process", "1"]
    assert check_main(arguments) == 0, "only --strict makes it an error"
    out = capsys.readouterr().out
    assert f"WARNING: mine: 3D joints are not hand-sized: {NUM} of {NUM} checked hands; joint_cam looks like" in out
    assert "0 corrupt" in out
    assert check_main([*arguments, "--strict"]) == 1
    write_shard([replace(r, hand_model="mano") for r in true_hands()], tmp_path / "a.tar")
    capsys.readouterr()
    assert check_main([*arguments, "--strict"]) == 0
    assert (
        "parameters of the hand model 'mano' were not compared with the joints; --mano FILE" in capsys.readouterr().out
    )
    (tmp_path / "bad.pkl").write_bytes(b"not a pickle")
    for name in ("gone.pkl", "bad.pkl"):
        with pytest.raises(SystemExit, match="2"):
            check_main([*arguments, "--mano", str(tmp_path / name)])


def loaders(root: Path) -> SimpleNamespace:
    cfg = data_config(root)
    return SimpleNamespace(train=build_train_loader(cfg, "standin"), val=build_val_loader(cfg, "standin"))


def test_a_run_warns_when_it_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "stage1.data")
    models = {"standin": build_standin_hand()}
    write_shard([BROKEN["flat_hand_mean"][0](r) for r in true_hands()], tmp_path / "train" / "a.tar")
    write_shard(true_hands(), tmp_path / "val" / "a.tar")
    made = loaders(tmp_path)
    warn_if_implausible("validation", made.val.dataset, models)
    assert not caplog.records
    warn_if_implausible("training", made.train.dataset, models)
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith(
        f"training data: mine: MANO parameters do not give the joints: {NUM} of {NUM} checked hands"
    )
    assert "docs/DATA.md" in last


def test_a_fault_of_the_check_does_not_stop_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oops")

    for name in ("train", "val"):
        write_shard(true_hands()[:4], tmp_path / name / "a.tar")
    monkeypatch.setattr(plausibility_report, "tally", fail)
    warn_if_implausible("training", loaders(tmp_path).train.dataset, {})
    assert "the plausibility check failed and was skipped: ZeroDivisionError: oops" in caplog.text


def test_shards_that_do_not_name_their_data_set_are_named_by_folder(tmp_path: Path) -> None:
    metres = BROKEN["metres"][0]
    folder = tmp_path / "old"
    (line,) = [x for x in found(folder, [replace(metres(true_hands()[1]), data_source="unknown")]) if "sized" in x]
    assert line.startswith(f"{folder}: 3D joints")
