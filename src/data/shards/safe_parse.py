"""Parses `.npy` arrays and pickles from bytes without executing anything in them.

`numpy.load` may unpickle, and `pickle.loads` runs code by design. Here an array header is parsed as a literal, object
arrays are refused, and pickles go through src/utils/restricted_pickle.py.
"""

from __future__ import annotations

import ast
import struct
from functools import lru_cache
from typing import Any

import numpy as np

from src.data.shards.errors import SampleError
from src.utils.restricted_pickle import PickleError, Span, read_pickle

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


def pickled_image_spans(data: bytes) -> list[Span]:
    """(offset, size) of each image in a pickled list (or tuple) of bytes; nothing is unpickled or copied.

    Raises:
        SampleError: unsafe_pickle for anything but a flat list of bytes, bad_pickle if it does not parse.
    """
    try:
        spans = read_pickle(data, allowed={}, spans=True)
    except PickleError as error:
        raise SampleError(error.reason, str(error)) from None
    if not isinstance(spans, (list, tuple)) or not all(isinstance(span, Span) for span in spans):
        raise SampleError("unsafe_pickle", "not a flat list of encoded images")
    return list(spans)
