"""What all converters share: interruptions, processes, options, the MANO check, malicious annotations."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from script.make_shards import main
from src.data.convert.annotate import plain_key, tight_box, turn_root, visible_joints
from src.data.convert.chunk import Chunk, Job, Request
from src.data.convert.dexycb_split import takes_sequence
from src.data.convert.job import run
from src.data.convert.mano_check import apply_convention, find_convention, left_shape_map
from src.data.image import image_info
from src.data.shards.errors import SampleError
from src.data.shards.safe_parse import parse_pickle
from src.data.shards.writer import HandRecord
from src.hand.mano import ManoLayer
from src.hand.mano_file import load_pose_components
from src.hand.skeleton import HandArrays
from tests.convert_sets import draw, encoded_image, fk, hand_content, layer, write_freihand, write_mano
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def mano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mano(tmp_path_factory.mktemp("mano") / "MANO_RIGHT.npz")


def tars(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("**/*.tar"))}


def read_slowly(first: int, pause: float) -> object:
    """A chunk of three hands and a gap, one hand every `pause` seconds. At module level, so that it can be pickled."""
    for i in range(first, first + 3):
        time.sleep(pause)
        if i % 5 == 4:
            yield SampleError("gap")
            continue
        joint = np.arange(42.0).reshape(21, 2) + i
        image = encoded_image(i, (64, 64))
        yield HandRecord(f"k{i:03d}", image, "jpg", "left", "test", joint_img=joint, joint_2d_valid=np.ones(21))


def slow_job(pause: float = 0.0) -> Job:
    return Job("slow", [Chunk(f"{i:06d}", 3, read_slowly, (3 * i, pause)) for i in range(4)], 1.0)


def test_shards_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    for num_process in (1, 2):
        request = Request(tmp_path, tmp_path / str(num_process), "all", num_process)
        reported: list[tuple[int, int]] = []
        summary = run(slow_job(), request, lambda done, total, reported=reported: reported.append((done, total)))
        assert (summary.num_hand, summary.num_shard, summary.skipped) == (10, 4, {"gap": 2})
        assert (reported[0], reported[-1], len(reported)) == ((0, 12), (12, 12), 5)
    assert tars(tmp_path / "1") == tars(tmp_path / "2")
    assert list(tars(tmp_path / "1")) == [f"{i:06d}.tar" for i in range(4)]


def test_a_killed_conversion_resumes(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from tests.test_convert import *; "
        f"run(slow_job(0.25), Request(Path({str(tmp_path)!r}), Path({str(tmp_path / 'out')!r}), 'all', 2))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = tmp_path / "convert_slowly.py"
    script.write_text(f"if __name__ == '__main__':\n    {code}\n")
    process = subprocess.Popen([sys.executable, str(script)], cwd=ROOT, env=environment)
    notes = tmp_path / "out" / ".convert"
    while process.poll() is None and len(list(notes.glob("0*.json"))) < 1:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {p.name: p.stat().st_mtime_ns for p in notes.glob("0*.json")}
    assert 1 <= len(kept) < 4
    made = {name: (tmp_path / "out" / f"{name[:6]}.tar").stat().st_mtime_ns for name in kept}
    request = Request(tmp_path, tmp_path / "out", "all")
    summary = run(slow_job(), request)
    assert (summary.num_hand, summary.num_shard, summary.skipped) == (10, 4, {"gap": 2})
    assert made == {
        name: (tmp_path / "out" / f"{name[:6]}.tar").stat().st_mtime_ns for name in kept
    }  # not converted again
    run(slow_job(), Request(tmp_path, tmp_path / "whole", "all"))
    assert tars(tmp_path / "out") == tars(tmp_path / "whole")
    assert not list((tmp_path / "out").glob("**/*.part"))


def test_a_lost_shard_is_rewritten_and_different_arguments_are_refused(tmp_path: Path) -> None:
    request = Request(tmp_path, tmp_path / "out", "all")
    run(slow_job(), request)
    before = tars(tmp_path / "out")
    (tmp_path / "out" / "000002.tar").unlink()
    run(slow_job(), request)
    assert tars(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"was written with split='all', this call has 'val'; delete that folder"):
        run(slow_job(), Request(tmp_path, tmp_path / "out", "val"))
    (tmp_path / "out" / "convert.json").unlink()
    with pytest.raises(ValueError, match=r"contains shards but no convert\.json"):
        run(slow_job(), request)


def test_the_script_in_parallel_gives_the_same_bytes(tmp_path: Path, mano: Path) -> None:
    write_freihand(tmp_path / "set", mano)
    options = ["--input", str(tmp_path / "set"), "--num_per_shard", "6", "--mano", str(mano)]
    command = [sys.executable, "script/make_shards.py", "freihand", *options, "--num_process", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "20 hands in 4 shards" in done.stdout
    assert main(["freihand", *options, "--num_process", "1", "--output", str(tmp_path / "one")]) == 0
    assert tars(tmp_path / "one") == tars(tmp_path / "two")


def test_a_set_without_images_fails(tmp_path: Path, mano: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = write_freihand(tmp_path / "set", mano, 2)
    (tmp_path / "set" / "training" / "rgb").rename(tmp_path / "rgb")
    (tmp_path / "set" / "training" / "rgb").mkdir()
    options = ["--input", str(tmp_path / "set"), "--output", str(tmp_path / "out"), "--num_process", "1"]
    assert main(["freihand", *options]) == 2
    output = capsys.readouterr().err
    assert "no hand could be used ({'missing_image': 8})" in output
    assert "skipped as missing_image, for example: " in output
    (tmp_path / "set" / "training" / "rgb").rmdir()
    (tmp_path / "rgb").rename(tmp_path / "set" / "training" / "rgb")
    (tmp_path / "set" / "training" / "rgb" / "00000003.jpg").unlink()
    assert main(["freihand", *options]) == 0  # repeating the call finds the images
    assert f"{len(truth) - 1} hands in 1 shards" in (output := capsys.readouterr().out)
    assert "skipped: missing_image 1" in output


def test_an_unusable_mano_file_is_named_and_does_not_bind_the_folder(
    tmp_path: Path, mano: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_freihand(tmp_path / "set", mano, 1)
    left = dict(hand_content())
    left["v_template"] = left["v_template"] * [-1, 1, 1]
    (tmp_path / "mano").mkdir()
    np.savez(tmp_path / "mano" / "MANO_LEFT.npz", **left)
    options = ["freihand", "--input", str(tmp_path / "set"), "--output", str(tmp_path / "out"), "--num_process", "1"]
    refused = {
        "nowhere.pkl": "--mano nowhere.pkl: there is no such file",
        str(tmp_path / "mano"): "this folder does not contain MANO_RIGHT.pkl",
        str(tmp_path / "mano" / "MANO_LEFT.npz"): "is the left hand",
    }
    for path, message in refused.items():
        assert main([*options, "--mano", path]) == 2
        assert message in capsys.readouterr().err
    assert main([*options, "--mano", str(mano)]) == 0
    dexycb = ["dexycb", *options[1:], "--mano_left", str(mano.parent)]
    assert main(dexycb) == 2
    assert "this folder does not contain MANO_LEFT.pkl" in capsys.readouterr().err


def left_hands_of_published_file(num: int) -> list[HandRecord]:
    """Left hands posed with a MANO_LEFT whose shape directions were not mirrored in x."""
    content = hand_content()
    names = {"v_template", "posedirs"}
    hand = HandArrays(
        name="left file, mirrored",
        shapedirs=content["shapedirs"] * np.float32([-1, 1, 1])[:, None],
        joint_regressor=content["J_regressor"],
        skin_weights=content["weights"],
        faces=content["f"],
        mean_pose=content["hands_mean"],
        tip_vertex_ids=(744, 320, 443, 554, 671),
        **{name: content[name] for name in names},
    )
    posed, records = ManoLayer(hand), []
    for number in range(num):
        pose, shape = draw(number)
        mirrored = (pose.reshape(16, 3) * [1, -1, -1]).reshape(48)
        with torch.inference_mode():
            rotmat = posed.pose_to_rotmat(torch.tensor(pose[None], dtype=torch.float32), False)
            joint = posed(rotmat, torch.tensor(shape[None], dtype=torch.float32)).joint[0].double().numpy()
        record = HandRecord(f"h{number}", b"", "jpg", "left", "test", joint_cam=joint * [-1, 1, 1] + [5.0, 6.0, 700.0])
        known = {"joint_3d_valid": np.ones(21), "mano_pose": mirrored, "mano_shape": shape}
        records.append(HandRecord(**{**record.__dict__, **known, "hand_model": "mano", "flat_hand_mean": False}))
    return records


def test_betas_of_the_published_left_file_are_detected_and_converted(mano: Path) -> None:
    records = left_hands_of_published_file(6)
    unconverted = find_convention(records, mano, "left", 1.0, left_file_shape=False)
    converted = find_convention(records, mano, "left", 100.0, left_file_shape=True)
    assert unconverted is not None
    assert converted is not None
    assert not unconverted.use
    assert (converted.use, converted.left_file_shape, converted.flat_hand_mean) == (True, True, False)
    assert converted.error_mm < 0.7 * unconverted.error_mm
    changed = apply_convention(records[0], {"left": converted}, mano)
    assert np.allclose(changed.mano_shape, left_shape_map(mano) @ records[0].mano_shape)
    assert apply_convention(records[0], {"left": unconverted}, mano).mano_pose is None
    assert apply_convention(records[0], {"right": unconverted}, mano) is records[0]
    assert find_convention([], mano, "left", 1.0, left_file_shape=True) is None


def test_left_shape_map_gives_the_closest_shape(mano: Path) -> None:
    dirs = hand_content()["shapedirs"].astype(np.float64)
    wanted = dirs * np.array([-1.0, 1.0, 1.0])[:, None]
    shape = np.random.default_rng(0).normal(size=10)
    best = left_shape_map(mano) @ shape

    def distance(beta: np.ndarray) -> float:
        return float(np.linalg.norm(dirs @ beta - wanted @ shape))

    step = 1e-2 * np.eye(10)
    assert all(distance(best) <= distance(best + sign * row) for row in step for sign in (-1, 1))
    assert distance(best) < distance(shape)


def test_pose_components_are_read_from_both_files(tmp_path: Path, mano: Path) -> None:
    left = write_mano(tmp_path / "MANO_LEFT.npz")
    assert (load_pose_components(left) == hand_content()["hands_components"]).all()
    np.savez(tmp_path / "short.npz", hands_components=np.zeros((6, 45)))
    for name, why in (("short.npz", r"must be \[45, 45\]"), ("none.npz", "does not exist")):
        with pytest.raises(ValueError, match=why):
            load_pose_components(tmp_path / name)


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


class Plain:
    """An object with a state, of a class outside the allow-list."""

    def __init__(self) -> None:
        self.x = 1


CONTENT = {
    "c": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "big_endian": np.arange(3, dtype=">i2"),
    "flag": np.array([True, False]),
    "text": np.array(["ab", "c"]),
    "empty": np.zeros((0, 3)),
    "scalar": np.float32(3.5),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_plain_data_are_parsed(protocol: int, tmp_path: Path) -> None:
    plain = {"n": None, "t": (1, 2.5, "é"), "b": b"\xff\x00", "i": -(2**70), "s": {1, 2}, "o": OrderedDict(a=[True])}
    nested = {"zero": np.array({"loss": 1.0}), "list": np.array([None, "a"], object)}
    shared = [1, 2]
    got = parse_pickle(pickle.dumps([plain, CONTENT, nested, shared, shared], protocol))
    assert got[0] == plain
    for name, value in CONTENT.items():
        assert (got[1][name] == value).all(), name
        assert (got[1][name].shape, got[1][name].dtype) == (value.shape, value.dtype)
    assert got[2] == {"zero": {"loss": 1.0}, "list": [None, "a"]}
    assert got[3] is got[4]
    for hostile in (Bomb(tmp_path / "trace"), {"x": [Bomb(tmp_path / "trace")]}, Plain(), Path, np.array([Plain()])):
        with pytest.raises(SampleError, match="unsafe_pickle"):
            parse_pickle(pickle.dumps(hostile, protocol))
    assert not (tmp_path / "trace").exists()


def test_pickles_of_python_2_hold_array_bytes_as_text() -> None:
    header = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I3\ntcnumpy\ndtype\n"
    dtype = b"(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n"
    value = np.array([1.5, -2.25, 1e300])
    content = b"S" + repr(value.tobytes())[1:].encode() + b"\n"
    assert (parse_pickle(header + dtype + content + b"tb.") == value).all()


def test_malformed_pickles_have_a_reason() -> None:
    whole = pickle.dumps([CONTENT, list(range(50))], 4)
    for size in range(0, len(whole), 7):
        with pytest.raises(SampleError, match="bad_pickle"):
            parse_pickle(whole[:size])
    huge = b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(L99999999999999L\nt"
    zeros = b"\x80\x04cbuiltins\nbytes\n(J\xff\xff\xff\x7ftR."  # a call that would make 2 GiB
    announced = b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x."
    deep = b")" + b"\x85" * 10**6  # a tuple in a tuple in a tuple ...: hashing it crashes Python
    for data in (
        b"}" + deep + b"Ns.",
        b"\x8f(" + deep + b"\x90.",
        deep + b"N\x93.",
        deep + b")R.",
        b"c_codecs\nencode\n(Va\n" + deep + b"tR.",
        zeros,
        announced,
        b"",
        b"garbage",
        b"\x80\x04ctests\nnothing",
        b"e.",
        b"(.",
        huge + b"N.",
        b"N" * 10 + b".",
    ):
        with pytest.raises(SampleError):
            parse_pickle(data)


def test_image_headers_are_read_without_decoding() -> None:
    assert image_info(encoded_image(1, (333, 222), "jpg")) == ("jpg", (333, 222))
    assert image_info(encoded_image(1, (33, 22), "png")) == ("png", (33, 22))
    progressive = cv2.imencode(".jpg", np.zeros((20, 30, 3), np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    with_exif = progressive[:2] + b"\xff\xe1\x00\x06abcd" + progressive[2:]
    assert image_info(with_exif) == ("jpg", (30, 20))
    for data in (b"", b"\xff\xd8", b"GIF89a" + bytes(40), encoded_image(1, (64, 64))[:30], bytes(500)):
        with pytest.raises(SampleError, match="undecodable_image"):
            image_info(data)


def test_visible_joints_and_their_box() -> None:
    pixel = np.array([[0.0, 0.0], [63.4, 31.4], [63.6, 5.0], [-0.6, 5.0], [np.nan, 1.0], [5.0, 6.0]])
    valid = visible_joints(pixel, (64, 32), np.array([1, 1, 1, 1, 1, 0]))
    assert valid.tolist() == [1, 1, 0, 0, 0, 0]
    assert tight_box(pixel, valid).tolist() == [0, 0, 63.4, 31.4]
    with pytest.raises(SampleError, match="no_valid_joint"):
        tight_box(pixel, np.zeros(6))
    with pytest.raises(SampleError, match="small_box"):
        tight_box(pixel, np.eye(6)[0])
    assert plain_key("a.b/c", "x y", 7) == "a-b-c_x-y_7"


def test_rotating_the_root_rotates_the_hand(mano: Path) -> None:
    pose, shape = draw(3)
    rotation = cv2.Rodrigues(np.array([0.3, -2.0, 0.9]))[0]
    for is_right in (True, False):
        turned = fk(mano, turn_root(pose, rotation), shape, is_right, False)
        assert np.abs(turned - fk(mano, pose, shape, is_right, False) @ rotation.T).max() < 0.01
    assert layer(mano).num_vertex == 778


def test_dexycb_setups_match_the_official_ones() -> None:
    counts = {
        (s, p): sum(takes_sequence(s, p, i) for i in range(100)) for s in ("s0", "s3") for p in ("train", "val", "test")
    }
    assert counts == {
        ("s0", "train"): 80,
        ("s0", "val"): 20,
        ("s0", "test"): 20,
        ("s3", "train"): 75,
        ("s3", "val"): 10,
        ("s3", "test"): 15,
    }
    assert [i for i in range(20) if not takes_sequence("s0", "train", i)] == [4, 9, 14, 19]
    assert [i for i in range(100) if takes_sequence("s3", "val", i)] == [*range(15, 20), *range(95, 100)]
