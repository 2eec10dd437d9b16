"""What a data set says about its own labels reaches the shards: confidences, validity, and truth released later."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from shutil import rmtree
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import webdataset as wds

from script.make_shards import main
from src.data.convert.annotate import OPENGL_TO_OPENCV, turn_root
from src.data.convert.hamer import OPTIONS
from src.data.convert.mano_check import OWN_JOINTS_MM, find_convention, joint_error
from src.data.shards.writer import HandRecord
from tests.convert_sets import (
    add,
    draw,
    encoded_image,
    fk,
    hamer_hand,
    hand_content,
    tarfile,
    write_dexycb,
    write_freihand,
    write_ho3d,
    write_interhand,
    write_mano,
)


@pytest.fixture(scope="module")
def mano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_mano(tmp_path_factory.mktemp("mano") / "MANO_RIGHT.npz")


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Convert tmp_path/set with the real script into a new folder; read the shards with stock webdataset."""

    def converted(kind: str, *options: str) -> SimpleNamespace:
        output = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        arguments = ["--input", str(tmp_path / "set"), "--output", str(output), "--num_process", "1", *options]
        code = main([kind, *arguments])
        printed = capsys.readouterr()
        shards = [str(s) for s in sorted(output.glob("**/*.tar"))]
        samples = wds.WebDataset(shards, shardshuffle=False).decode("rgb") if shards else []
        return SimpleNamespace(
            code=code, text=(printed.out + printed.err).replace("\n", " "), got={s["__key__"]: s for s in samples}
        )

    return converted


def write_tar(path: Path, images: dict[str, list[dict[str, Any]] | None], image: bytes | None = None) -> None:
    """A HaMeR tar: the hands of each image by key; None: no data.pyd."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, hands in images.items():
            add(tar, f"{key}.jpg", encoded_image(1, (200, 200)) if image is None else image)
            if hands is not None:
                add(tar, f"{key}.data.pyd", pickle.dumps(hands, 4))


def unreliable_hands(mano: Path) -> dict[str, dict[str, Any]]:
    """Hands by the reason why HaMeR does not train on all of their labels."""
    hands = {
        name: hamer_hand(mano, i, True)[0] for i, name in enumerate(("good", "few", "loss", "nan", "betas", "box"))
    }
    few = hands["few"]["keypoints_2d"]
    few[:, 2] = 0.25
    few[:4, 2] = 0.9
    hands["loss"]["extra_info"] = {"fitting_loss": np.array({"reprojection_loss": 31000.0})}
    hands["nan"]["extra_info"] = {"fitting_loss": np.array({"reprojection_loss": float("nan")})}
    hands["betas"]["betas"] = np.float32([0, -3.5, *[0.1] * 8])
    hands["box"]["scale"] = np.array([0.2, 0.1])
    hands["alone"] = {**hamer_hand(mano, 9, True)[0], "has_betas": np.array(0.0), "extra_info": {}}
    return hands


def test_hamer_filters_as_hamer_does(convert: Any, mano: Path, tmp_path: Path) -> None:
    hands = unreliable_hands(mano)
    write_tar(tmp_path / "set" / "coco-train" / "0.tar", {name: [hand] for name, hand in hands.items()})
    (tmp_path / "set" / "coco-train" / "._0.tar").write_bytes(b"\0\5\x16\7macOS")
    done = convert("hamer")
    assert "skipped: filter_num_kp 1, filter_reproj_thresh 1, not_finite 1" in done.text
    assert sorted(done.got) == [f"coco-train_{name}_0" for name in ("alone", "betas", "box", "good")]
    expected = {"alone": 0, "betas": 0, "box": 1, "good": 1}
    assert {key.split("_")[1]: sample["json"]["has_mano"][0] for key, sample in done.got.items()} == expected
    assert (
        "labels set to unknown: MANO by poses_betas_simultaneous 1, MANO by suppress_betas_thresh 1, "
        "keypoints_2d by suppress_kp_conf_thresh 4, keypoints_3d by suppress_kp_conf_thresh 4"
    ) in done.text
    for key, sample in done.got.items():
        wanted = hands[key.split("_")[1]]
        for name, field in (("keypoints_2d", "joint_2d_valid.npy"), ("keypoints_3d", "joint_3d_valid.npy")):
            assert (sample[field][0] > 0).tolist() == (wanted[name][:, -1] >= 0.3).tolist()


def test_hamer_thresholds_are_options(
    convert: Any, mano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hands = unreliable_hands(mano)
    hands["nan"]["extra_info"] = {}
    write_tar(tmp_path / "set" / "coco-train" / "0.TAR", {"all": list(hands.values())})
    off = convert("hamer", *(word for name in OPTIONS for word in (f"--{name}", "0")))
    assert (len(off.got), "skipped: none" in off.text) == (len(hands), True)
    assert "labels set to unknown: MANO by poses_betas_simultaneous 1 " in off.text
    for sample, hand in zip(off.got.values(), hands.values(), strict=True):
        assert (sample["joint_2d_valid.npy"][0] > 0).tolist() == (hand["keypoints_2d"][:, 2] > 0).tolist()
    strict = convert("hamer", "--suppress_kp_conf_thresh", "0.95", "--filter_num_kp", "0")
    assert not any(s["joint_2d_valid.npy"].any() for s in strict.got.values())
    small = convert("hamer", "--filter_min_bbox_size", "20", "--filter_reproj_thresh", "0", "--filter_num_kp", "3")
    assert "skipped: filter_min_bbox_size 1 " in small.text
    arguments = ["hamer", "--input", str(tmp_path / "set"), "--output", str(tmp_path / "out0"), "--num_process", "1"]
    assert main(arguments) == 2  # the thresholds belong to the conversion
    assert "was written with suppress_kp_conf_thresh=0.0, this call has 0.3;" in capsys.readouterr().err
    for wrong in ("-1", "2.5", "x"):
        with pytest.raises(SystemExit):
            convert("hamer", "--filter_num_kp", wrong)
        assert f"--filter_num_kp: '{wrong}' must be an integer, 0 or more" in capsys.readouterr().err
    arguments[4] = str(tmp_path / "none")
    assert main([*arguments, "--filter_num_kp", "21"]) == 2  # no hand is left, and the folder is free
    assert main(arguments) == 0


def test_boxes_outside_the_image_are_skipped(convert: Any, mano: Path, tmp_path: Path) -> None:
    """They would be found in training, as corrupt frames."""
    hands = [hamer_hand(mano, i, True)[0] for i in range(3)]
    hands[0]["keypoints_2d"][:, :2] += 1000
    hands[0]["center"] = hands[0]["center"] + 1000
    hands[1]["extra_info"] = {"fitting_loss": np.array([{"reprojection_loss": 40000.0}])}  # HaMeR reads it, too
    write_tar(tmp_path / "set" / "coco-train" / "0.tar", {"a": hands})
    done = convert("hamer")
    assert "skipped: bad_bbox 1, filter_reproj_thresh 1" in done.text
    assert list(done.got) == ["coco-train_a_2"]
    rmtree(tmp_path / "set")
    write_ho3d(tmp_path / "set", mano)
    for frame, box in ((0, [700, 10, 800, 90]), (1, [400, 320, 200, 150])):
        path = tmp_path / "set" / "evaluation" / "AP11" / "meta" / f"{frame:04d}.pkl"
        path.write_bytes(pickle.dumps({**pickle.loads(path.read_bytes()), "handBoundingBox": box}, 2))
    done = convert("ho3d", "--split", "evaluation")
    assert "skipped: bad_bbox 1, small_box 1" in done.text
    assert len(done.got) == 2


def test_hamer_counts_lost_hands_not_images(convert: Any, mano: Path, tmp_path: Path) -> None:
    pair = [hamer_hand(mano, i, True)[0] for i in range(2)]
    write_tar(tmp_path / "set" / "a" / "0.tar", {"x": pair, "y": None}, image=b"no image")
    write_tar(tmp_path / "set" / "a" / "1.tar", {"._z": [], "z": pair})
    done = convert("hamer")
    assert "skipped: missing_member 1, undecodable_image 2" in done.text
    assert len(done.got) == 2


def test_interhand_joints_are_known_where_both_files_say_so(convert: Any, mano: Path, tmp_path: Path) -> None:
    truth = write_interhand(tmp_path / "set", mano)
    done = convert("interhand", "--split", "val")
    counts = "3D joints without a wrist 36, joints by joint_valid of joint_3d.json 6"
    assert f"labels set to unknown: {counts}" in done.text
    path = tmp_path / "set" / "annotations" / "val" / "InterHand2.6M_val_joint_3d.json"
    content = json.loads(path.read_text())
    for frame in content["0"].values():
        frame["joint_valid"] = np.repeat(frame["joint_valid"], 3, axis=1).tolist()  # as the home page documents it
    path.write_text(json.dumps(content))
    for got in (done.got, convert("interhand", "--split", "val").got):
        for key, sample in got.items():
            assert (sample["joint_3d_valid.npy"][0] == truth[key].valid_3d).all()
            assert (sample["joint_2d_valid.npy"][0] <= truth[key].annotated).all()
            assert not sample["joint_cam.npy"][0][truth[key].valid_3d == 0].any()
    (path.parent / "InterHand2.6M_val_MANO_NeuralAnnot.json").unlink()
    assert "MANO_NeuralAnnot.json is missing: no MANO" in convert("interhand", "--split", "val").text


def test_ho3d_released_truth_is_used(convert: Any, mano: Path, tmp_path: Path) -> None:
    truth = write_ho3d(tmp_path / "set", mano, released=True)
    done = convert("ho3d", "--split", "evaluation")
    assert "ho3d: evaluation_verts.json is not used" in done.text
    assert "skipped: none" in done.text
    assert len(done.got) == 4
    for key, sample in done.got.items():
        joint, pixel = sample["joint_cam.npy"][0], sample["joint_img.npy"][0]
        assert sample["joint_3d_valid.npy"].all()
        assert np.abs(joint - truth[key].joint_cam).max() < 0.01
        projected = joint[:, :2] / joint[:, 2:] * truth[key].focal + truth[key].princpt
        assert np.abs(projected - pixel)[sample["joint_2d_valid.npy"][0] > 0].max() < 0.1
        assert sample["hand_bbox.npy"].tolist() == [[200, 150, 400, 320]]
        assert sample["json"]["has_mano"] == [0]
    (tmp_path / "set" / "evaluation_xyz.json").unlink()
    assert (
        "(linked in github.com/shreyashampali/ho3d) is missing beside evaluation.txt: only the wrist is in 3D"
        in convert("ho3d", "--split", "evaluation").text
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda xyz: xyz[:-1], "evaluation_xyz.json: 3 entries, but evaluation.txt lists 4 frames"),
        (lambda xyz: xyz[::-1], "entry 0 is not AP11/0003, line 1 of evaluation.txt: its wrist is"),
        (lambda xyz: (np.array(xyz) * [1, -1, -1]).tolist(), "mm from handJoints3D of the meta file"),
        (lambda xyz: (np.array(xyz) * 1000).tolist(), "mm from handJoints3D of the meta file"),
        (lambda xyz: {"xyz": xyz}, "evaluation_xyz.json: is not a list"),
    ],
)
def test_ho3d_released_truth_that_does_not_fit_is_refused(
    change: Any, problem: str, convert: Any, mano: Path, tmp_path: Path
) -> None:
    write_ho3d(tmp_path / "set", mano, released=True)
    for number, meta in enumerate(sorted((tmp_path / "set" / "evaluation").glob("*/meta/*.pkl"))):
        content = pickle.loads(meta.read_bytes())  # the hands of the set have one wrist; move each
        content["handJoints3D"] = content["handJoints3D"] + [0.01 * number, 0, 0]
        meta.write_bytes(pickle.dumps(content))
    path = tmp_path / "set" / "evaluation_xyz.json"
    xyz = np.array(json.loads(path.read_text())) + [0.01, 0, 0] * np.arange(3, -1, -1)[:, None, None]
    path.write_text(json.dumps(xyz.tolist()))
    assert convert("ho3d", "--split", "evaluation").code == 0
    path.write_text(json.dumps(change(xyz.tolist())))
    done = convert("ho3d", "--split", "evaluation")
    assert (done.code, done.got) == (2, {})
    assert problem in done.text


def test_ho3d_without_the_list_the_released_order_is_unknown(convert: Any, mano: Path, tmp_path: Path) -> None:
    write_ho3d(tmp_path / "set", mano, released=True)
    (tmp_path / "set" / "evaluation.txt").unlink()
    done = convert("ho3d", "--split", "evaluation")
    assert (done.code, "evaluation.txt, which has the order of the entries, is missing" in done.text) == (2, True)


def test_freihand_evaluation_truth_is_used(convert: Any, mano: Path, tmp_path: Path) -> None:
    truth = write_freihand(tmp_path / "set", mano, split="evaluation", mesh_joints=True)
    done = convert("freihand", "--split", "evaluation", "--mano", str(mano))
    assert sorted(done.got) == sorted(truth)
    for unused in ("verts", "scale"):
        assert f"freihand: evaluation_{unused}.json is not used" in done.text
    assert "MANO checked: flat_hand_mean=False: mean joint error 0.000 mm over 5 right hands" in done.text
    assert "joints are regressed from the posed vertices" in done.text
    for key, sample in done.got.items():
        assert np.abs(sample["joint_cam.npy"][0] - truth[key].joint_cam).max() < 0.01
        assert sample["json"]["has_mano"] == [1]
    (tmp_path / "set" / "evaluation_mano.json").unlink()
    assert "evaluation_mano.json is missing: no MANO" in convert("freihand", "--split", "evaluation").text
    (tmp_path / "set" / "evaluation_xyz.json").unlink()
    done = convert("freihand", "--split", "evaluation")
    assert (done.code, "evaluation_xyz.json: missing; the evaluation joints are in" in done.text) == (2, True)


def hands_with(joints: list[np.ndarray], poses: list[np.ndarray], shapes: list[np.ndarray]) -> list[HandRecord]:
    known = {"joint_3d_valid": np.ones(21), "hand_model": "mano", "flat_hand_mean": False}
    return [
        HandRecord("h", b"", "jpg", "right", "test", joint_cam=j, mano_pose=p, mano_shape=s, **known)
        for j, p, s in zip(joints, poses, shapes, strict=True)
    ]


def test_the_mano_check_accepts_both_joint_definitions_and_refuses_wrong_conventions(mano: Path) -> None:
    poses, shapes = zip(*(draw(n) for n in range(64)), strict=True)
    chain = [fk(mano, p, s, True, False) for p, s in zip(poses, shapes, strict=True)]
    mesh = [fk(mano, p, s, True, False, mesh_joints=True) for p, s in zip(poses, shapes, strict=True)]
    apart = [joint_error(a[None], b[None], np.ones((1, 21))) for a, b in zip(chain, mesh, strict=True)]
    assert 0.2 < np.mean(apart) < max(apart) < 1.0  # why FreiHAND's joints do not match the chain exactly

    def check(joints: list[np.ndarray], pose: list[np.ndarray]) -> Any:
        return find_convention(hands_with(joints, pose, list(shapes)), mano, "right", OWN_JOINTS_MM, False)

    for joints, is_mesh in ((chain, False), (mesh, True)):
        found = check(joints, list(poses))
        assert (found.use, found.flat_hand_mean, found.mesh_joints) == (True, False, is_mesh)
        assert found.error_mm < 0.01
        assert found.other_mm > 4 * OWN_JOINTS_MM  # the wrong flat_hand_mean
    half_mean = np.concatenate([np.zeros(3), hand_content()["hands_mean"] / 2])
    wrong = {
        "half the mean pose": [p + half_mean for p in poses],
        "OpenGL's camera frame": [turn_root(p, OPENGL_TO_OPENCV) for p in poses],
        "a camera 20 degrees off": [turn_root(p, cv2.Rodrigues(np.array([0, 0, 0.35]))[0]) for p in poses],
        "another hand's pose": [*poses[1:], poses[0]],
    }
    for name, pose in wrong.items():
        for joints in (chain, mesh):
            found = check(joints, pose)
            assert not found.use, name
            assert found.error_mm > 1.5 * OWN_JOINTS_MM, name


def test_a_dexycb_joint_of_minus_one_is_unknown(convert: Any, mano: Path, tmp_path: Path) -> None:
    write_dexycb(tmp_path / "set", mano, num_frame=2)
    path = next((tmp_path / "set").glob("20200709*/*/836212060125/labels_000000.npz"))
    label = dict(np.load(path))
    label["joint_3d"][0, 7] = -1
    np.savez(path, **label)
    samples = convert("dexycb").got
    known = {key: sample["joint_3d_valid.npy"][0] for key, sample in samples.items()}
    assert sorted(valid.sum() for valid in known.values()) == [20, 21, 21, 21]
    key = min(known, key=lambda k: known[k].sum())
    assert (known[key][7], samples[key]["joint_2d_valid.npy"][0][7]) == (0, 0)
