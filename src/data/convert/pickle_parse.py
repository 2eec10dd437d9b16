"""Reads pickled annotations (HO-3D's meta files, HaMeR's data.pyd) without the pickle module: nothing in them can run.

A pickle is a program for a small stack machine. Here its opcodes are walked (their arguments are decoded by the
standard library's `pickletools`) and those that only make numbers, texts, lists, dicts and tuples are followed. Of all
callables the handful by which numpy writes arrays is known by name and *interpreted*, never imported or called; any
other name and any other opcode is refused. Python 2 and 3, protocols 0 to 5. No value larger than its bytes is made.
"""

from __future__ import annotations

import codecs
import io
import pickletools
import struct
from typing import Any

import numpy as np

from src.data.shards.safe_parse import SampleError

_OPCODES = {op.code.encode("latin-1"): op for op in pickletools.opcodes}
_LITERALS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_STORE = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_FETCH = frozenset({"GET", "BINGET", "LONG_BINGET"})
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
# (module, name) as a pickle writes them -> what it means here
_KNOWN = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
    ("collections", "OrderedDict"): "dict",
    ("__builtin__", "bytes"): "bytes",
    ("builtins", "bytes"): "bytes",
    **{(module, "_reconstruct"): "array" for module in _NUMPY},
    **{(module, "scalar"): "scalar" for module in _NUMPY},
    **{(module.replace("multiarray", "numeric"), "_frombuffer"): "frombuffer" for module in _NUMPY},
}
_OBJECT = "object"  # stands for dtype('O')
_MARK = object()


class _Name:
    """A known callable, by name only."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


class _Pending:
    """An array or dtype whose content follows (BUILD); `keys` are the memo places that hold it."""

    def __init__(self, kind: str, value: Any = None) -> None:
        self.kind, self.value, self.keys = kind, value, []


def parse_pickle(data: bytes) -> Any:
    """What a pickle of plain data and numpy arrays holds. An object array comes as the list of its elements, a
    zero-dimensional one as its element.

    Raises:
        SampleError: unsafe_pickle where it asks for anything else, bad_pickle where it does not parse.
    """
    machine = _Machine()
    file = io.BytesIO(data)
    try:
        while machine.step(*_next_opcode(file)):
            pass
        (value,) = machine.stack
    except SampleError:
        raise
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        StopIteration,
        struct.error,
        OverflowError,
    ) as error:
        raise SampleError("bad_pickle", f"the annotations do not parse ({error})") from None
    if isinstance(value, (_Name, _Pending)) or value is _MARK:
        raise SampleError("bad_pickle", "the annotations are incomplete")
    return value


def _next_opcode(file: io.BytesIO) -> tuple[str, Any]:
    code = file.read(1)
    if code not in _OPCODES:
        raise SampleError("bad_pickle", f"byte {code!r} at {file.tell() - 1} is no opcode")
    opcode = _OPCODES[code]
    if opcode.name == "STRING":  # pickletools of Python 3.10 decodes it as ASCII; raw array bytes of Python 2 are not
        quoted = file.readline().strip()
        return "STRING", codecs.escape_decode(quoted[1:-1])[0].decode("latin-1")  # type: ignore[attr-defined]
    return opcode.name, opcode.arg.reader(file) if opcode.arg else None


class _Machine:
    """The stack machine, for data only."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> bool:
        """Follow one opcode; False at the end."""
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name == "MARK":
            self.stack.append(_MARK)
        elif name == "MEMOIZE" or name in _STORE:
            self._store(len(self.memo) if name == "MEMOIZE" else argument)
        elif name in _FETCH:
            self.stack.append(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._push_name(name, argument)
        elif name == "REDUCE":
            arguments, callee = self.stack.pop(), self.stack.pop()
            self.stack.append(_interpret(callee, arguments))
        elif name == "BUILD":
            self._build(self.stack.pop())
        elif name == "STOP":
            return False
        elif name not in ("PROTO", "FRAME") and not self._collect(name):
            raise SampleError("unsafe_pickle", f"opcode {name} is refused; only plain data and arrays are read")
        return True

    def _store(self, key: int) -> None:
        value = self.stack[-1]
        self.memo[key] = value
        if isinstance(value, _Pending):
            value.keys.append(key)

    def _push_name(self, opcode: str, argument: str | None) -> None:
        if opcode == "GLOBAL":
            module, _, name = str(argument).partition(" ")
        else:
            name, module = self.stack.pop(), self.stack.pop()
        if (module, name) not in _KNOWN:
            raise SampleError("unsafe_pickle", f"{module}.{name} is refused; only plain data and arrays are read")
        self.stack.append(_Name(_KNOWN[module, name]))

    def _pop_to_mark(self) -> list[Any]:
        at = next(i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is _MARK)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _collect(self, name: str) -> bool:
        """Opcodes that gather values into a container; False for any other opcode."""
        if name == "LIST":
            self.stack.append(self._pop_to_mark())
        elif name == "TUPLE":
            self.stack.append(tuple(self._pop_to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            self.stack[-count:] = [tuple(self.stack[-count:])]
        elif name == "DICT":
            items = self._pop_to_mark()
            self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))
        elif name in ("APPEND", "APPENDS"):
            items = [self.stack.pop()] if name == "APPEND" else self._pop_to_mark()
            self.stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [self.stack.pop(-2), self.stack.pop()] if name == "SETITEM" else self._pop_to_mark()
            self.stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "ADDITEMS":
            items = self._pop_to_mark()
            self.stack[-1].update(items)
        elif name == "POP":
            self.stack.pop()
        elif name == "POP_MARK":
            self._pop_to_mark()
        else:
            return False
        return True

    def _build(self, state: Any) -> None:
        pending = self.stack[-1]
        if not isinstance(pending, _Pending):
            raise SampleError("unsafe_pickle", "an object with a state is refused; only plain data and arrays are read")
        done = _dtype_of(pending.value, state) if pending.kind == "dtype" else _array_of(*state[1:])
        self.stack[-1] = done
        for key in pending.keys:
            self.memo[key] = done


def _interpret(callee: Any, arguments: tuple[Any, ...]) -> Any:
    """The value that calling a known name would give."""
    kind = callee.kind if isinstance(callee, _Name) else ""
    if kind == "array":
        return _Pending("array")
    if kind == "dtype":
        return _Pending("dtype", str(arguments[0]))
    if kind == "scalar":
        dtype, value = arguments
        return value if dtype is _OBJECT else np.frombuffer(_raw(value), dtype, 1)[0]
    if kind == "frombuffer":
        buffer, dtype, shape, order = arguments
        return _array_of(shape, dtype, order == "F", buffer)
    if kind == "encode":
        text, encoding = arguments
        if encoding == "latin1":
            return text.encode("latin-1")
    if kind in ("dict", "bytes") and not arguments:
        return {} if kind == "dict" else b""
    raise SampleError("unsafe_pickle", f"a call of {kind or type(callee).__name__} is refused")


def _dtype_of(text: str, state: tuple[Any, ...]) -> np.dtype | str:
    """The dtype that numpy writes as its name and a state (version, byte order, ...)."""
    if text.startswith("O"):
        return _OBJECT
    if len(state) > 3 and state[3] is not None:
        raise SampleError("unsafe_pickle", "an array of records is refused; only plain data and arrays are read")
    dtype = np.dtype(text)
    if dtype.hasobject or dtype.kind not in "biufUS":
        raise SampleError("unsafe_pickle", f"an array of {text!r} is refused; only plain data and arrays are read")
    return dtype.newbyteorder(state[1]) if state[1] in ("<", ">") else dtype


def _raw(value: Any) -> bytes:
    return value.encode("latin-1") if isinstance(value, str) else bytes(value)


def _array_of(shape: tuple[int, ...], dtype: np.dtype | str, fortran: bool, content: Any) -> Any:
    """An array from its raw bytes (read-only), or the elements of an object array."""
    if dtype is _OBJECT:
        return content[0] if shape == () else content
    if not isinstance(dtype, np.dtype):
        raise SampleError("bad_pickle", f"{type(dtype).__name__} stands where an array's type should")
    raw = _raw(content)
    array = np.frombuffer(raw, dtype) if raw else np.zeros(0, dtype)
    return array.reshape(shape, order="F" if fortran else "C")
