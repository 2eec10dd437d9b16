"""Both formats are read as webdataset reads them, and nothing in a shard can execute code."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from src.batch import Sample
from src.data.image import decode_image
from src.data.sample import make_sample
from src.data.shards.build_index import build_index
from src.data.shards.errors import SampleError
from src.data.shards.format import parse_clip
from src.data.shards.paths import resolve_source
from src.data.shards.reader import ShardReader
from src.data.shards.safe_parse import parse_npy, pickled_image_spans
from tests.data_shards import WIDTH, encode, image_of, lab_sample, native_sample, raw_members, write_shard, write_tar
from tests.helpers import ROOT


class Bomb:
    """Unpickling this leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def read_all(path: Path, hand_model: str = "mano") -> list[Sample]:
    index = build_index(path)
    assert not index.bad_count, index.bad
    reader = ShardReader(index, stride=1)
    rows = (reader.read(row) for row in range(index.num_frame()))
    return [make_sample(clip, number, decode_image(data), key, hand_model) for key, clip, number, data in rows]


@pytest.mark.parametrize("generation", [1, 2])
def test_lab_shards_are_read_as_webdataset_reads_them(tmp_path: Path, generation: int) -> None:
    path = write_shard(tmp_path / "lab.tar", [lab_sample(number, 3, generation) for number in range(4)])
    ours = iter(read_all(path))
    count = 0
    for theirs in wds.WebDataset(str(path), shardshuffle=False).decode():
        images = theirs["img_bytes.pickle"]
        for t in range(3):
            sample, count = next(ours), count + 1
            assert sample.key == f"{theirs['__key__']}/{t}"
            assert (sample.image == decode_image(images[t])).all()
            assert sample.is_right == (theirs["handedness.json"] == "right")
            assert not sample.flat_hand_mean
            valid = theirs["joint_valid.npy"][t]
            for name in ("hand_bbox", "focal", "princpt"):
                assert (getattr(sample, name) == theirs[f"{name}.npy"][t]).all()
            assert (sample.joint_cam == theirs["joint_cam.npy"][t] * valid[:, None]).all()
            assert (sample.joint_3d_valid == valid).all()
            assert (sample.joint_2d_valid == (valid if generation == 1 else 1)).all()
            assert sample.has_mano == (generation == 1)
            assert (sample.mano_pose == theirs["mano_pose.npy"][t] * sample.has_mano).all()
            assert sample.has_intr
            assert sample.source == ("unknown" if generation == 1 else "lab")
    assert count == 12
    assert next(ours, None) is None


def test_webp_pixels_equal_those_written(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "lab.tar", [lab_sample(5, 2, 1)])
    assert [(s.image == image_of(500 + t)).all() for t, s in enumerate(read_all(path))] == [True, True]


@pytest.mark.parametrize("num_frame", [1, 3])
def test_native_shards(tmp_path: Path, num_frame: int) -> None:
    samples = [native_sample(number, num_frame) for number in range(3)]
    read = read_all(write_shard(tmp_path / "native.tar", samples))
    assert [s.key for s in read] == [f"{n:05d}/{t}" for n in range(3) for t in range(num_frame)]
    for i, sample in enumerate(read):
        number, t = divmod(i, num_frame)
        assert (sample.image == image_of(100 * number + t)).all()
        assert (sample.joint_img == samples[number]["joint_img.npy"][t]).all()
        assert sample.joint_2d_valid.all()
        assert (sample.has_mano, sample.has_intr, sample.flat_hand_mean) == (True, True, True)


def test_json_strings_may_lack_quotes(tmp_path: Path) -> None:
    sample = {**lab_sample(1, 1, 2), "handedness.json": "right", "data_source.json": "HO3D_v3"}
    (read,) = read_all(write_shard(tmp_path / "lab.tar", [sample]))
    assert (read.is_right, read.source) == (True, "HO3D_v3")


def test_missing_arrays_are_unknown() -> None:
    sample = native_sample(1)
    members = {k: v for k, v in raw_members(sample).items() if k.split(".", 1)[1] in ("json", "joint_img.npy")}
    clip = parse_clip({k.split(".", 1)[1]: v for k, v in members.items()})
    made = make_sample(clip, 0, image_of(0), "k", "mano")
    assert not made.joint_3d_valid.any()
    assert not made.joint_cam.any()
    assert (made.has_mano, made.has_intr) == (False, False)
    assert made.focal.tolist() == pytest.approx([np.hypot(96, 64)] * 2)
    assert made.princpt.tolist() == [47.5, 31.5]
    joint = sample["joint_img.npy"][0]
    assert made.hand_bbox.tolist() == [*joint.min(axis=0), *joint.max(axis=0)]


@pytest.mark.parametrize(("intr_type", "has_intr", "is_stated"), [
    ("real", True, True), ("fixed_virtual", False, True), ("none", False, False), (None, True, True)
])  # fmt: skip
def test_a_virtual_camera_is_used_but_not_counted_as_real(
    tmp_path: Path, intr_type: str | None, has_intr: bool, is_stated: bool
) -> None:
    word = {} if intr_type is None else {"intr_type.json": intr_type}
    lab = {**lab_sample(3, 2, 2), **word}
    native = native_sample(1, **({} if intr_type is None else {"intr_type": intr_type}))
    for number, sample in enumerate((lab, native)):
        for t, read in enumerate(read_all(write_shard(tmp_path / f"{number}.tar", [sample]))):
            assert read.has_intr is has_intr
            if is_stated:
                assert (read.focal == sample["focal.npy"][t]).all()
                assert (read.princpt == sample["princpt.npy"][t]).all()
            else:
                assert read.focal.tolist() == pytest.approx([np.hypot(96, 64)] * 2)
                assert read.princpt.tolist() == [47.5, 31.5]


def test_parameters_of_another_hand_model_are_not_used(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "native.tar", [native_sample(1, hand_model="standin")])
    (other,), (same,) = read_all(path, "mano"), read_all(path, "standin")
    assert (other.has_mano, same.has_mano) == (False, True)
    assert not other.mano_pose.any()


def not_finite(sample: dict, name: str) -> np.ndarray:
    array = sample[name].copy()
    array[0, 0] = np.nan
    return array


@pytest.mark.parametrize(
    ("suffix", "value", "reason"),
    [
        ("joint_img.npy", lambda s: s["joint_img.npy"][:, :20], "wrong_shape"),
        ("joint_img.npy", lambda s: s["joint_img.npy"].astype(np.complex64), "wrong_dtype"),
        ("joint_cam.npy", lambda s: not_finite(s, "joint_cam.npy"), "not_finite"),
        ("mano_pose.npy", lambda s: np.full((1, 48), 1e300), "not_finite"),
        ("hand_bbox.npy", lambda s: np.array([[5.0, 5, 5, 5]]), "bad_bbox"),
        ("focal.npy", lambda s: np.array([[-1.0, 5]]), "bad_intrinsics"),
        ("joint_2d_valid.npy", lambda s: np.zeros((1, 21)), "bad_bbox"),  # and no box
        ("json", lambda s: {"handedness": "both"}, "bad_value"),
        ("json", lambda s: [1], "bad_json"),
        ("png", lambda s: b"\0" * 100, "undecodable_image"),
    ],
)
def test_bad_samples_are_counted_by_reason(tmp_path: Path, suffix: str, value: object, reason: str) -> None:
    bad = native_sample(1)
    broken = {**bad, suffix: value(bad)}
    if suffix == "joint_2d_valid.npy":
        del broken["hand_bbox.npy"]
    index = build_index(write_shard(tmp_path / "a.tar", [native_sample(0), broken, native_sample(2)]))
    assert index.bad_count == {reason: 1}
    assert index.bad[0].key.startswith("00001")
    assert index.num_frame() == 2


def test_missing_members_are_counted(tmp_path: Path) -> None:
    members = {}
    for number, leave_out in enumerate(["png", "json", "none"]):
        raw = raw_members(native_sample(number))
        members |= {name: data for name, data in raw.items() if not name.endswith(leave_out)}
    index = build_index(write_tar(tmp_path / "a.tar", members))
    assert index.bad_count == {"missing_member": 2}
    assert index.num_frame() == 1


@pytest.mark.parametrize("protocol", range(3, 6))
@pytest.mark.parametrize("container", [list, tuple])
def test_pickled_images_are_located_without_unpickling(protocol: int, container: type) -> None:
    same = b"\xff\xd8\xff" * 30
    images = container([same, b"RIFF" + bytes(300), bytes(70_000), same])
    data = pickle.dumps(images, protocol=protocol)
    assert [data[begin : begin + size] for begin, size in pickled_image_spans(data)] == list(images)
    many = pickle.dumps([bytes([i % 256]) * 9 for i in range(2500)], protocol=protocol)
    assert len(pickled_image_spans(many)) == 2500


def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for value in (Bomb(trace), [Bomb(trace)], [b"x", {"a": 1}], "text", [[b"x"]], [np.zeros(3)]):
        with pytest.raises(SampleError) as caught:
            pickled_image_spans(pickle.dumps(value))
        assert caught.value.reason == "unsafe_pickle"
    for data, why in (
        (b"", "ends too early"),
        (b"\x1f\x8b", "not a pickle"),
        (pickle.dumps([b"x" * 999])[:-20], "announced"),
    ):
        with pytest.raises(SampleError, match=f"bad_pickle: .*{why}"):
            pickled_image_spans(data)
    sample = {**lab_sample(1, 1, 1), "img_bytes.pickle": pickle.dumps([Bomb(trace)])}
    index = build_index(write_shard(tmp_path / "a.tar", [lab_sample(0, 1, 1), sample]))
    assert index.bad_count == {"unsafe_pickle": 1}
    assert not trace.exists()


def npy(array: np.ndarray, **knob: object) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **knob)
    return file.getvalue()


def test_arrays_are_parsed_as_numpy_writes_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for array in (
        rng.random((3, 4)),
        np.asfortranarray(rng.random((3, 4))),
        np.arange(5, dtype=">i4"),
        np.zeros((0, 2)),
    ):
        for version in ((1, 0), (2, 0), (3, 0)):
            parsed = parse_npy(npy(array, version=version))
            assert parsed.dtype == array.dtype
            assert (parsed == array).all()
            assert parsed.shape == array.shape
    trace = tmp_path / "trace"
    with pytest.raises(SampleError, match="object_array"):
        parse_npy(npy(np.array([Bomb(trace)]), allow_pickle=True))
    assert not trace.exists()
    for damaged in (npy(np.zeros(5))[:-1], npy(np.zeros(5)) + b"x", b"\x93NUMPY", bytes(200), npy(np.zeros(5))[:40]):
        with pytest.raises(SampleError, match="bad_npy"):
            parse_npy(damaged)


@pytest.mark.parametrize(
    "pattern", ["pipe:touch x", "http://host/a.tar", "s3://bucket/{0..3}.tar", "file:///etc/a.tar"]
)
def test_patterns_that_are_not_files_are_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match="is not supported") as caught:
        resolve_source(tmp_path, [pattern], "DATA.val.source")
    assert "DATA.val.source" in str(caught.value)
    assert pattern in str(caught.value)


def test_patterns_resolve_to_shards(tmp_path: Path) -> None:
    for name in ("a/0.tar", "a/1.tar", "a/1.tar.index", "a/notes.txt", "b/2.tar", "b/c/3.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(*patterns: str) -> list[str]:
        return [str(p.relative_to(tmp_path)) for p in resolve_source(tmp_path, patterns)]

    assert names("a/*") == ["a/0.tar", "a/1.tar"]
    assert names("a/{0..1}.tar", "a/1.tar") == ["a/0.tar", "a/1.tar"]
    assert names("a") == names("{a,a/*}") == ["a/0.tar", "a/1.tar"]
    assert names(str(tmp_path / "b/*")) == ["b/2.tar", "b/c/3.tar"]
    assert names("**/*.tar") == ["a/0.tar", "a/1.tar", "b/2.tar", "b/c/3.tar"]
    for pattern in ("a/*.zip", "nothing/*", "a/{0..2}.tar", "a/{0..1"):
        with pytest.raises(ValueError, match=r"DATA\.train\.source=") as caught:
            names(pattern)
        assert pattern in str(caught.value)
    with pytest.raises(ValueError, match="HAND_DATA_ROOT"):
        names("nothing/*")


def test_resolving_patterns_imports_no_heavy_module() -> None:
    code = (
        "import sys, src.data.shards.paths; print(sorted({'numpy', 'cv2', 'torch', 'webdataset'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_workers_need_no_torch() -> None:
    code = (
        "import sys, src.data.dataset, src.data.order.plan, src.data.shards.build_index; print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_tar_dialects(tmp_path: Path, tar_format: int) -> None:
    folder = "/".join(["folder" * 4] * 4) if tar_format == tarfile.USTAR_FORMAT else "folder" * 40
    members = {f"__{i}__/{n}": d for i in range(1) for n, d in raw_members(native_sample(9)).items()}
    for number in range(2):
        members |= {f"{folder}/{name}": data for name, data in raw_members(native_sample(number)).items()}
    path = write_tar(tmp_path / "a.tar", members, tar_format)
    theirs = [s["__key__"] for s in wds.WebDataset(str(path), shardshuffle=False)]
    assert (
        [s.key for s in read_all(path)] == [f"{key}/0" for key in theirs] == [f"{folder}/0000{n}/0" for n in range(2)]
    )


def test_exif_orientation_is_ignored() -> None:
    jpeg = encode(image_of(0), "jpeg")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    turned = jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]
    assert decode_image(turned).shape[1] == WIDTH
    assert (decode_image(turned) == decode_image(jpeg)).all()
