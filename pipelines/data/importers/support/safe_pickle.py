"""Reads pickles of plain values and byte arrays without unpickling.

In: a pickle of an old data set. Out: dictionaries, lists, text, integers and uint8 arrays. Must not
know what they mean. `pickletools` lists the operations, and the few that such a pickle needs are
interpreted here; any other is refused. Nothing is imported or called: the names of NumPy's array
constructors are only compared.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from models.core.errors import TesseraError

MAX_BYTES = 1 << 30
MAX_OPERATIONS = 10_000_000
_RECONSTRUCT = {f"numpy.{core}.multiarray _reconstruct" for core in ("core", "_core")}
_FROM_BUFFER = {f"numpy.{core}.numeric _frombuffer" for core in ("core", "_core")}
_ENCODE = "_codecs encode"
_NAMES = {*_RECONSTRUCT, *_FROM_BUFFER, _ENCODE, "numpy ndarray", "numpy dtype"}
_BYTES = frozenset({"STRING", "BINSTRING", "SHORT_BINSTRING"})
_VALUES = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "BINFLOAT", "FLOAT"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})


class _Name(str):
    """The name of a global, which is never looked up."""


class _Mark:
    """The MARK on the stack."""


class _Built:
    """An array or dtype that is being built: name and arguments of its constructor."""

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments = name, arguments
        self.state: tuple[Any, ...] = ()


def read(data: bytes, where: str) -> Any:
    """The value. Python 2 strings are returned as bytes. Raises TesseraError."""
    if len(data) > MAX_BYTES:
        raise TesseraError(f"{where} is larger than {MAX_BYTES >> 20} MiB")
    try:
        machine = _Machine()
        for count, (operation, argument) in enumerate(_operations(data)):
            if count > MAX_OPERATIONS:
                raise ValueError(f"it has more than {MAX_OPERATIONS} operations")
            machine.do(operation, argument)
        return machine.result()
    # What pickletools and the stack raise on damaged bytes.
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = str(error).split("\n")[0][:200]
        raise TesseraError(
            f"{where} is not a pickle of plain values and byte arrays: {reason}",
            hint="other pickles are never loaded; download the file again, or convert it",
        ) from None


def _operations(data: bytes) -> Iterator[tuple[str, Any]]:
    for operation, argument, _ in pickletools.genops(data):
        yield operation.name, argument


class _Machine:
    """The stack and the memo of a pickle that is being read."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self._stack) != 1:
            raise ValueError("it doesn't end with one value")
        return _finish(self._stack[0])

    def do(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _BYTES:
            stack.append(argument.encode("latin-1"))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            stack.append(_Mark)
        elif name not in _IGNORED:
            self._combine(name, argument)

    def _combine(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in ("TUPLE", "LIST", "DICT"):
            values = self._pop_mark()
            stack.append(_MAKERS[name](values))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            stack[-size:] = [tuple(stack[-size:])]
        elif name in ("APPEND", "APPENDS"):
            values = self._pop_mark() if name == "APPENDS" else [stack.pop()]
            _of(stack[-1], list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = self._pop_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _of(stack[-1], dict).update(_pairs(values))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(
                _global(argument if name == "GLOBAL" else f"{stack.pop(-2)} {stack.pop()}")
            )
        elif name == "REDUCE":
            arguments, called = _of(stack.pop(), tuple), _of(stack.pop(), _Name)
            stack.append(_call(called, arguments))
        elif name == "BUILD":
            state, built = _of(stack.pop(), tuple), _of(stack[-1], _Built)
            built.state = state
        else:
            raise ValueError(f"it has the operation {name}")

    def _pop_mark(self) -> list[Any]:
        at = len(self._stack) - 1 - self._stack[::-1].index(_Mark)
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values


def _of(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"it has a {type(value).__name__} where a {kind.__name__} must be")
    return value


def _pairs(values: list[Any]) -> dict[Any, Any]:
    keys = values[0::2]
    if len(values) % 2 or not all(isinstance(key, str | bytes) for key in keys):
        raise ValueError("it has a dictionary whose keys are not text")
    return dict(zip(keys, values[1::2], strict=True))


_MAKERS: dict[str, Callable[[list[Any]], Any]] = {"TUPLE": tuple, "LIST": list, "DICT": _pairs}


def _global(name: str) -> _Name:
    if name not in _NAMES:
        raise ValueError(f"it uses {name[:100]!r}")
    return _Name(name)


def _call(name: _Name, arguments: tuple[Any, ...]) -> Any:
    if name == _ENCODE:  # bytes in a pickle for Python 2, written by Python 3
        text, encoding = arguments
        if encoding != "latin1":
            raise ValueError(f"it has bytes written in {encoding!r}")
        return _of(text, str).encode("latin-1")
    return _Built(str(name), arguments)


def _finish(value: Any) -> Any:
    """The value with its arrays; arrays may be the value or values of its dictionary, not
    deeper."""
    if isinstance(value, dict):
        return {key: _array(v) if isinstance(v, _Built) else v for key, v in value.items()}
    return _array(value) if isinstance(value, _Built) else value


def _array(built: _Built) -> np.ndarray[Any, Any]:
    if built.name in _RECONSTRUCT:
        _, shape, kind, fortran, raw = built.state
    elif built.name in _FROM_BUFFER:
        raw, kind, shape, order = built.arguments
        fortran = order == "F"
    else:
        raise ValueError(f"it has a {built.name} where a value must be")
    _of(shape, tuple)
    if _of(kind, _Built).name != "numpy dtype" or kind.arguments[0] not in ("u1", b"u1", "|u1"):
        raise ValueError("it has an array of another dtype than uint8")
    raw = _of(raw, bytes | bytearray)  # type: ignore[arg-type]
    if not all(type(side) is int and side >= 0 for side in shape) or math.prod(shape) != len(raw):
        raise ValueError(f"it has an array of shape {shape} and {len(raw)} bytes")
    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
