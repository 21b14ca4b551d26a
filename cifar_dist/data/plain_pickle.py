"""An unpickler for plain values and arrays of numbers, which calls nothing but functions of this module."""

from __future__ import annotations

import math
import pickle
import re
from typing import Any, ClassVar

import numpy as np


class _Dtype:
    """A pickled ``numpy.dtype``: plain numbers only, since objects are pointers and records can hide them."""

    def __init__(self, name: Any, *_: Any):
        if not isinstance(name, str) or not re.fullmatch("[<>|=]?[biuf][1248]", name):
            raise pickle.UnpicklingError(f"an array of {name!r:.20}")
        self.name = name[-2:]
        self.order: Any = "="

    def __setstate__(self, state: Any) -> None:
        order, *rest = state[1:5]
        if order not in ("<", ">", "|", "=") or any(rest):
            raise pickle.UnpicklingError("an array of records")
        self.order = order

    def of(self, raw: Any, shape: Any, order: str) -> np.ndarray:
        """The numbers in `raw`, which must be all there."""
        content = raw.encode("latin1") if isinstance(raw, str) else raw
        if not isinstance(content, (bytes, bytearray)):
            raise pickle.UnpicklingError("an array without content")
        if not isinstance(shape, tuple) or not all(isinstance(side, int) and side >= 0 for side in shape):
            raise pickle.UnpicklingError("an array without shape")
        dtype = np.dtype(self.name).newbyteorder(self.order)
        if math.prod(shape) * dtype.itemsize != len(content):
            raise pickle.UnpicklingError("an array of another size than its content")
        return np.frombuffer(content, dtype).reshape(shape, order=order)  # type: ignore[call-overload]


class Array:
    """A pickled ``numpy.ndarray``; its content comes as state."""

    content: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array without type")
        self.content = dtype.of(raw, shape, "F" if fortran else "C")


def _array_of(buffer: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> Array:
    """How pickles of protocol 5 hold arrays."""
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", buffer))
    return array


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """How pickles of protocol 2 written by Python 3 spell bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding}")
    return text.encode("latin1")


_CALLS: dict[tuple[str, str], Any] = {("numpy", "dtype"): _Dtype, ("_codecs", "encode"): _latin1}
for _package in ("numpy.core", "numpy._core"):  # the names that older and newer numpy give them
    _CALLS[_package + ".multiarray", "_reconstruct"] = lambda *_: Array()
    _CALLS[_package + ".numeric", "_frombuffer"] = _array_of

_OPCODES = (
    "MARK", "STOP", "POP", "POP_MARK", "DUP", "FLOAT", "INT", "BININT", "BININT1", "LONG", "BININT2", "NONE",
    "REDUCE", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "APPEND", "BUILD", "GLOBAL",
    "DICT", "EMPTY_DICT", "APPENDS", "GET", "BINGET", "LONG_BINGET", "LIST", "EMPTY_LIST", "PUT", "BINPUT",
    "LONG_BINPUT", "SETITEM", "TUPLE", "EMPTY_TUPLE", "SETITEMS", "BINFLOAT", "PROTO", "TUPLE1", "TUPLE2", "TUPLE3",
    "NEWTRUE", "NEWFALSE", "LONG1", "LONG4", "BINBYTES", "SHORT_BINBYTES", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES8", "STACK_GLOBAL", "MEMOIZE", "FRAME", "BYTEARRAY8",
)  # fmt: skip
_MOST_BYTES = 1 << 30  # that one file may unpack to
_InPython: Any = pickle._Unpickler


class ArraysOnly(_InPython):
    """Plain values and arrays (as `Array`), by the few opcodes that these need; globals are functions of this module.

    In Python, because pickle's C code can be made to fill the memory with an empty memo, sets attributes of whatever
    it has, and cannot be told what to hash.
    """

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it does what no array needs")

    dispatch: ClassVar = dict.fromkeys(range(256), _refuse)

    _made = 0

    def _count(self, made: Any) -> None:
        """Few bytes can ask for the same large content again and again."""
        made = made.content if isinstance(made, Array) else made
        self._made += getattr(made, "nbytes", len(made) if isinstance(made, bytes) else 0)
        if self._made > _MOST_BYTES:
            raise pickle.UnpicklingError(f"it unpacks to more than {_MOST_BYTES:,} bytes")

    def find_class(self, module: str, name: str) -> Any:
        """The function of this module that stands for a global."""
        if (module, name) == ("numpy", "ndarray"):
            return None  # named where an array begins, but never called
        if (module, name) not in _CALLS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _CALLS[module, name]

    def load_reduce(self) -> None:
        """Call one of these functions."""
        if self.stack[-2] not in _CALLS.values():
            raise pickle.UnpicklingError("it calls what is no part of an array")
        super().load_reduce()
        self._count(self.stack[-1])

    def load_build(self) -> None:
        """Give an array its content, or a type its byte order."""
        if not isinstance(self.stack[-2], (Array, _Dtype)):
            raise pickle.UnpicklingError("it changes what is no array")
        super().load_build()
        self._count(self.stack[-1])

    def load_setitem(self) -> None:
        """Refuse keys that are no words."""
        self._check_keys(self.stack[-2:])
        super().load_setitem()

    def load_setitems(self) -> None:
        """Refuse keys that are no words."""
        self._check_keys(self.stack)
        super().load_setitems()

    def load_dict(self) -> None:
        """Refuse keys that are no words."""
        self._check_keys(self.stack)
        super().load_dict()

    def _check_keys(self, items: list[Any]) -> None:
        """Hashing a small pickle of nested tuples can take forever."""
        if not all(isinstance(key, (str, bytes, int)) for key in items[::2]):
            raise pickle.UnpicklingError("it has keys that are no words")


for _name in _OPCODES:
    _code = getattr(pickle, _name)[0]
    ArraysOnly.dispatch[_code] = getattr(ArraysOnly, f"load_{_name.lower()}", _InPython.dispatch[_code])
