"""The labs' shards, written as their writers write them: two generations, all forms of images, text and layouts."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import webdataset as wds

from script.check_shards import main as check_main
from src.batch import Sample
from src.data.health import DataHealth
from src.data.image import decode_image
from src.data.loader import build_train_loader
from src.data.sample import make_sample
from src.data.shards.annotation import Clip
from src.data.shards.build_index import build_index, open_indexes
from src.data.shards.errors import SampleError
from src.data.shards.format import parse_clip
from src.data.shards.reader import ShardReader
from src.data.shards.safe_parse import pickled_image_spans, stored_image
from src.utils.restricted_pickle import TextSpan
from tests.data_shards import HEIGHT, WIDTH, data_config, hand_arrays, image_of, lab_sample, raw_members, write_shard

NUM_FRAME = 3
DEFAULT = None  # the protocol of pickle.dumps without an argument


def webp(number: int) -> np.ndarray:
    """What cv2.imencode returns, as the labs call it: [N] uint8."""
    success, buffer = cv2.imencode(".webp", image_of(number)[..., ::-1], [cv2.IMWRITE_WEBP_QUALITY, 100])
    assert success
    return buffer


def columns(buffer: np.ndarray) -> np.ndarray:
    """What cv2.imencode of OpenCV before 4.5.4 returned: [N, 1]."""
    return buffer.reshape(-1, 1)


def strided(buffer: np.ndarray) -> np.ndarray:
    """The same bytes as a view that is not contiguous."""
    wide = np.zeros((len(buffer), 2), np.uint8)
    wide[:, 0] = buffer
    return wide[:, 0]


FORMS: dict[str, Callable[[list[np.ndarray]], Any]] = {
    "arrays": list,
    "columns": lambda buffers: [columns(b) for b in buffers],
    "strided": lambda buffers: [strided(b) for b in buffers],
    "read-only": lambda buffers: [np.frombuffer(b.tobytes(), np.uint8) for b in buffers],
    "bytes": lambda buffers: [b.tobytes() for b in buffers],
    "bytearrays": lambda buffers: [bytearray(b) for b in buffers],
    "mixed": lambda buffers: [f(b) for f, b in zip((bytearray, columns, np.ndarray.tobytes), buffers)],
    "tuple": tuple,
    "object array": lambda buffers: np.array([*buffers, None], dtype=object)[:-1],
    "one array thrice": lambda buffers: buffers[:1] * NUM_FRAME,
}


def lab_clip(number: int, generation: int, protocol: int | None = DEFAULT, form: str = "arrays") -> dict[str, Any]:
    """A clip of a lab's writer: json.dumps and pickle.dumps by hand, np.stack of float64, float32 and bool."""
    arrays = hand_arrays(number, NUM_FRAME)
    joint_img, joint_cam = arrays["joint_img"].astype(np.float64), arrays["joint_cam"].astype(np.float64)
    valid = (np.arange(21) % 5 > 0) * np.ones((NUM_FRAME, 1))
    images = FORMS[form]([webp(100 * number + t) for t in range(NUM_FRAME)])
    stacked = {
        "hand_bbox": arrays["hand_bbox"],
        "joint_img": joint_img,
        "joint_hand_bbox": joint_img - arrays["hand_bbox"][:, None, :2],
        "joint_cam": joint_cam,
        "joint_rel": joint_cam - joint_cam[:, :1],
        "joint_valid": valid,
        "mano_pose": arrays["mano_pose"],
        "mano_shape": arrays["mano_shape"],
        "mano_valid": np.stack([True] * NUM_FRAME),
        "timestamp": np.arange(NUM_FRAME) * 33.33333,
        "focal": arrays["focal"],
        "princpt": arrays["princpt"],
    }
    second: dict[str, Any] = {}
    if generation == 2:
        frames = [{"seq_name": "ABF10", "frame_name": f"{t:04d}", "handedness": "right"} for t in range(NUM_FRAME)]
        second = {
            "data_source.json": "HO3D v3",  # a str: the writer stores it without quotes
            "source_split.json": json.dumps("train"),
            "intr_type.json": json.dumps("real"),
            "source_index.json": json.dumps(frames),
        }
        stacked |= {
            "joint_2d_valid": np.ones((NUM_FRAME, 21), np.float32),
            "joint_3d_valid": valid.astype(np.float32),
            "has_mano": np.ones(NUM_FRAME, np.float32),
            "has_intr": np.ones(NUM_FRAME, np.float32),
        }
    return {
        "__key__": f"0_{number}_ho3d",
        "imgs_path.json": json.dumps([f"train/ABF10/rgb/{t:04d}.jpg" for t in range(NUM_FRAME)]),
        "img_bytes.pickle": pickle.dumps(images, protocol),
        "handedness.json": json.dumps("right" if number % 2 else "left"),
        "additional_desc.json": json.dumps([{}] * NUM_FRAME),
        **second,
        **{f"{name}.npy": array for name, array in stacked.items()},
    }


def read_all(path: Path) -> list[Sample]:
    index = build_index(path)
    assert not index.bad_count, index.bad
    reader = ShardReader(index, stride=1)
    rows = (reader.read(row) for row in range(index.num_frame()))
    return [make_sample(clip, number, decode_image(data), key, "mano") for key, clip, number, data in rows]


@pytest.mark.parametrize("generation", [1, 2])
@pytest.mark.parametrize("protocol", [DEFAULT, 2, 3, 4, 5])
def test_both_generations_are_read_with_nothing_lost(tmp_path: Path, generation: int, protocol: int | None) -> None:
    clips = [lab_clip(number, generation, protocol) for number in range(4)]
    (tmp_path / "train").mkdir()
    with wds.ShardWriter(f"{tmp_path}/train/worker0-%06d.tar", verbose=0) as sink:
        for clip in clips:
            sink.write(clip)
    (path,) = tmp_path.glob("train/*")
    ours = iter(read_all(path))
    binary = [name for name in clips[0] if not name.endswith(".json")]  # their text may be no JSON
    for theirs in wds.WebDataset(str(path), shardshuffle=False).decode(only=binary):
        number = int(theirs["__key__"].split("_")[1])
        for t, buffer in enumerate(theirs["img_bytes.pickle"]):
            sample = next(ours)
            assert sample.key == f"{theirs['__key__']}/{t}"
            pixels = cv2.imdecode(webp(100 * number + t), cv2.IMREAD_COLOR)[..., ::-1]
            assert (sample.image == pixels).all()
            assert (sample.image == cv2.imdecode(buffer, cv2.IMREAD_COLOR)[..., ::-1]).all()
            assert sample.is_right == (json.loads(theirs["handedness.json"]) == "right")
            assert sample.source == ("unknown" if generation == 1 else "HO3D v3")
            assert (sample.has_mano, sample.has_intr) == (True, True)
            for name in ("hand_bbox", "joint_img", "joint_cam", "focal", "princpt", "mano_pose"):
                valid = {"joint_img": sample.joint_2d_valid, "joint_cam": sample.joint_3d_valid}.get(name)
                expected = theirs[f"{name}.npy"][t].astype(np.float32) * (1 if valid is None else valid[:, None])
                assert (getattr(sample, name) == expected).all(), name
            assert (sample.joint_3d_valid == theirs["joint_valid.npy"][t]).all()
    assert next(ours, None) is None
    loader = build_train_loader(data_config(tmp_path), "mano", num_batch=3)
    assert sum(len(batch.key) for batch in loader) == 12
    assert loader.health.counts() == {}


def located_images(pickled: bytes) -> list[bytes]:
    return [
        bytes(stored_image(pickled[span.begin : span.begin + span.size], isinstance(span, TextSpan)))
        for span in pickled_image_spans(pickled)
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", range(1, 6))
def test_every_form_of_the_pickled_images(protocol: int, form: str) -> None:
    images = FORMS[form]([webp(t) for t in range(NUM_FRAME)])
    expected = [np.asarray(image).tobytes() if isinstance(image, np.ndarray) else bytes(image) for image in images]
    pickled = pickle.dumps(images, protocol)
    assert located_images(pickled) == expected
    older = pickled.replace(b"\x13numpy._core", b"\x12numpy.core").replace(b"\x16numpy._core", b"\x15numpy.core")
    older = older.replace(b"cnumpy._core", b"cnumpy.core")  # as numpy 1 names it
    assert b"numpy._core" not in older
    assert located_images(older) == expected
    if isinstance(images[0], np.ndarray):
        assert (b"numpy.core" in older) or protocol == 5


def test_images_stored_as_text_are_verified_and_selected_like_others(tmp_path: Path) -> None:
    paths = [write_shard(tmp_path / f"{p}.tar", [lab_clip(1, 1, p)]) for p in (2, 4)]
    frames = [build_index(path).tables().frame for path in paths]
    assert (frames[0]["crc"] == frames[1]["crc"]).all()  # validation selects frames by it
    assert frames[0]["is_text"].tolist() == [1, 1, 1]
    assert frames[1]["is_text"].tolist() == [0, 0, 0]
    index = build_index(paths[0])
    data = bytearray(paths[0].read_bytes())
    data[int(index.tables().sample["offset"][0]) + int(frames[0]["begin"][1]) + 50] ^= 0x81
    paths[0].write_bytes(data)
    reader = ShardReader(index, stride=1)
    with pytest.raises(SampleError, match=r"crc_image|stale_index"):
        reader.read(1)


def test_strings_of_python_2_and_bytearrays_of_early_python_3() -> None:
    image = webp(0).tobytes()
    raw = b"T" + len(image).to_bytes(4, "little") + image  # BINSTRING
    assert located_images(b"\x80\x02]q\x00(" + raw + b"q\x01" + raw + b"q\x02e.") == [image, image]
    text = image.decode("latin-1").encode()
    unicode = b"X" + len(text).to_bytes(4, "little") + text
    assert located_images(b"\x80\x02](c__builtin__\nbytearray\n" + unicode + b"U\x07latin-1\x86Re.") == [image]
    array = (
        b"\x80\x02](cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        b"J" + len(image).to_bytes(4, "little") + b"\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + raw + b"tbe."
    )
    assert located_images(array) == [image]


@pytest.mark.parametrize("form", ["bytes", "arrays", "columns", "bytearrays"])
def test_a_clip_of_one_frame_may_hold_the_image_alone(form: str) -> None:
    (image,) = FORMS[form]([webp(0)])
    assert located_images(pickle.dumps(image)) == [webp(0).tobytes()]


def text_of(member: str, data: bytes) -> Clip:
    members = {name.split(".", 1)[1]: data for name, data in raw_members(lab_sample(1, 1, 2)).items()}
    return parse_clip({**members, f"{member}.json": data})


NAMES = [
    "HO3D v3",
    "HO3D_v3",
    "2023 set",
    "InterHand2.6M (5 fps)",
    "手部",
    "naïve",
    "it's",
    'a "b" c',
    "a\\n",
    "🖐",
    "a/b:c",
]
NUMBERS_AND_WORDS_OF_JSON = ["123", "-1.5e3", "null", "true", "NaN", ""]


@pytest.mark.parametrize("name", NAMES + NUMBERS_AND_WORDS_OF_JSON)
def test_text_members_hold_any_name(name: str) -> None:
    stored = [
        name.encode(),  # webdataset's writer, of a str
        json.dumps(name).encode(),
        json.dumps(name, ensure_ascii=False).encode(),
        b" \n" + json.dumps(name).encode() + b"\r\n",
        name.encode() + b"\n",
        b"\xef\xbb\xbf" + name.encode(),
        b"\xef\xbb\xbf" + json.dumps(name).encode(),
        json.dumps(name).encode("utf-16"),
    ]
    for data in stored:
        assert text_of("data_source", data).source == (name or "unknown"), data
    assert text_of("data_source", b'"\\ud83d\\ude00 \\u0041\\t\\/"').source == "😀 A\t/"


@pytest.mark.parametrize(
    ("member", "data", "reason"),
    [
        ("data_source", b'"HO3D', "bad_json"),
        ("data_source", b'"HO3D" v3', "bad_json"),
        ("data_source", b"{HO3D", "bad_json"),
        ("data_source", bytes(20), "bad_json"),
        ("data_source", b"two\nlines", "bad_json"),
        ("data_source", b"na\xefve", "bad_json"),
        ("data_source", "HO3D v3".encode("utf-16"), "bad_json"),
        ("data_source", b'["HO3D"]', "bad_value: data_source.json holds a list"),
        ("handedness", b'"l"', "bad_value: handedness must be 'left' or 'right', not 'l'"),
        ("handedness", b"Right", "bad_value: handedness must be 'left' or 'right', not 'Right'"),
        ("handedness", b"", "bad_value"),
        ("handedness", b"null", "bad_value"),
        ("intr_type", b"Real", "bad_value: intr_type must be one of .*'pseudo', 'real', not 'Real'"),
        ("intr_type", b'"estimated"', "bad_value: .*not 'estimated'"),
        ("intr_type", b"null", "bad_value: .*not 'null'"),
        ("intr_type", b"", "bad_value: .*not ''"),
    ],
)
def test_other_text_is_refused_by_name(member: str, data: bytes, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        text_of(member, data)


def test_reports_name_the_refused_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = [{**lab_clip(number, 2), "intr_type.json": "estimated"} for number in range(2)]
    shard = write_shard(tmp_path / "a.tar", [*clips, lab_clip(2, 2)])
    check_main([str(shard)])
    assert "not 'estimated'" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    open_indexes([shard])
    health = DataHealth([open_indexes([shard])], 0.01)  # from the stored index
    assert health.counts() == {"bad_value": 2 * NUM_FRAME}
    assert "not 'estimated'" in health.table()


NAN = float("nan")


@pytest.mark.parametrize("intr_type", ["fixed_virtual", "pseudo"])
@pytest.mark.parametrize("flag", [None, 0.0, 1.0])
def test_an_invented_camera_is_used_whatever_its_flag(intr_type: str, flag: float | None) -> None:
    members = {name.split(".", 1)[1]: data for name, data in raw_members(lab_sample(1, 3, 2)).items()}
    arrays = hand_arrays(1, 3)
    members["intr_type.json"] = json.dumps(intr_type).encode()
    members.pop("has_intr.npy")
    if flag is not None:
        members["has_intr.npy"] = npy(np.full(3, flag))
    clip = parse_clip(members)
    assert (clip.focal == arrays["focal"]).all()
    assert (clip.princpt == arrays["princpt"]).all()
    assert not clip.has_intr.any()
    sample = make_sample(clip, 1, image_of(0), "k", "mano")
    assert (sample.has_intr, sample.focal.tolist()) == (False, arrays["focal"][1].tolist())


@pytest.mark.parametrize("focal", [(0, 0), (0, 500), (NAN, NAN), (-5, 5), (3e38, 3e38), (500, NAN)])
@pytest.mark.parametrize("intr_type", ["fixed_virtual", "real", None])
def test_a_camera_without_usable_numbers_is_guessed_where_the_flag_is_0(focal: Any, intr_type: str | None) -> None:
    members = {name.split(".", 1)[1]: data for name, data in raw_members(lab_sample(1, 3, 2)).items()}
    arrays = hand_arrays(1, 3)["focal"].astype(np.float64)
    arrays[1] = focal
    members |= {"focal.npy": npy(arrays), "has_intr.npy": npy(np.array([1, 0, 1]))}
    if intr_type is not None:
        members["intr_type.json"] = intr_type.encode()
    clip = parse_clip(members)
    assert clip.bad_frame == {}
    sample = make_sample(clip, 1, image_of(0), "k", "mano")
    assert (sample.has_intr, sample.focal.tolist()) == (False, pytest.approx([np.hypot(WIDTH, HEIGHT)] * 2))
    assert make_sample(clip, 0, image_of(0), "k", "mano").has_intr == (intr_type != "fixed_virtual")


def npy(array: Any) -> bytes:
    return wds.writer.numpy_dumps(np.asarray(array))


def with_arrays(num_frame: int, **change: Any) -> Clip:
    """A clip of the second generation with other arrays; None: without."""
    arrays = {k.removesuffix(".npy"): v for k, v in lab_sample(1, num_frame, 2).items() if k.endswith(".npy")}
    arrays = {name: value for name, value in {**arrays, **change}.items() if value is not None}
    return parse_clip({"handedness.json": b"right", **{f"{name}.npy": npy(array) for name, array in arrays.items()}})


def same(a: Clip, b: Clip) -> bool:
    return a.num_frame == b.num_frame and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in Clip.__dataclass_fields__ if name != "bad_frame"
    )


def test_one_frame_without_the_frame_axis() -> None:
    arrays = {k.removesuffix(".npy"): v[0] for k, v in lab_sample(1, 1, 2).items() if k.endswith(".npy")}
    assert arrays["has_mano"].shape == ()
    assert same(with_arrays(1, **arrays), with_arrays(1))


@pytest.mark.parametrize("num_frame", [1, 3, 4])
def test_flags_with_a_trailing_axis_and_poses_by_joint(num_frame: int) -> None:
    sample = lab_sample(1, num_frame, 2)
    flags = ("joint_valid", "joint_2d_valid", "joint_3d_valid", "mano_valid", "has_mano", "has_intr")
    change = {name: sample[f"{name}.npy"][..., None] for name in flags}
    change["mano_pose"] = sample["mano_pose.npy"].reshape(num_frame, 16, 3)
    assert same(with_arrays(num_frame, **change), with_arrays(num_frame))


@pytest.mark.parametrize(("name", "flag"), [("joint_img", "joint_2d_valid"), ("joint_cam", "joint_3d_valid")])
def test_a_confidence_column_restricts_what_is_known(name: str, flag: str) -> None:
    sample = lab_sample(1, 3, 2)
    confidence = np.tile(np.linspace(0, 1, 21), (3, 1))
    confidence[1, 20] = NAN
    stated = np.concatenate([sample[f"{name}.npy"], confidence[..., None]], axis=-1)
    flags = np.ones((3, 21))
    flags[2, 5] = 0
    known = np.nan_to_num(confidence) * flags > 0
    for change in ({flag: flags}, {flag: None, "joint_valid": flags}):
        clip = with_arrays(3, **{name: stated}, **change)
        assert (getattr(clip, flag) == known).all()
        assert (getattr(clip, name) == sample[f"{name}.npy"] * known[..., None]).all()
    alone = with_arrays(1, **{name: stated[0]}, joint_valid=None, **{flag: None})
    assert (getattr(alone, flag) == known[:1]).all()


@pytest.mark.parametrize(
    ("num_frame", "change", "reason"),
    [
        (2, {"focal": np.ones(2)}, "wrong_shape: arrays differ .*focal 1"),
        (4, {"hand_bbox": np.arange(4.0)}, "wrong_shape: arrays differ .*hand_bbox 1"),
        (21, {"joint_valid": np.ones(21)}, "wrong_shape: arrays differ .*joint_valid 1"),
        (3, {"focal": np.ones(3)}, r"wrong_shape: focal.npy is \(3,\), not \(T, 2\)"),
        (3, {"has_mano": np.ones((3, 2))}, "wrong_shape: has_mano.npy"),
        (3, {"joint_2d_valid": np.ones(3)}, "wrong_shape: joint_2d_valid.npy"),
        (3, {"mano_pose": np.ones((3, 45))}, "wrong_shape: mano_pose.npy .*the root first"),
        (3, {"mano_pose": np.ones((3, 15, 3))}, "wrong_shape: mano_pose.npy .*the root first"),
        (3, {"mano_pose": np.ones((3, 16, 3, 3))}, "wrong_shape: mano_pose.npy .*neither matrices"),
        (3, {"mano_shape": np.ones((3, 16))}, "wrong_shape: mano_shape.npy"),
        (3, {"joint_img": np.full((3, 21, 3), 400.0)}, "wrong_shape: joint_img.npy .*not a confidence"),
        (3, {"joint_img": np.full((3, 21, 3), -0.1)}, "wrong_shape: joint_img.npy .*not a confidence"),
        (3, {"joint_img": np.ones((3, 21, 4))}, "wrong_shape: joint_img.npy"),
        (3, {"joint_cam": np.ones((3, 21, 2))}, "wrong_shape: joint_cam.npy"),
        (3, {"joint_img": np.ones((1, 3, 21, 2))}, "wrong_shape: joint_img.npy"),
        (3, {"hand_bbox": np.ones((3, 2, 2))}, "wrong_shape: hand_bbox.npy"),
        (1, {"hand_bbox": np.float32(1)}, "wrong_shape: hand_bbox.npy"),
    ],
)
def test_layouts_that_may_mean_two_things_are_refused(num_frame: int, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        with_arrays(num_frame, **change)
