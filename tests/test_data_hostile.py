"""Malicious or badly corrupted bytes cost their sample, but neither the shard nor the run."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.batch import Sample
from src.data import crop
from src.data.contact_sheet import contact_sheet
from src.data.health import BadDataError
from src.data.loader import build_train_loader
from src.data.shards.build_index import build_index, open_indexes
from src.data.shards.index import FRAME, index_path, load_index
from src.data.shards.reader import ShardReader
from src.data.shards.tar import BLOCK, TarReader, padded
from src.geometry.patch import PatchView
from src.utils.console import add_log_file, log_to_file, logger, set_up_logging
from tests.data_shards import (
    data_config,
    encode,
    image_of,
    lab_sample,
    native_sample,
    raw_members,
    write_shard,
    write_tar,
)


def npy(shape: str, data: bytes = b"") -> bytes:
    """A .npy file that claims this shape."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape}), }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def beside_healthy(path: Path, sample: dict[str, Any], **members: bytes) -> Path:
    """A shard with a sample `bad`, some of its members replaced, between two healthy ones."""
    first, bad, last = (raw_members(s) for s in (native_sample(0), {**sample, "__key__": "bad"}, native_sample(2)))
    return write_tar(path, {**first, **bad, **{f"bad.{name}": data for name, data in members.items()}, **last})


@pytest.mark.parametrize(
    "array",
    [
        npy("1e999,"),
        npy(f"0, {2**70}"),
        npy(f"0, {2**40}, {2**40}"),
        npy("1," * 70, bytes(4)),
        npy("-1, -42", bytes(168)),
    ],
)
def test_impossible_array_shapes(tmp_path: Path, array: bytes) -> None:
    index = build_index(beside_healthy(tmp_path / "a.tar", native_sample(1), **{"joint_img.npy": array}))
    assert (index.bad_count, index.num_frame()) == ({"bad_npy": 1}, 2)


IMAGE = encode(image_of(1), "webp")
BYTES = b"B" + len(IMAGE).to_bytes(4, "little") + IMAGE  # opcode BINBYTES


@pytest.mark.parametrize(
    "ops", [BYTES + b"(" + BYTES + b"e", BYTES + BYTES + b"a", b"(" + BYTES + b"a", b"]h\x07a", b"e"]
)
def test_pickles_that_append_to_something_that_is_not_a_list(tmp_path: Path, ops: bytes) -> None:
    pickled = b"\x80\x03" + ops + b"."
    index = build_index(beside_healthy(tmp_path / "a.tar", lab_sample(1, 1, 1), **{"img_bytes.pickle": pickled}))
    assert (index.bad_count, index.num_frame()) == ({"bad_pickle": 1}, 2)


@pytest.mark.parametrize(
    "extra",
    [
        {"intr_type": []},
        {"intr_type": {}},
        {"hand_model": 1},
        {"data_source": ["a"]},
        {"has_mano": 10**400},
        {"has_mano": [10**400, 1]},
    ],
)
def test_json_values_of_the_wrong_type(tmp_path: Path, extra: dict[str, Any]) -> None:
    meta = json.dumps(native_sample(1)["json"] | extra).encode()
    index = build_index(beside_healthy(tmp_path / "a.tar", native_sample(1), json=meta))
    assert (index.bad_count, index.num_frame()) == ({"bad_value": 1}, 2)


def test_a_frame_number_with_too_many_digits_for_python(tmp_path: Path) -> None:
    members = raw_members(native_sample(1))
    members[f"00001.{'1' * 4301}.png"] = members.pop("00001.png")
    assert build_index(write_tar(tmp_path / "a.tar", members, tarfile.GNU_FORMAT)).bad_count == {"bad_value": 1}


def header(name: bytes, size: bytes, flag: bytes = b"0") -> bytes:
    """A tar header with a valid checksum and any size field."""
    block = bytearray(BLOCK)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157], block[257:263] = name, size, flag, b"ustar\0"
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


def pax_record(key: bytes, value: bytes) -> bytes:
    return b"%02d %s=%s\n" % (len(key) + len(value) + 5, key, value)


def pax(record: bytes) -> bytes:
    """A pax header with one record for the next member."""
    return header(b"pax", b"%011o" % len(record), b"x") + record.ljust(BLOCK, b"\0")


@pytest.mark.parametrize(
    "front",
    [
        header(b"a.png", b"-0000002000"),
        header(b"folder", b"-0000002000", b"5"),
        header(b"a", b"-0000002000", b"L"),
        header(b"a.png", b"-0000000001"),
        pax(pax_record(b"size", b"-2048")) + header(b"a.png", b"00000000004") + bytes(BLOCK),
    ],
)
def test_negative_sizes_neither_stop_the_reader_nor_move_it_back(tmp_path: Path, front: bytes) -> None:
    shard = write_shard(tmp_path / "a.tar", [native_sample(0), native_sample(1)])
    shard.write_bytes(front + shard.read_bytes())
    index = build_index(shard)
    assert index.num_frame() == 2
    assert index.bad_count["bad_header"] == 1


def test_index_and_reader_use_the_size_of_a_pax_record(tmp_path: Path) -> None:
    """A pax record may state the size; the header's own field is then 0, or too small for more than 8 GiB."""
    shard = write_shard(tmp_path / "a.tar", [native_sample(n) for n in range(2)])
    archive = b""
    for member in TarReader(shard.open("rb"), shard.stat().st_size):
        data = member.data.ljust(padded(len(member.data)), b"\0")
        archive += pax(pax_record(b"size", b"%d" % len(member.data))) + header(member.name.encode(), b"0") + data
    shard.write_bytes(archive + bytes(2 * BLOCK))
    index = build_index(shard)
    assert (index.bad_count, index.num_frame()) == ({}, 2)
    reader = ShardReader(index, stride=1)
    for number in range(2):
        key, clip, _, _ = reader.read(number)
        assert key == f"{number:05d}"
        assert (clip.joint_cam == native_sample(number)["joint_cam.npy"]).all()


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    """The log.txt of a new run; the logging configuration is restored afterwards."""
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    set_up_logging()
    add_log_file(tmp_path / "log.txt")
    yield tmp_path / "log.txt"
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


def test_lines_of_other_processes_go_to_the_log_file_only(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger.warning("mine")
    log_to_file("another's")
    assert log_file.read_text(encoding="utf-8") == "mine\nanother's\n"
    assert capsys.readouterr().out == "mine\n"


def test_names_of_any_bytes_are_logged(tmp_path: Path, log_file: Path) -> None:
    logger.warning("bad frame: \udcff/0")
    assert "bad frame: \\udcff/0" in log_file.read_text(encoding="utf-8")
    shard = write_shard(tmp_path / "a.tar", [native_sample(0, data_source="\ud800")])
    indexes = open_indexes([shard])
    assert ShardReader(indexes[0], stride=1).read(0)[1].source == "\\ud800"
    assert contact_sheet(indexes, num_hand=1, side=32) is not None  # OpenCV crashes on a lone surrogate


@pytest.mark.parametrize("byte", ["header", "sample", "frame"])
def test_an_index_with_a_flipped_bit_is_rebuilt(tmp_path: Path, byte: str) -> None:
    """A flipped bit in the frame number would silently pair an image with the annotations of another frame."""
    shard = write_shard(tmp_path / "a.tar", [native_sample(n, 3) for n in range(4)])
    (index,) = open_indexes([shard])
    expected = index.tables().frame.copy()
    path = index_path(shard)
    data = bytearray(path.read_bytes())
    at = {"header": 20, "sample": index.stored[1], "frame": len(data) - FRAME.itemsize + FRAME.fields["frame"][1]}[byte]
    data[at] ^= 1
    path.write_bytes(data)
    assert load_index(shard, path) is None
    assert (open_indexes([shard])[0].tables().frame == expected).all()
    assert load_index(shard, path) is not None


def test_a_read_error_names_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_shard(tmp_path / "a.tar", [native_sample(0)])

    def refuse(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(TarReader, "_read", refuse)
    with pytest.raises(OSError, match=f"Input/output error: '{shard}'") as caught:
        open_indexes([shard])
    assert caught.value.errno == errno.EIO


def test_values_that_make_the_geometry_fail_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such values are known to pass the checks, so the test makes the geometry fail for one frame."""
    mano_labels = crop._mano_labels

    def refuse(samples: Sequence[Sample], view: PatchView) -> dict[str, np.ndarray]:
        if any(sample.key == "00009/0" for sample in samples):
            raise np.linalg.LinAlgError("Singular matrix")
        return mano_labels(samples, view)

    monkeypatch.setattr(crop, "_mano_labels", refuse)
    write_shard(tmp_path / "train" / "0.tar", [native_sample(n) for n in range(10)])
    loader = build_train_loader(data_config(tmp_path, max_bad_fraction=0.5), "mano", num_batch=5)
    keys = [key for batch in loader for key in batch.key]
    assert len(keys) == 20
    assert set(keys) == {f"{n:05d}/0" for n in range(9)}  # the other frames of its batches are present
    assert loader.health.counts() == {"unforeseen": len(loader.health.read_example)}
    assert all(line.startswith("unforeseen: 00009/0 in ") for line in loader.health.read_example)
    assert contact_sheet(open_indexes([tmp_path / "train" / "0.tar"]), num_hand=10, num_column=9, side=32) is not None


@pytest.mark.parametrize("worker", [0, 1])
def test_a_position_without_a_usable_frame_stops_the_run_with_a_table(tmp_path: Path, worker: int) -> None:
    shard = write_shard(tmp_path / "train" / "0.tar", [native_sample(n) for n in range(3)])
    cfg = data_config(tmp_path, max_bad_fraction=1.0, num_worker=worker)
    loader = build_train_loader(cfg, "mano", num_batch=5)
    os.truncate(shard, 0)
    with pytest.raises(BadDataError, match="position 0: 20 frames in a row cannot be used") as caught:
        list(loader)
    assert "stale_index" in str(caught.value)
    assert str(shard) in str(caught.value)
