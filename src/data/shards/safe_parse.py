"""Reads `.npy` arrays and pickled lists of encoded images from bytes without ever running what is in them.

`numpy.load` may unpickle, and `pickle.loads` runs code by design. Here an array header is parsed as a literal and
object types are refused; a pickled image list is only walked (pickletools) to find where each image's bytes lie.
"""

from __future__ import annotations

import ast
import pickletools
import struct
from functools import lru_cache
from typing import Any

import numpy as np

from src.data.shards.errors import SampleError, reason_of  # noqa: F401  (the converters import reason_of from here)

_NPY_MAGIC = b"\x93NUMPY"
_HEADER_LIMIT = 1 << 16
_IMAGE_OPS = frozenset({"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"})
_PREFIX_SIZE = {"SHORT_BINBYTES": 2, "BINBYTES": 5, "BINBYTES8": 9, "BYTEARRAY8": 9}  # opcode and length field
_STORE_OPS = frozenset({"BINPUT", "LONG_BINPUT", "PUT"})
_FETCH_OPS = frozenset({"BINGET", "LONG_BINGET", "GET"})
_MARK = object()


def _parse_npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    """(dtype, shape, fortran order) that a header dictionary states."""
    try:
        fields = ast.literal_eval(header.decode("latin1").strip())
        descr, shape, fortran = fields["descr"], fields["shape"], fields["fortran_order"]
        dtype = np.dtype(descr) if isinstance(descr, str) else None
        shape = tuple(int(n) for n in shape)
    except (ValueError, SyntaxError, TypeError, KeyError, OverflowError, RecursionError, MemoryError):
        raise SampleError("bad_npy", "the array header does not parse") from None
    if dtype is None or dtype.hasobject or dtype.kind not in "biuf":
        reason = "object_array" if dtype is None or dtype.hasobject else "wrong_dtype"
        raise SampleError(reason, f"an array of {descr!r} is refused; store bool, integer or float numbers")
    if any(n < 0 for n in shape):
        raise SampleError("bad_npy", f"negative shape {shape}")
    return dtype, shape, bool(fortran)


def parse_npy(data: bytes | memoryview) -> np.ndarray:
    """The array in the bytes of a `.npy` file (read-only, no copy; versions 1 to 3).

    Raises:
        SampleError: bad_npy, wrong_dtype, or object_array (which only a pickle could fill).
    """
    dtype, shape, fortran, begin, count = _npy_layout(bytes(data[: _header_end(data)]))
    if len(data) - begin != count * dtype.itemsize:
        raise SampleError("bad_npy", f"{len(data) - begin} bytes for {shape} of {dtype}")
    array = np.frombuffer(data, dtype, count, begin)
    try:
        return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
    except (ValueError, OverflowError):  # more dimensions, or (of an empty array) larger ones, than numpy can have
        raise SampleError("bad_npy", f"no array can have {len(shape)} dimensions of this size") from None


def _header_end(data: bytes | memoryview) -> int:
    """Where the array's bytes begin; only the length field is looked at."""
    if len(data) < 12:
        return len(data)
    if data[6] >= 2:
        return 12 + min(int.from_bytes(data[8:12], "little"), _HEADER_LIMIT + 1)
    return 10 + data[8] + (data[9] << 8)


@lru_cache(maxsize=4096)
def _npy_layout(head: bytes) -> tuple[np.dtype, tuple[int, ...], bool, int, int]:
    """(dtype, shape, fortran order, where the data begins, number of items), from everything in front of the data.

    Cached: the arrays of one field mostly have the same header in every sample of a shard.
    """
    if len(head) < 12 or head[:6] != _NPY_MAGIC:
        raise SampleError("bad_npy", "no numpy array")
    long = head[6] >= 2
    (size,) = struct.unpack_from("<I" if long else "<H", head, 8)
    begin = (12 if long else 10) + size
    if size > _HEADER_LIMIT or begin > len(head):
        raise SampleError("bad_npy", "the array header is cut off")
    dtype, shape, fortran = _parse_npy_header(head[begin - size :])
    count = 1
    for n in shape:
        count *= n
    return dtype, shape, fortran, begin, count


def pickled_image_spans(data: bytes) -> list[tuple[int, int]]:
    """Where each image of a pickled list (or tuple) of bytes lies: [(offset, size)], without unpickling.

    Raises:
        SampleError: unsafe_pickle for anything but a flat list of bytes, bad_pickle for one that does not parse.
    """
    machine = _ListMachine()
    try:
        for opcode, argument, at in pickletools.genops(data):
            machine.step(opcode.name, argument, at)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise SampleError("bad_pickle", f"the image list does not parse ({error})") from None
    return machine.result()


class _ListMachine:
    """Follows the few pickle opcodes that build a list of bytes; its stack holds spans, lists and marks."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any, at: int) -> None:
        if name in _IMAGE_OPS:
            self.stack.append((at + _PREFIX_SIZE[name], len(argument)))
        elif name in ("EMPTY_LIST", "EMPTY_TUPLE"):
            self.stack.append([])
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name in ("LIST", "TUPLE"):
            self.stack.append(self._pop_to_mark())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            self.stack[-count:] = [self.stack[-count:]]
        elif name == "APPENDS":
            items = self._pop_to_mark()
            self.stack[-1].extend(items)
        elif name == "APPEND":
            item = self.stack.pop()
            self.stack[-1].append(item)
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in _STORE_OPS:
            self.memo[argument] = self.stack[-1]
        elif name in _FETCH_OPS:
            self.stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise SampleError("unsafe_pickle", f"opcode {name} is refused; only a list of encoded images is read")

    def _pop_to_mark(self) -> list[Any]:
        at = max(i for i, item in enumerate(self.stack) if item is _MARK)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def result(self) -> list[tuple[int, int]]:
        spans = self.stack[-1] if len(self.stack) == 1 else None
        if not isinstance(spans, list) or not all(isinstance(span, tuple) for span in spans):
            raise SampleError("unsafe_pickle", "not a flat list of encoded images")
        return spans
