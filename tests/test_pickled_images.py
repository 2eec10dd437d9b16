"""Hostile `img_bytes.pickle`: around every name that is allowed, anything but an encoded image is refused, and soon."""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.data.shards.build_index import build_index
from src.data.shards.errors import SampleError
from src.data.shards.safe_parse import parse_pickle, pickled_image_spans
from tests.data_shards import encode, image_of, lab_sample, write_shard

IMAGE = encode(image_of(1), "webp")
ARRAY = np.frombuffer(IMAGE, np.uint8)
U1, N = np.dtype("u1"), len(IMAGE)
RECONSTRUCT = np._core.multiarray._reconstruct
FROM_BUFFER = np._core.numeric._frombuffer


class Call:
    """Pickled as a call of a function, and optionally a state that follows it."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


class Array(np.ndarray):
    """A class of ours."""


def array(shape: Any, dtype: Any = U1, content: Any = IMAGE, fortran: Any = False, subtype: Any = np.ndarray) -> Call:
    """An array with any state, as numpy 1 and numpy 2 write it up to protocol 4."""
    return Call(RECONSTRUCT, subtype, (0,), b"b", state=(1, shape, dtype, fortran, content))


def dtype(*arguments: Any, state: Any = (3, "|", None, None, None, -1, -1, 0)) -> Call:
    return Call(np.dtype, *arguments, state=state)


def refused(pickled: bytes) -> str:
    """The reason and detail of the refusal, which comes quickly."""
    begin = time.process_time()
    with pytest.raises(SampleError) as caught:
        pickled_image_spans(pickled)
    assert time.process_time() - begin < 1
    return str(caught.value)


HOSTILE = {
    "bytearray of a size": Call(bytearray, 10**12),
    "bytearray of a list": Call(bytearray, [1, 2]),
    "bytearray of text": Call(bytearray, "abc"),
    "bytearray of another encoding": Call(bytearray, "abc", "utf-16"),
    "bytearray with a state": Call(bytearray, IMAGE, state={"x": 1}),
    "bytes of a size": Call(bytes, 2**31 - 1),
    "bytes of bytes": Call(bytes, IMAGE),
    "another codec": Call(__import__("_codecs").encode, "abc", "zlib_codec"),
    "text beyond latin-1": Call(__import__("_codecs").encode, "Ā", "latin1"),
    "encoded bytes": Call(__import__("_codecs").encode, IMAGE, "latin1"),
    "encoded number": Call(__import__("_codecs").encode, 7, "latin1"),
    "array class called": Call(np.ndarray, (10**12,)),
    "dtype alone": U1,
    "dtype without a state": Call(np.dtype, "u1"),
    "array without a state": Call(RECONSTRUCT, np.ndarray, (0,), b"b"),
    "array of another class": array((N,), subtype=Array),
    "array of a function": array((N,), subtype=bytearray),
    "array of a string": array((N,), subtype="ndarray"),
    "negative shape": array((-N,)),
    "two negative sides": array((-1, -N)),
    "huge shape": array((2**62,)),
    "huge product": array((2**40, 2**40)),
    "shape of long integers": array((10**4000, 1)),
    "shape of floats": array((float(N) + 0.5,)),
    "shape of an array": array(np.zeros(1, np.int64)),
    "shape as a list": array([N]),
    "shape None": array(None),
    "no shape": array(()),
    "shape too short": array((N - 1,)),
    "shape too long": array((N + 1,)),
    "many dimensions": array((N, *[1] * 40)),
    "three columns": array((N, 3)),
    "empty": array((0, 5), content=b""),
    "content is text": array((N,), content=IMAGE.decode("latin-1")),
    "content is a list": array((2,), content=[1, 2]),
    "content is an array": array((N,), content=ARRAY.astype(np.float64)),
    "content missing": Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, (N,), U1)),
    "state is not a tuple": Call(RECONSTRUCT, np.ndarray, (0,), b"b", state={"shape": (N,)}),
    "dtype missing": array((N,), dtype=None),
    "dtype is text": array((N,), dtype="u1"),
    "dtype is a class": array((N,), dtype=np.ndarray),
    "int8": array((N,), dtype=np.dtype("i1")),
    "bool": array((N,), dtype=np.dtype("?")),
    "float": array((N // 4,), dtype=np.dtype("f4"), content=IMAGE[: N // 4 * 4]),
    "bytes of length N": array((1,), dtype=np.dtype(f"S{N}")),
    "void": array((1,), dtype=np.dtype(f"V{N}")),
    "datetime": array((N // 8,), dtype=np.dtype("M8[s]"), content=IMAGE[: N // 8 * 8]),
    "structured": array((N,), dtype=np.dtype([("a", "u1")])),
    "subarray": array((1,), dtype=dtype(f"({N},)u1")),
    "dtype of fields": array((N,), dtype=dtype("u1,u1")),
    "dtype state with fields": array((N,), dtype=dtype("u1", state=(3, "|", None, ("a",), {"a": (U1, 0)}, -1, -1, 0))),
    "dtype of bytes": array((N,), dtype=dtype(b"u1")),
    "dtype of a number": array((N,), dtype=dtype(1)),
    "huge itemsize": array((1,), dtype=dtype("S2147483647")),
    "object array of a wrong size": array((5,), dtype=np.dtype(object), content=[IMAGE]),
    "object array of two dimensions": array((1, 1), dtype=np.dtype(object), content=[IMAGE]),
    "object array of bytes": array((N,), dtype=np.dtype(object)),
    "_frombuffer of a size": Call(FROM_BUFFER, 10**9, U1, (N,), "C"),
    "_frombuffer of text": Call(FROM_BUFFER, IMAGE.decode("latin-1"), U1, (N,), "C"),
    "_frombuffer of objects": Call(FROM_BUFFER, IMAGE, np.dtype(object), (N // 8,), "C"),
    "_frombuffer of another shape": Call(FROM_BUFFER, IMAGE, U1, (N + 1,), "C"),
    "_frombuffer of nothing": Call(FROM_BUFFER),
    "_frombuffer with a state": Call(FROM_BUFFER, IMAGE, U1, (N,), "C", state={"x": 1}),
    "subclass": ARRAY.view(Array),
    "masked array": np.ma.masked_array(ARRAY),
    "numpy scalar": np.uint8(7),
    "numpy bytes": np.bytes_(IMAGE),
    "float array": np.zeros(3),
    "command": Call(os.system, "touch trace"),
    "eval": Call(eval, "1"),
    "getattr": Call(getattr, "text", "join"),
    "numpy.load": Call(np.load, "x.npy"),
    "numpy.fromfile": Call(np.fromfile, "x"),
    "text": "RIFF",
    "number": 7,
    "nothing": None,
    "list": [IMAGE],
    "dict": {"a": IMAGE},
    "a class": np.ndarray,
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_is_not_an_encoded_image_is_refused(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in HOSTILE.items():
        for images in ([value], [IMAGE, value], np.array([value, None], dtype=object)[:1]):
            reason = refused(pickle.dumps(images, protocol)).split(":")[0]
            assert reason in ("unsafe_pickle", "bad_pickle", "wrong_shape"), name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(48, 64, 3), (48, 64), (48, 64, 4), (1, 64)])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_decoded_images_have_a_reason_of_their_own(tmp_path: Path, shape: tuple[int, ...], protocol: int) -> None:
    pickled = pickle.dumps([np.full(shape, 200, np.uint8)], protocol)
    assert refused(pickled).startswith(
        f"wrong_shape: a uint8 array of shape {shape} holds pixels; store the encoded image"
    )
    shard = write_shard(tmp_path / "a.tar", [lab_sample(0, 1, 1), {**lab_sample(1, 1, 1), "img_bytes.pickle": pickled}])
    assert build_index(shard).bad_count == {"wrong_shape": 1}


@pytest.mark.parametrize(
    "code",
    [
        b"P1\n",
        b"N" + b"Q",
        b"\x82\x01",
        b"\x97",
        b"B\1\0\0\0x\x98",
        b"(cnumpy\nndarray\no",
        b"(inumpy\nndarray\n",
        b"\x91",
    ],
)
def test_opcodes_that_no_writer_needs(code: bytes) -> None:
    assert refused(b"\x80\x05](" + code + b"e.").startswith(("unsafe_pickle: opcode", "bad_pickle"))


def test_an_object_array_that_contains_itself() -> None:
    images = np.empty(1, dtype=object)
    images[0] = images
    assert refused(pickle.dumps(images)).startswith("unsafe_pickle")


def test_images_of_protocol_0_say_what_to_do() -> None:
    assert "protocol 2 to 5" in refused(pickle.dumps([ARRAY], 0))


def repeated(value: bytes, calls: bytes, count: int) -> bytes:
    """A stored value (memo 0) and `count` times some calls on it: a few bytes each."""
    return b"\x80\x02" + value + b"q\x000](" + calls * count + b"e."


ENCODE_TEXT = b"c_codecs\nencode\nh\x00X\x06\0\0\0latin1\x86R"
MAKE_SET = b"c__builtin__\nset\nh\x00\x85R"
MAKE_ARRAY = (
    b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n\x85R(K\x01J\0\0\x10\0\x85"
    b"cnumpy\ndtype\nU\x02u1\x85R(K\x03U\x01|NNtb\x89h\x00tb"
)
MIB = 1 << 20
TEXT, BYTES_OF_PYTHON_2 = (code + MIB.to_bytes(4, "little") + b"a" * MIB for code in (b"X", b"T"))
NUMBERS = b"](" + b"".join(b"M" + n.to_bytes(2, "little") for n in range(60_000)) + b"e"


@pytest.mark.parametrize(
    ("value", "calls"), [(TEXT, ENCODE_TEXT), (BYTES_OF_PYTHON_2, MAKE_ARRAY), (NUMBERS, MAKE_SET)]
)
def test_calls_on_one_large_value_do_not_fill_the_memory(value: bytes, calls: bytes) -> None:
    assert len(parse_pickle(repeated(value, calls, 1))) == 1
    with pytest.raises(SampleError, match="unsafe_pickle: it creates more data than it contains"):
        parse_pickle(repeated(value, calls, 10**5))


def test_many_references_to_one_large_image_are_located_soon() -> None:
    begin = time.process_time()
    assert len(pickled_image_spans(repeated(TEXT, ENCODE_TEXT, 20_000))) == 20_000
    assert len(pickled_image_spans(repeated(BYTES_OF_PYTHON_2, MAKE_ARRAY, 20_000))) == 20_000
    assert time.process_time() - begin < 10


def test_integers_that_collide_as_keys_are_refused() -> None:
    numbers = [n * (2**61 - 1) for n in range(1, 50_000)]
    for value in (dict.fromkeys(numbers[:9]), set(numbers[:9])):
        for protocol in (2, 4):
            assert refused(pickle.dumps(value, protocol)).startswith("unsafe_pickle")
    keys = b"".join(pickle.dumps(number, 2)[2:-1] + b"N" for number in numbers)  # a dict of these takes a minute
    assert refused(b"\x80\x02}(" + keys + b"u.").startswith("unsafe_pickle: integers")


def mutate(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """A few random edits: changed, inserted, removed, repeated and foreign bytes."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at, size = int(rng.integers(0, len(data))), int(rng.integers(1, 12))
        kind = rng.integers(0, 6)
        if kind == 0:
            data[at] = rng.integers(0, 256)
        elif kind == 1:
            data[at:at] = rng.bytes(size)
        elif kind == 2 and len(data) > size:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + 10 * size]
        elif kind == 4:
            other = others[rng.integers(0, len(others))]
            begin = int(rng.integers(0, len(other)))
            data[at : at + size] = other[begin : begin + size]
        else:
            data[at] ^= 1 << rng.integers(0, 8)
    return bytes(data)


def test_thousands_of_damaged_pickles_cost_only_their_sample() -> None:
    short = np.frombuffer(b"RIFF\xff\x00\x80", np.uint8)
    images = [short, short.reshape(-1, 1), bytearray(short), short.tobytes(), short]
    whole = [pickle.dumps(kind(images), protocol) for protocol in range(6) for kind in (list, tuple)]
    whole += [pickle.dumps(np.array([short, short, None], dtype=object)[:2], protocol) for protocol in range(1, 6)]
    rng, outcome, begin = np.random.default_rng(0), {"read": 0}, time.process_time()
    for number in range(6000):
        data = mutate(whole[number % len(whole)], whole, rng)
        try:
            spans = pickled_image_spans(data)
        except SampleError as error:
            outcome[error.reason] = outcome.get(error.reason, 0) + 1
        else:
            assert all(min(at, size) >= 0 and at + size <= len(data) for at, size in spans)
            outcome["read"] += 1
        with contextlib.suppress(SampleError):
            parse_pickle(data)
    assert time.process_time() - begin < 30
    assert outcome.keys() <= {"read", "unsafe_pickle", "bad_pickle", "wrong_shape"}
    assert min(outcome["read"], outcome["unsafe_pickle"], outcome["bad_pickle"]) > 100
