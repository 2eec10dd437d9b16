"""Parses `.npy` arrays and pickles from bytes without executing anything in them.

`numpy.load` may unpickle, and `pickle.loads` runs code by design. Here an array header is parsed as a literal, object
arrays are refused, and pickles go through src/utils/restricted_pickle.py.
"""

from __future__ import annotations

import ast
import math
import struct
from functools import lru_cache
from typing import Any

import numpy as np

from src.data.shards.errors import SampleError
from src.utils.restricted_pickle import (
    NUMPY_CORE,
    OBJECT,
    PLAIN,
    Allowed,
    Name,
    Pending,
    PickleError,
    Span,
    Text,
    TextSpan,
    read_pickle,
)

_NPY_MAGIC = b"\x93NUMPY"
_HEADER_LIMIT = 1 << 16


def _parse_npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    """(dtype, shape, fortran order) from the dictionary in an array header."""
    try:
        fields = ast.literal_eval(header.decode("latin1").strip())
        descr, shape, fortran = fields["descr"], fields["shape"], fields["fortran_order"]
        dtype = np.dtype(descr) if isinstance(descr, str) else None
        shape = tuple(int(n) for n in shape)
    except (ValueError, SyntaxError, TypeError, KeyError, OverflowError, RecursionError, MemoryError):
        raise SampleError("bad_npy", "the array header does not parse") from None
    if dtype is None or dtype.hasobject or dtype.kind not in "biuf":
        reason = "object_array" if dtype is None or dtype.hasobject else "wrong_dtype"
        raise SampleError(reason, f"arrays of {descr!r} are refused; store bool, integer or float numbers")
    if any(n < 0 for n in shape):
        raise SampleError("bad_npy", f"negative shape {shape}")
    return dtype, shape, bool(fortran)


def parse_npy(data: bytes | memoryview) -> np.ndarray:
    """The array in a `.npy` file's bytes (read-only, not copied; format versions 1 to 3).

    Raises:
        SampleError: bad_npy, wrong_dtype, or object_array (whose content would be a pickle).
    """
    dtype, shape, fortran, begin, count = _npy_layout(bytes(data[: _header_end(data)]))
    if len(data) - begin != count * dtype.itemsize:
        raise SampleError("bad_npy", f"{len(data) - begin} bytes for {shape} of {dtype}")
    array = np.frombuffer(data, dtype, count, begin)
    try:
        return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
    except (ValueError, OverflowError):  # more or (of an empty array) larger dimensions than numpy supports
        raise SampleError("bad_npy", f"no array can have {len(shape)} dimensions of this size") from None


def _header_end(data: bytes | memoryview) -> int:
    """Offset of the array's bytes, from the length field of the header."""
    if len(data) < 12:
        return len(data)
    if data[6] >= 2:
        return 12 + min(int.from_bytes(data[8:12], "little"), _HEADER_LIMIT + 1)
    return 10 + data[8] + (data[9] << 8)


@lru_cache(maxsize=4096)
def _npy_layout(head: bytes) -> tuple[np.dtype, tuple[int, ...], bool, int, int]:
    """(dtype, shape, fortran order, offset of the data, number of items), from the bytes in front of the data.

    Cached, because a field usually has the same header in every sample of a shard.
    """
    if len(head) < 12 or head[:6] != _NPY_MAGIC:
        raise SampleError("bad_npy", "not a numpy array")
    long = head[6] >= 2
    (size,) = struct.unpack_from("<I" if long else "<H", head, 8)
    begin = (12 if long else 10) + size
    if size > _HEADER_LIMIT or begin > len(head):
        raise SampleError("bad_npy", "the array header is truncated")
    dtype, shape, fortran = _parse_npy_header(head[begin - size :])
    count = 1
    for n in shape:
        count *= n
    return dtype, shape, fortran, begin, count


def parse_pickle(data: bytes) -> Any:
    """The content of a pickle of plain data and numpy arrays; nothing in it is executed.

    Raises:
        SampleError: unsafe_pickle if it holds anything else, bad_pickle if it does not parse.
    """
    try:
        return read_pickle(data)
    except PickleError as error:
        raise SampleError(error.reason, str(error)) from None


_EMPTY = Span(0, 0)


def _located(content: Any) -> Span:
    """Where a bytes object (or Python 2's str) among the values of a pickle is stored."""
    if isinstance(content, Text) and content.is_bytes:
        return content.span
    if not isinstance(content, Span):
        kind = "str" if isinstance(content, Text) else type(content).__name__
        raise PickleError("unsafe_pickle", f"a {kind} where the bytes of an image are expected")
    return content


def _latin1(text: Any, encoding: str) -> Span:
    """_codecs.encode(text, 'latin1'), and bytearray(text, 'latin-1') of Python 2 and early Python 3."""
    if encoding not in ("latin1", "latin-1"):
        raise PickleError("unsafe_pickle", "images are bytes or latin-1 text")
    if not isinstance(text, Text):
        raise PickleError("bad_pickle", "images are not read from protocol 0; pickle with protocol 2 to 5")
    return text.span


def _bytearray(content: Any = _EMPTY, encoding: str | None = None) -> Span:
    return _located(content) if encoding is None else _latin1(content, encoding)


def _image_array(shape: Any, dtype: Any, content: Any) -> Span | list[Any]:
    """Where the encoded image in a uint8 array [N] or [N, 1] is stored; the elements of an object array [T]."""
    if not isinstance(shape, tuple):
        raise PickleError("bad_pickle", "an array without a shape")
    if dtype is OBJECT and isinstance(content, list) and shape == (len(content),):
        return content
    if not isinstance(dtype, np.dtype) or dtype != np.uint8:
        kind = dtype if isinstance(dtype, np.dtype) else "other objects"
        raise PickleError("unsafe_pickle", f"an encoded image is bytes or a uint8 array, not an array of {kind}")
    span = _located(content)
    num_byte = span.num_byte if isinstance(span, TextSpan) else span.size
    if shape in ((num_byte,), (num_byte, 1)):
        return span
    sides = shape if all(type(n) is int and 0 <= n <= num_byte for n in shape) else ()
    if not 2 <= len(sides) <= 3 or math.prod(sides) != num_byte:
        raise PickleError("bad_pickle", f"an array of {num_byte} bytes states another shape")
    raise PickleError(
        "wrong_shape",
        f"a uint8 array of shape {sides} holds pixels; store the encoded image, [N], as cv2.imencode returns",
    )


def _reconstruct(subtype: Any, *_: Any) -> Pending:
    """numpy's _reconstruct, whose array follows as a state (version, shape, dtype, is_fortran, content)."""
    if subtype != Name("numpy", "ndarray"):
        raise PickleError("unsafe_pickle", "an encoded image must be a plain numpy array")
    return Pending(lambda state: _image_array(state[1], state[2], state[4]))


_BUILTINS = ("builtins", "__builtin__")
IMAGES: Allowed = {
    **{key: PLAIN[key] for key in (("numpy", "ndarray"), ("numpy", "dtype"))},
    **{(f"{core}.multiarray", "_reconstruct"): _reconstruct for core in NUMPY_CORE},
    **{
        (f"{core}.numeric", "_frombuffer"): lambda content, dtype, shape, *_: _image_array(shape, dtype, content)
        for core in NUMPY_CORE
    },
    ("_codecs", "encode"): _latin1,
    **{(builtins, "bytes"): lambda: _EMPTY for builtins in _BUILTINS},
    **{(builtins, "bytearray"): _bytearray for builtins in _BUILTINS},
}


def pickled_image_spans(data: bytes) -> list[Span]:
    """(offset, size) of each encoded image in a pickled list; nothing is unpickled or copied.

    An image is a bytes object, a bytearray, or a uint8 array [N] or [N, 1], as cv2.imencode returns it. The list may
    be a tuple or an object array [T]; a clip of one frame may be the image alone. `stored_image` decodes a TextSpan.

    Raises:
        SampleError: unsafe_pickle for anything else, wrong_shape for arrays of pixels, bad_pickle if it does not parse.
    """
    try:
        images = read_pickle(data, IMAGES, spans=True)
        return [_located(image) for image in (images if type(images) in (list, tuple) else [images])]
    except PickleError as error:
        raise SampleError(error.reason, str(error)) from None


def stored_image(stored: bytes | memoryview, is_text: bool) -> bytes | memoryview:
    """The encoded image from its bytes in a pickle, which are UTF-8 if it is stored as text (a TextSpan).

    Corrupt UTF-8 gives other bytes, which the image's checksum shows.
    """
    return str(stored, "utf-8", "replace").encode("latin-1", "replace") if is_text else stored
