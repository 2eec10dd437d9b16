"""Reads pickles as data: nothing that a pickle names is ever imported or called.

A pickle is a program for a small stack machine. This module executes the opcodes that build numbers, strings, lists,
dicts, sets and tuples. Globals are checked against an allow-list and kept as names; a "call" of one runs a function of
this project that returns the data which the real call would return. Anything else is refused.

Python 2 and 3, protocols 0 to 5. Memory use is bounded by the size of the input: no value is larger than its bytes, and
the results of all calls together are at most twice as large as the input (text encoded to bytes, bytes to an array).
"""

from __future__ import annotations

import codecs
import io
import pickletools
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np


class PickleError(ValueError):
    """A pickle that is not read. `reason`: unsafe_pickle (outside the allow-list), bad_pickle (does not parse), or the
    reason of the function in an allow-list that refused an argument."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Name(NamedTuple):
    """A global that the pickle refers to."""

    module: str
    name: str


class Span(NamedTuple):
    """Position of a bytes object in the pickle."""

    begin: int
    size: int


class TextSpan(Span):
    """Position of a bytes object that is stored as text: UTF-8, one character a byte (Python 3, protocols 1 and 2)."""

    num_byte: int  # of the bytes object; `size` is that of its UTF-8


class Text(str):
    """A string, and where in the pickle it is stored."""

    end: int
    is_bytes: bool  # Python 2's str

    @cached_property
    def span(self) -> Span:
        """Where the bytes object with these characters is stored. Raises ValueError for characters beyond latin-1."""
        num_byte = len(self.encode("latin-1"))
        if self.is_bytes:
            return Span(self.end - num_byte, num_byte)
        size = len(self.encode("utf-8"))
        span = TextSpan(self.end - size, size)
        span.num_byte = num_byte
        return span


class Record:
    """Stands in for an object whose class is not imported: holds its pickled attributes in `state`."""

    state: dict[str, Any]

    def finish(self, state: Any) -> Record:
        """Set the attributes (opcode BUILD)."""
        if not isinstance(state, dict):
            raise PickleError("bad_pickle", f"the state of a {type(self).__name__} must be a dict")
        self.state = state
        return self


class Pending:
    """An array or dtype whose content follows with the opcode BUILD."""

    def __init__(self, build: Callable[[Any], Any]) -> None:
        self.build, self.results = build, []

    def finish(self, state: Any) -> Any:
        self.results = [self.build(state)]
        return self.results[0]


OBJECT = "object"  # in place of dtype('O')


def _dtype_of(text: str, state: tuple[Any, ...]) -> np.dtype | str:
    """The dtype that numpy pickles as its name and a state (version, byte order, fields, ...)."""
    if text.startswith("O"):
        return OBJECT
    if len(state) > 3 and state[3] is not None:
        raise PickleError("unsafe_pickle", "structured arrays are not allowed")
    dtype = np.dtype(text)
    if dtype.hasobject or dtype.kind not in "biufUS":
        raise PickleError("unsafe_pickle", f"arrays of type {text!r} are not allowed")
    return dtype.newbyteorder(state[1]) if state[1] in ("<", ">") else dtype


def _array_of(shape: tuple[int, ...], dtype: np.dtype | str, fortran: bool, content: Any) -> Any:
    """A read-only array from its raw bytes, or the elements of an object array."""
    if dtype is OBJECT:
        return content[0] if shape == () else content
    if not isinstance(dtype, np.dtype):
        raise PickleError("bad_pickle", "an array without a dtype")
    raw = content.encode("latin-1") if isinstance(content, str) else content  # Python 2 wrote bytes as text
    array = np.frombuffer(raw, dtype) if raw else np.zeros(0, dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: str, axis_order: Any = None) -> np.ndarray:
    """An array as protocol 5 stores it; numpy 2.3 and later also transposed ones (order K)."""
    array = _array_of(shape, dtype, order == "F", raw)
    return array if axis_order is None else array.transpose(axis_order)


def _encode(text: str, encoding: str) -> bytes:
    """Python 3 writes bytes this way at protocols 0 to 2."""
    if encoding != "latin1":
        raise PickleError("unsafe_pickle", "_codecs.encode is allowed for latin1 only")
    return text.encode("latin-1")


_HASH_MODULUS = (1 << 61) - 1  # of Python's integers


def _keys(keys: list[Any]) -> list[Any]:
    """Keys of a dict or set. Hashing a deeply nested tuple would overflow Python's C stack; integers beyond the modulus
    of the hash can be chosen to collide, which takes quadratic time.
    """
    for key in keys:
        if isinstance(key, tuple) and any(isinstance(item, tuple) for item in key):
            raise PickleError("unsafe_pickle", "nested tuples are not allowed as keys")
        if isinstance(key, int) and abs(key) >= _HASH_MODULUS:
            raise PickleError("unsafe_pickle", "integers of more than 61 bits are not allowed as keys")
    return keys


# (module, name) of each global that may occur -> what a call of it returns; None for names that are only arguments
Allowed = Mapping[tuple[str, str], Callable[..., Any] | None]
NUMPY_CORE = ("numpy.core", "numpy._core")
_NUMPY = {
    ("multiarray", "_reconstruct"): lambda *_: Pending(lambda state: _array_of(*state[1:])),
    ("multiarray", "scalar"): lambda dtype, raw: raw if dtype is OBJECT else _array_of((1,), dtype, False, raw)[0],
    ("numeric", "_frombuffer"): _from_buffer,
}
PLAIN: Allowed = {
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): lambda text, *_: Pending(lambda state: _dtype_of(text, state)),
    **{(f"{core}.{module}", name): call for (module, name), call in _NUMPY.items() for core in NUMPY_CORE},
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): lambda: {},  # noqa: PIE807  (no arguments: Python 3 sets the items afterwards)
    **{(builtins, "bytes"): lambda: b"" for builtins in ("builtins", "__builtin__")},
    **{(builtins, "set"): lambda keys: set(_keys(keys)) for builtins in ("builtins", "__builtin__")},
}


def read_pickle(data: bytes, allowed: Allowed = PLAIN, spans: bool = False) -> Any:
    """The content of a pickle of plain data, numpy arrays, and anything else that `allowed` lists.

    An object array comes as the list of its elements, a zero-dimensional one as its element.

    Args:
        data: the pickle.
        allowed: globals that may occur, (module, name) as the pickle spells them.
        spans: return the position of each bytes object (a Span) instead of a copy, and strings with theirs (Text).

    Raises:
        PickleError: unsafe_pickle for anything that is not allowed, bad_pickle if the data does not parse.
    """
    try:
        return _Machine(data, allowed, spans).run()
    except PickleError:
        raise
    except Exception as error:  # malformed bytes may raise anything
        raise PickleError("bad_pickle", f"{type(error).__name__}: {error}") from None


class _Machine:
    """The stack machine: opcodes up to STOP, executed by the functions in `_EXECUTE`."""

    def __init__(self, data: bytes, allowed: Allowed, spans: bool) -> None:
        self.file, self.size = io.BytesIO(data), len(data)
        self.allowed, self.spans = allowed, spans
        self.num_created = 0  # bytes or elements in the results of calls
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while (code := self.file.read(1)) != b".":
            if code not in _OPCODES:
                raise PickleError("bad_pickle", "the data ends too early" if not code else "it is not a pickle")
            name, read_argument, execute = _OPCODES[code]
            if execute is None:
                raise PickleError("unsafe_pickle", f"opcode {name} is not allowed")
            execute(self, read_argument(self.file) if read_argument else None)
        (value,) = self.stack
        if self.marks or isinstance(value, (Name, Pending)):
            raise ValueError("the pickle is incomplete")
        return value

    def pop_from(self, begin: int) -> list[Any]:
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def pop_to_mark(self) -> list[Any]:
        return self.pop_from(self.marks.pop())

    def pop_pairs(self, begin: int) -> dict[Any, Any]:
        items = self.pop_from(begin)
        return dict(zip(_keys(items[::2]), items[1::2], strict=True))

    def gather(self, count: int) -> None:
        """Replace the last `count` values by a tuple of them."""
        self.stack.append(tuple(self.pop_from(-count)))

    def update_last(self, method: str, items: Any) -> None:
        """Call a method of the container on top of the stack."""
        getattr(self.stack[-1], method)(items)

    def push_bytes(self, size: int) -> None:
        begin = self.file.tell()
        if begin + size > self.size:
            raise ValueError(f"{size} bytes announced, {self.size - begin} left")
        self.stack.append(Span(begin, size) if self.spans else self.file.read(size))
        self.file.seek(begin + size)

    def push_text(self, value: str, is_bytes: bool) -> None:
        if self.spans:
            value = Text(value)
            value.end, value.is_bytes = self.file.tell(), is_bytes
        self.stack.append(value)

    def store(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def fetch(self, key: int) -> None:
        value = self.memo[key]
        self.stack.append(value.results[0] if isinstance(value, Pending) and value.results else value)

    def push_name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)) or (module, name) not in self.allowed:
            raise PickleError("unsafe_pickle", f"{module!s:.99}.{name!s:.99} is not allowed")
        self.stack.append(Name(module, name))

    def call(self) -> None:
        arguments, name = self.stack.pop(), self.stack.pop()
        function = self.allowed[name] if isinstance(name, Name) else None
        if function is None:
            raise PickleError("unsafe_pickle", f"a call of {type(name).__name__} is not allowed")
        self.stack.append(self.limited(function(*arguments)))

    def build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (Pending, Record)):
            raise PickleError("unsafe_pickle", "an object with a state is not allowed")
        self.stack[-1] = self.limited(self.stack[-1].finish(state))

    def limited(self, value: Any) -> Any:
        """The result of a call, counted: thousands of calls on one stored value could otherwise fill the memory."""
        if isinstance(value, np.ndarray):
            self.num_created += value.nbytes
        elif isinstance(value, (bytes, str, set)):
            self.num_created += len(value)
        if self.num_created > 2 * self.size:
            raise PickleError("unsafe_pickle", "it creates more data than it contains")
        return value


def _read_string(file: io.BytesIO) -> str:
    """Argument of STRING. pickletools of Python 3.10 takes it for ASCII, but Python 2 put the bytes of arrays there."""
    return codecs.escape_decode(file.readline().strip()[1:-1])[0].decode("latin-1")  # type: ignore[attr-defined]


# group of opcodes -> how to execute one, given its argument
_EXECUTE: dict[str, Callable[[_Machine, Any], Any]] = {
    "PROTO FRAME": lambda m, _: None,
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT": lambda m, number: m.stack.append(number),
    "STRING UNICODE": lambda m, text: m.stack.append(text),  # protocol 0: escaped, so never located
    "BINSTRING SHORT_BINSTRING": lambda m, text: m.push_text(text, is_bytes=True),
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8": lambda m, text: m.push_text(text, is_bytes=False),
    "SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8": _Machine.push_bytes,
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_to_mark(),
    "MEMOIZE": lambda m, _: m.store(len(m.memo)),
    "PUT BINPUT LONG_BINPUT": _Machine.store,
    "GET BINGET LONG_BINGET": _Machine.fetch,
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_to_mark())),
    "TUPLE1": lambda m, _: m.gather(1),
    "TUPLE2": lambda m, _: m.gather(2),
    "TUPLE3": lambda m, _: m.gather(3),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "LIST": lambda m, _: m.stack.append(m.pop_to_mark()),
    "APPEND": lambda m, _: m.update_last("append", m.stack.pop()),
    "APPENDS": lambda m, _: m.update_last("extend", m.pop_to_mark()),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "DICT": lambda m, _: m.stack.append(m.pop_pairs(m.marks.pop())),
    "SETITEM": lambda m, _: m.update_last("update", m.pop_pairs(len(m.stack) - 2)),
    "SETITEMS": lambda m, _: m.update_last("update", m.pop_pairs(m.marks.pop())),
    "EMPTY_SET": lambda m, _: m.stack.append(set()),
    "ADDITEMS": lambda m, _: m.update_last("update", _keys(m.pop_to_mark())),
    "GLOBAL": lambda m, text: m.push_name(*text.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.push_name(m.stack.pop(-2), m.stack.pop()),
    "REDUCE NEWOBJ": lambda m, _: m.call(),
    "BUILD": lambda m, _: m.build(),
}
_BY_NAME = {name: execute for names, execute in _EXECUTE.items() for name in names.split()}
_READ_ARGUMENT: dict[str, Callable[[Any], Any]] = {  # where pickletools' function is not what is needed
    "STRING": _read_string,
    "SHORT_BINBYTES": pickletools.read_uint1,  # of bytes only the size is read: an image is located, not copied
    "BINBYTES": pickletools.read_uint4,
    "BINBYTES8": pickletools.read_uint8,
    "BYTEARRAY8": pickletools.read_uint8,
}
# code -> name, function that reads the argument from a file, function that executes the opcode
_OPCODES = {
    op.code.encode("latin-1"): (op.name, _READ_ARGUMENT.get(op.name, op.arg and op.arg.reader), _BY_NAME.get(op.name))
    for op in pickletools.opcodes
}
