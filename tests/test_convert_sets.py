"""Each converter on a small folder in its data set's official layout: nothing is lost, and webdataset reads it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset as wds

from script.make_shards import main
from src.data.convert.dexycb import read_labels
from src.data.convert.interhand import TO_OPENPOSE
from src.data.loader import build_val_loader
from src.data.shards.build_index import build_index
from src.data.shards.errors import SampleError
from tests import convert_sets
from tests.convert_sets import Truth, fk, layer, put, write_mano
from tests.data_shards import data_config
from tests.helpers import REALHANDS

needs_realhands = pytest.mark.skipif(not REALHANDS.is_dir(), reason=f"{REALHANDS} is not there")


@pytest.fixture(scope="module")
def mano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_mano(tmp_path_factory.mktemp("mano") / "MANO_RIGHT.npz")


@pytest.fixture
def make(tmp_path: Path, mano: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Write a set, convert it with the real script, and read the shards with stock webdataset."""

    def made(kind: str, *options: str, write: Callable[..., dict[str, Truth]] | None = None) -> SimpleNamespace:
        root, output = tmp_path / "official", tmp_path / "val"
        truth = (write or getattr(convert_sets, f"write_{kind}"))(root, mano) if not root.exists() else {}
        arguments = [kind, "--input", str(root), "--output", str(output), "--num_process", "1", *options]
        code = main(arguments)
        printed = capsys.readouterr()
        shards = sorted(output.glob("**/*.tar"))
        samples = wds.WebDataset([str(s) for s in shards], shardshuffle=False).decode("rgb") if shards else []
        return SimpleNamespace(
            code=code,
            output=printed.out + printed.err,
            shards=shards,
            truth=truth,
            root=root,
            got={s["__key__"]: s for s in samples},
        )

    return made


def check_samples(got: dict[str, dict], truth: dict[str, Truth], source: str, mano: Path | None) -> None:
    """Every sample has its set's annotations: joints in mm, pixels that are their projection, matching parameters."""
    assert sorted(got) == sorted(truth)
    for key, sample in got.items():
        wanted, meta = truth[key], sample["json"]
        assert (meta["handedness"], meta["data_source"]) == ("right" if wanted.is_right else "left", source)
        assert sample["jpg"].dtype == np.float32
        valid_3d = sample["joint_3d_valid.npy"][0]
        assert (valid_3d == wanted.valid_3d).all()
        joint = sample["joint_cam.npy"][0]
        assert np.abs(joint - wanted.joint_cam)[valid_3d > 0].max(initial=0) < 0.01
        height, width = sample["jpg"].shape[:2]
        valid, pixel = sample["joint_2d_valid.npy"][0], sample["joint_img.npy"][0]
        if wanted.focal is not None:
            assert meta["has_intr"] == [1]
            exact = wanted.joint_cam[:, :2] / wanted.joint_cam[:, 2:] * wanted.focal + wanted.princpt
            inside = ((exact > -0.5) & (exact < [width - 0.5, height - 0.5])).all(axis=1)
            assert (valid == inside * (wanted.annotated > 0)).all()
            both = (valid * valid_3d) > 0
            projected = joint[:, :2] / joint[:, 2:].clip(1) * sample["focal.npy"][0] + sample["princpt.npy"][0]
            assert np.abs(projected - pixel)[both].max(initial=0) < 0.1
        else:
            assert meta["has_intr"] == [0]
            assert "focal.npy" not in sample
        if "handBoundingBox" not in str(meta) and (valid > 0).sum() > 2:
            seen = pixel[valid > 0]
            assert np.allclose(sample["hand_bbox.npy"][0], [*seen.min(0), *seen.max(0)])
        assert meta["has_mano"] == [int(wanted.has_mano and mano is not None)]
        if meta["has_mano"] == [1]:
            pose, shape = sample["mano_pose.npy"][0], sample["mano_shape.npy"][0]
            posed = fk(mano, pose, shape, wanted.is_right, meta["flat_hand_mean"])
            both = valid_3d * valid_3d[0] > 0
            assert np.abs(posed - posed[0] - (joint - joint[0]))[both].max(initial=0) < 0.1


def check_loader(root: Path, truth: dict[str, Truth], mano: Path) -> None:
    """Our loader reads every hand, and projection and parameters still agree in the mirrored patch frame."""
    index = [build_index(shard) for shard in sorted(root.glob("val/**/*.tar"))]
    assert (sum(i.num_frame() for i in index), [i.bad_count for i in index]) == (len(truth), [{}] * len(index))
    config = data_config(root, val=("val/**/*.tar",), sample_per_device=8)
    seen, hand = set(), layer(mano)
    for batch in build_val_loader(config, "mano"):
        rows = [i for i, position in enumerate(batch.position.tolist()) if position >= 0]
        seen.update(batch.key[i].rpartition("/")[0] for i in rows)
        flat = [hand.pose_to_rotmat(batch.mano_pose[i : i + 1], bool(batch.flat_hand_mean[i])) for i in rows]
        posed = hand(torch.cat(flat), batch.mano_shape[rows]).joint
        for row, i in enumerate(rows):
            wanted = truth[batch.key[i].rpartition("/")[0]]
            assert (bool(batch.is_right[i]), bool(batch.has_intr[i])) == (wanted.is_right, wanted.focal is not None)
            valid = batch.joint_3d_valid[i] > 0
            if batch.has_intr[i]:
                joint = batch.joint_cam[i]
                pixel = joint[:, :2] / joint[:, 2:].clamp(min=1) * batch.patch_focal[i] + batch.patch_princpt[i]
                both = valid & (batch.joint_2d_valid[i] > 0)
                assert ((pixel - batch.joint_patch[i])[both].abs() < 0.1).all()
            if batch.has_mano[i] and valid[0]:
                error = posed[row] - posed[row, 0] - (batch.joint_cam[i] - batch.joint_cam[i, 0])
                assert error[valid].abs().max() < 0.1
    assert seen == set(truth)


def test_freihand(make: Callable[..., SimpleNamespace], mano: Path, tmp_path: Path) -> None:
    done = make("freihand", "--mano", str(mano), "--num_per_shard", "8")
    assert done.code == 0
    assert "MANO checked: flat_hand_mean=False: mean joint error 0.000 mm" in done.output
    assert [s.name for s in done.shards] == ["000000.tar", "000001.tar", "000002.tar"]
    check_samples(done.got, done.truth, "freihand", mano)
    check_loader(tmp_path, done.truth, mano)
    assert all(not s["json"]["flat_hand_mean"] for s in done.got.values())
    assert [s["json"]["additional_desc"] for s in done.got.values()][::5] == [
        *("background gs", "background hom", "background sample", "background auto")
    ]
    raw = wds.WebDataset(str(done.shards[0]), shardshuffle=False)
    assert all(s["jpg"] == done.truth[s["__key__"]].image for s in raw)  # the original bytes, not re-encoded


def test_freihand_with_another_convention_is_detected(make: Callable[..., SimpleNamespace], mano: Path) -> None:
    done = make("freihand", "--mano", str(mano), write=lambda *a: convert_sets.write_freihand(*a, flat=True))
    assert "MANO checked: flat_hand_mean=True: mean joint error 0.000 mm" in done.output
    check_samples(done.got, done.truth, "freihand", mano)


def test_parameters_that_fit_no_convention_are_omitted(make: Callable[..., SimpleNamespace], mano: Path) -> None:
    def write(root: Path, mano: Path) -> dict[str, Truth]:
        truth = convert_sets.write_freihand(root, mano)
        values = json.loads((root / "training_mano.json").read_text())
        (root / "training_mano.json").write_text(json.dumps(values[::-1]))
        return truth

    done = make("freihand", "--mano", str(mano), write=write)
    assert "WARNING: MANO parameters of right hands are omitted (has_mano 0)" in done.output
    assert "within the tolerance of 2.0 mm" in done.output
    check_samples(done.got, done.truth, "freihand", None)


def test_interhand(make: Callable[..., SimpleNamespace], mano: Path, tmp_path: Path) -> None:
    done = make("interhand", "--split", "val", "--mano", str(mano))
    assert done.output.count("MANO checked: flat_hand_mean=False: mean joint error 0.000 mm") == 2
    check_samples(done.got, done.truth, "interhand2.6m", mano)
    check_loader(tmp_path, done.truth, mano)
    cameras = [key.split("cam")[1][:6] for key in done.got]
    assert cameras == sorted(cameras)  # frames of one camera are adjacent
    without_wrist = [s for key, s in done.got.items() if "image2020" in key]
    assert all(
        not s["joint_3d_valid.npy"].any() and s["joint_2d_valid.npy"].any() for s in without_wrist
    )  # no wrist, no 3D


def test_dexycb(make: Callable[..., SimpleNamespace], mano: Path, tmp_path: Path) -> None:
    done = make("dexycb", "--mano", str(mano), "--split", "s1/train")
    assert done.output.count("MANO checked: flat_hand_mean=False: mean joint error 0.000 mm") == 2
    assert "skipped: no_hand 4" in done.output
    check_samples(done.got, done.truth, "dexycb", mano)
    check_loader(tmp_path, done.truth, mano)
    assert list(done.got) == sorted(done.got)


def test_dexycb_without_mano_and_by_setup(make: Callable[..., SimpleNamespace]) -> None:
    done = make("dexycb", "--split", "s2/train")  # one of the two cameras
    check_samples(done.got, {k: t for k, t in done.truth.items() if "836212060125" in k}, "dexycb", None)
    refused = make("dexycb", "--split", "s0/train", "--output", str(done.root.parent / "other"))
    assert refused.code == 2
    assert "has 1 sequences instead of 100, but s0 selects them by number" in refused.output


def test_dexycb_counts_corrupt_labels(tmp_path: Path) -> None:
    path, rng = tmp_path / "labels_000000.npz", np.random.default_rng(0)
    np.savez_compressed(path, pose_m=rng.random((1, 51), np.float32), joint_3d=rng.random((1, 21, 3), np.float32))
    healthy, reasons = path.read_bytes(), set()
    for _ in range(1500):
        corrupt = bytearray(healthy)
        corrupt[int(rng.integers(len(corrupt)))] = int(rng.integers(256))
        path.write_bytes(corrupt[: rng.integers(1, 4) * len(corrupt) // 3])
        try:
            read_labels(path)
        except SampleError as error:
            reasons.add(error.reason)
    path.unlink()
    with pytest.raises(SampleError, match="missing_annotation"):
        read_labels(path)
    assert reasons == {"bad_npz"}


def test_dexycb_refuses_object_arrays(make: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    def write(root: Path, mano: Path) -> dict[str, Truth]:
        truth = convert_sets.write_dexycb(root, mano)
        for path in sorted(root.glob("20200709*/*/836212060125/labels_000000.npz")):
            np.savez(path, joint_3d=np.array([Bomb(tmp_path / "trace")], object), pose_m=np.zeros((1, 51)))
        return truth

    done = make("dexycb", write=write)
    assert "object_array 1" in done.output
    assert not (tmp_path / "trace").exists()


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_ho3d(make: Callable[..., SimpleNamespace], mano: Path, tmp_path: Path) -> None:
    def write(root: Path, mano: Path) -> dict[str, Truth]:
        truth = convert_sets.write_ho3d(root, mano)
        put(root / "train" / "BB12" / "meta" / "0000.pkl", pickle.dumps(Bomb(tmp_path / "trace")))
        (root / "train.txt").write_text((root / "train.txt").read_text() + "\nBB12/0000\n")
        return truth

    done = make("ho3d", "--mano", str(mano), write=write)
    assert "MANO checked: flat_hand_mean=True: mean joint error 0.000 mm" in done.output
    assert "skipped: missing_annotation 1, unsafe_pickle 1" in done.output
    assert not (tmp_path / "trace").exists()
    truth = {k: t for k, t in done.truth.items() if "train" in k}
    check_samples(done.got, truth, "ho3d", mano)
    check_loader(tmp_path, truth, mano)
    assert list(done.got) == sorted(done.got)  # in frame order, unlike the list


def test_ho3d_evaluation_has_only_the_wrist(make: Callable[..., SimpleNamespace]) -> None:
    done = make("ho3d", "--split", "evaluation")
    assert len(done.got) == 4
    for key, sample in done.got.items():
        assert np.flatnonzero(sample["joint_3d_valid.npy"][0]).tolist() == [0]
        assert np.allclose(sample["joint_cam.npy"][0, 0], done.truth[key].joint_cam[0], atol=1e-2)
        assert sample["hand_bbox.npy"].tolist() == [[200, 150, 400, 320]]
        assert sample["json"]["has_mano"] == [0]


def test_hamer(make: Callable[..., SimpleNamespace], mano: Path, tmp_path: Path) -> None:
    done = make("hamer", "--mano", str(mano))
    assert [str(s.relative_to(tmp_path / "val")) for s in done.shards] == [
        *("freihand-train/000000.tar", "freihand-train/000001.tar"),
        *("ih26m-train/000000.tar", "ih26m-train/000001.tar"),
    ]
    assert done.output.count("MANO checked: flat_hand_mean=True: mean joint error 0.000 mm") == 4  # two sets, two sides
    for subset in ("freihand-train", "ih26m-train"):
        part = {k: s for k, s in done.got.items() if k.startswith(subset)}
        check_samples(part, {k: t for k, t in done.truth.items() if k.startswith(subset)}, subset, mano)
    check_loader(tmp_path, done.truth, mano)


def test_hamer_skips_malicious_and_corrupt_tars(make: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    def write(root: Path, mano: Path) -> dict[str, Truth]:
        truth = convert_sets.write_hamer(root, mano, ("coco-train",))
        first, second = sorted((root / "coco-train").iterdir())
        with convert_sets.tarfile.open(first, "a") as tar:
            ragged = pickle.dumps(
                [{"keypoints_2d": [[1.0, 2.0], [3.0]]}, {"keypoints_2d": np.ones((21, 3)), "right": 10**400}]
            )
            hostile = pickle.dumps([Bomb(tmp_path / "trace")])
            for key, data in (("x", hostile), ("y", b"nonsense"), ("z", None), ("w", ragged)):
                convert_sets.add(tar, f"{key}.jpg", convert_sets.encoded_image(1, (64, 64)))
                if data:
                    convert_sets.add(tar, f"{key}.data.pyd", data)
        second.write_bytes(second.read_bytes()[:2000])
        return truth

    done = make("hamer", "--split", "coco-train", write=write)
    assert done.code == 0
    assert not (tmp_path / "trace").exists()
    for reason in ("unsafe_pickle 1", "bad_pickle 1", "missing_member 1", "damaged_truncated 1", "unforeseen 2"):
        assert reason in done.output
    assert sorted(done.got) == sorted(k for k in done.truth if "coco-train-0" in k)


@pytest.mark.parametrize("kind", ["freihand", "interhand", "dexycb", "ho3d", "hamer"])
def test_a_wrong_folder_is_explained(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main([kind, "--input", str(tmp_path / "empty"), "--output", str(tmp_path / "out")]) == 2
    assert f"--input {tmp_path / 'empty'}: contains no" in capsys.readouterr().err.replace("\n", "")
    assert not list(tmp_path.glob("out/**/*.tar"))


@needs_realhands
def test_real_freihand_annotations_are_preserved(tmp_path: Path) -> None:
    entries = [e for e in _real("freihand") if e["joint_cam"]]
    for i, entry in enumerate(entries):
        put(tmp_path / "set" / "training" / "rgb" / f"{i:08d}.jpg", (REALHANDS / entry["image"]).read_bytes())
    lens = [[[*(f[0], 0, c[0])], [0, f[1], c[1]], [0, 0, 1]] for f, c in ((e["focal"], e["princpt"]) for e in entries)]
    (tmp_path / "set" / "training_K.json").write_text(json.dumps(lens))
    (tmp_path / "set" / "training_xyz.json").write_text(json.dumps([_metres(e) for e in entries]))
    assert main(["freihand", "--input", str(tmp_path / "set"), "--output", str(tmp_path / "out")]) == 0
    # this folder lacks the three other backgrounds, which are counted as missing
    _check_real(tmp_path / "out", {f"freihand_training_{i:08d}": e for i, e in enumerate(entries)})


@needs_realhands
def test_real_interhand_annotations_are_preserved(tmp_path: Path) -> None:
    entries, images = _real("interhand2.6m"), {}
    for entry in entries:
        images.setdefault(entry["image"], []).append(entry)
    data, camera, joints, keys = {"images": [], "annotations": []}, {}, {}, {}
    rotation, position = convert_sets._camera(5)
    for number, (name, hands) in enumerate(images.items()):
        file = f"Capture0/ROM01/cam{number}/image{number}.jpg"
        put(tmp_path / "set" / "images" / "test" / file, (REALHANDS / name).read_bytes())
        world, valid = np.ones((42, 3)), np.zeros(42)
        for hand in hands:
            at = (21 if hand["handedness"] == "left" else 0) + TO_OPENPOSE
            world[at], valid[at] = np.array(hand["joint_cam"]) @ rotation + position, hand["joint_valid"]
            keys[f"interhand_test_{file[:-4].replace('/', '-')}_{hand['handedness']}"] = hand
        kind = "interacting" if len(hands) == 2 else hands[0]["handedness"]
        info = {"capture": 0, "seq_name": "ROM01", "camera": str(number), "frame_idx": number, "file_name": file}
        data["images"].append({"id": number, **info})
        data["annotations"].append({"image_id": number, "hand_type": kind, "joint_valid": valid.tolist()})
        joints[str(number)] = {"world_coord": world.tolist()}
        lens = {"campos": position.tolist(), "camrot": rotation.tolist()}
        for key, value in {**lens, "focal": hands[0]["focal"], "princpt": hands[0]["princpt"]}.items():
            camera.setdefault(key, {})[str(number)] = value
    for name, content in {"data": data, "camera": {"0": camera}, "joint_3d": {"0": joints}}.items():
        path = tmp_path / "set" / "annotations" / "all" / f"InterHand2.6M_test_{name}.json"
        put(path, json.dumps(content).encode())
    arguments = ["--split", "test", "--input", str(tmp_path / "set"), "--output", str(tmp_path / "out")]
    assert main(["interhand", *arguments]) == 0
    _check_real(tmp_path / "out", keys)


def _real(source: str) -> list[dict]:
    entries = json.loads((REALHANDS / "annotations.json").read_text(encoding="utf-8"))
    return [entry for entry in entries if entry["source"] == source]


def _metres(entry: dict) -> list[list[float]]:
    return (np.array(entry["joint_cam"]) / 1000).tolist()


def _check_real(output: Path, wanted: dict[str, dict]) -> None:
    shards = [str(s) for s in sorted(output.glob("*.tar"))]
    got = {s["__key__"]: s for s in wds.WebDataset(shards, shardshuffle=False).decode("rgb")}
    assert sorted(got) == sorted(wanted)
    for key, sample in got.items():
        entry = wanted[key]
        valid = np.array(entry["joint_valid"]) > 0
        assert sample["json"]["handedness"] == entry["handedness"]
        assert (sample["joint_2d_valid.npy"][0] > 0).tolist() == valid.tolist()
        assert np.abs(sample["joint_img.npy"][0] - entry["joint_img"])[valid].max() < 0.1
        assert np.abs(sample["joint_cam.npy"][0] - entry["joint_cam"])[valid].max() < 0.01
        assert np.allclose(sample["hand_bbox.npy"][0], entry["bbox"], atol=0.1)
