"""The inverse of freeze.py: `thaw(bytes) -> obj`. Whatever bytes come in, the only exception that comes out is `ProtocolError`.

Nothing of what is rebuilt runs while it is rebuilt: instances are made bare and their attributes written into their places, classes
and methods are looked up among those that are already loaded and ours (graph.py). Memory is bounded by the size of the input.

Order of work: (1) everything that can stand alone, containers still empty; (2) what can not be changed later, each after its parts;
(3) instances and sequences are filled, then dicts and sets, whose keys are whole by then.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from enum import Enum
from itertools import accumulate
from types import MethodType
from typing import Any, TypeVar

import msgspec
import numpy as np

from llmos.errors import ProtocolError
from llmos.microkernel.graph import (
    ARRAY_TYPES,
    DTYPES,
    FORMAT,
    MAX_DEPTH,
    PLAIN,
    Column,
    Kind,
    Layout,
    function_of,
    is_key,
    is_ours,
    layout_of,
)

T = TypeVar("T")
_BAD_INPUT = (
    TypeError, ValueError, LookupError, AttributeError, OverflowError, RecursionError, MemoryError, msgspec.MsgspecError,
)  # fmt: skip
_UNBUILT = object()
_MAX_DIMENSIONS = 8


class _Graph(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    format: str
    count: int
    blocks: list[list[Any]]
    root: list[Any]


_decoder = msgspec.msgpack.Decoder(_Graph)


def thaw(data: bytes | memoryview) -> Any:
    """What was frozen."""
    try:
        graph = _decoder.decode(data)
        if graph.format != FORMAT:
            raise ProtocolError(f"snapshot: format {graph.format[:40]!r}, this side reads {FORMAT!r}")
        return _Thawer(graph).run()
    except _BAD_INPUT as error:
        raise ProtocolError(f"snapshot: {type(error).__name__}: {str(error)[:200]}") from None


def find_class(module: str, name: str) -> type:
    """A class of ours by name, in a module that is loaded. `LookupError` if there is none."""
    found: Any = sys.modules.get(module) if is_ours(module) else None
    for part in name.split("."):
        found = vars(found).get(part) if found is not None and hasattr(found, "__dict__") else None
    if not isinstance(found, type) or (found.__module__, found.__qualname__) != (module, name):
        raise LookupError(f"no class {module}.{name}")
    return found


class _Thawer:
    def __init__(self, graph: _Graph) -> None:
        self._graph = graph
        if sum(len(_of(list, block[1])) for block in graph.blocks) != graph.count:
            raise ValueError("objects are missing")
        self._objects: list[Any] = [_UNBUILT] * graph.count
        self._begun = bytearray(graph.count)
        self._unbuilt: dict[
            int, tuple[int, tuple[Any, ...]]
        ] = {}  # number -> kind and what is known, of what is made of parts
        self._depths: dict[int, int] = {}  # of tuples in tuples

    def run(self) -> Any:
        for block in self._graph.blocks:
            self._begin(*block)
        for number in range(self._graph.count):
            self._get(number)
        for fillers in (_FIRST, _LAST):
            for block in self._graph.blocks:
                fill = fillers.get(block[0])
                if fill is not None:
                    fill(self, [self._objects[number] for number in block[1]], *block[2:])
        [root] = self._column(self._graph.root)
        return root

    def _begin(self, kind: Any, numbers: list[Any], *rest: Any) -> None:
        """Make the objects of a block, or put them off until their parts are there."""
        make, of_parts = _ALONE.get(_index(kind)), _OF_PARTS.get(kind)
        for number in numbers:
            if self._begun[_index(number)]:
                raise ValueError(f"object {number} is there twice")
            self._begun[number] = 1
        if make is not None:
            for number, made in zip(numbers, make(self, len(numbers), *rest), strict=True):
                self._objects[number] = made
        elif of_parts is not None:
            for number, known in zip(numbers, of_parts[0](*rest), strict=True):
                self._unbuilt[number] = (kind, known)
        else:
            raise ValueError(f"no kind {kind}")

    def _get(self, number: Any) -> Any:
        obj = self._objects[_index(number)]
        if obj is _UNBUILT:
            if number not in self._unbuilt:
                raise ValueError(f"object {number} is a part of itself")
            kind, known = self._unbuilt.pop(number)
            obj = self._objects[number] = _OF_PARTS[kind][1](self, number, *known)
        return obj

    def _column(self, column: Any) -> list[Any]:
        """The values of a column."""
        form, values = _of(list, column)
        if form == Column.PLAIN:
            if not PLAIN.issuperset(map(type, _of(list, values))):
                raise TypeError("a plain column with something else in it")
            return list(values)
        if form == Column.OBJECTS:
            return [self._get(number) for number in _of(list, values)]
        if form != Column.MIXED:
            raise ValueError(f"no form {form!r}")
        return [value if type(value) in PLAIN else self._get(_only(value)) for value in _of(list, values)]

    def _pieces(self, lengths: Any, column: Any) -> Iterator[list[Any]]:
        return _cut(lengths, self._column(column))

    # ------------------------------------------------------------ stand alone

    def _deques(self, count: int, lengths: Any, column: Any, maxlens: Any) -> Iterator[Any]:
        for length, maxlen in zip(_of(list, lengths), _of(list, maxlens), strict=True):
            if maxlen is not None and _index(length) > _index(maxlen):
                raise ValueError("a deque is longer than it may be")
            yield deque(maxlen=maxlen)

    def _arrays(self, count: int, typecodes: Any, sizes: Any, contents: Any) -> Iterator[Any]:
        for typecode, size, content in zip(_of(list, typecodes), _of(list, sizes), _of(list, contents), strict=True):
            made: array[Any] = array(_of(str, typecode))
            if typecode not in ARRAY_TYPES or made.itemsize != size:
                raise ValueError(f"an array of {typecode!r} with {size} bytes an item")
            made.frombytes(_of(bytes, content))
            yield made

    def _ndarrays(self, count: int, all_about: Any) -> Iterator[Any]:
        for kind, shape, writeable, content in _of(list, all_about):
            made = np.frombuffer(_of(bytes, content), _dtype(kind)).reshape(_numbers(shape)).copy()
            made.flags.writeable = _of(bool, writeable)
            yield made

    def _scalars(self, count: int, all_about: Any) -> Iterator[Any]:
        for kind, content in _of(list, all_about):
            [made] = np.frombuffer(_of(bytes, content), _dtype(kind))
            yield made

    def _instances(self, count: int, module: Any, name: Any, *_: Any) -> Iterator[Any]:
        cls, _layout = _plain_class(module, name)
        return (object.__new__(cls) for _ in range(count))

    def _structs(self, count: int, module: Any, name: Any, structs: Any) -> Iterator[Any]:
        cls = find_class(_of(str, module), _of(str, name))
        if not issubclass(cls, msgspec.Struct):
            raise ValueError(f"{name} is not a message")
        return (msgspec.convert(struct, cls) for struct in _of(list, structs))

    def _enums(self, count: int, module: Any, name: Any, members: Any) -> Iterator[Any]:
        cls = find_class(_of(str, module), _of(str, name))
        if not issubclass(cls, Enum):
            raise ValueError(f"{name} is not an enumeration")
        return (cls.__members__[_of(str, member)] for member in _of(list, members))

    def _classes(self, count: int, names: Any) -> Iterator[Any]:
        return (find_class(_of(str, module), _of(str, name)) for module, name in _of(list, names))

    def _big_ints(self, count: int, digits: Any) -> Iterator[Any]:
        return (int(_of(str, number), 16) for number in _of(list, digits))

    # ------------------------------------------------------------ made of parts

    def _parts(self, number: int, column: Any) -> list[Any]:
        parts = self._column(column)
        if column[0] != Column.PLAIN:
            inner = column[1] if column[0] == Column.OBJECTS else [_only(v) for v in column[1] if type(v) is list]
            depth = 1 + max((self._depths.get(each, 0) for each in inner), default=0)
            if depth > MAX_DEPTH:
                raise ValueError(f"tuples are nested deeper than {MAX_DEPTH}")
            self._depths[number] = depth
        return parts

    def _tuple(self, number: int, column: Any) -> tuple[Any, ...]:
        return tuple(self._parts(number, column))

    def _frozenset(self, number: int, column: Any) -> frozenset[Any]:
        return frozenset(_keys(self._parts(number, column), in_frozenset=True))

    def _view(self, number: int, base: Any, about: Any) -> np.ndarray[Any, Any]:
        kind, shape, writeable, offset, strides = _of(list, about)
        memory = _of(np.ndarray, self._get(base))
        numbers, dtype = _numbers(shape), _dtype(kind)
        if not memory.flags.owndata or math.prod(numbers) * dtype.itemsize > memory.nbytes:
            raise ValueError("a view is larger than its array")
        steps = tuple(_of(int, step) for step in _of(list, strides))
        made: np.ndarray[Any, Any] = np.ndarray(numbers, dtype, memory, _index(offset), steps)
        if made.flags.writeable and not _of(bool, writeable):
            made.flags.writeable = False
        return made

    def _method(self, number: int, owner: Any, name: Any) -> MethodType:
        obj = self._get(owner)
        function = function_of(type(obj), _of(str, name))
        if function is None:
            raise LookupError(f"{type(obj).__qualname__} has no method {name[:40]!r}")
        return MethodType(function, obj)

    # ------------------------------------------------------------ filled later

    def _fill_sequences(self, objects: list[Any], lengths: Any, column: Any, *_: Any) -> None:
        for obj, values in zip(objects, self._pieces(lengths, column), strict=True):
            obj.extend(values)

    def _fill_sets(self, objects: list[Any], lengths: Any, column: Any) -> None:
        for obj, values in zip(objects, self._pieces(lengths, column), strict=True):
            obj.update(_keys(values))

    def _fill_dicts(self, objects: list[Any], lengths: Any, column: Any, values: Any) -> None:
        keys = self._pieces(lengths, column)
        for obj, mine, theirs in zip(objects, keys, self._pieces(lengths, values), strict=True):
            obj.update(zip(_keys(mine), theirs, strict=True))
            if len(obj) != len(mine):
                raise ValueError("a dict has a key twice")

    def _fill_instances(self, objects: list[Any], module: Any, name: Any, slots: Any, names: Any, columns: Any) -> None:
        _, layout = _plain_class(module, name)
        _check_fields(name, layout, _of(list, slots), _of(list, names))
        for field, column in zip(names, _of(list, columns), strict=True):
            values = self._column(column)
            member = layout.slots.get(field)
            for obj, value in zip(objects, values, strict=True):
                if member is not None:
                    member.__set__(obj, value)
                else:
                    vars(obj)[sys.intern(field)] = value


def _plain_class(module: Any, name: Any) -> tuple[type, Layout]:
    cls = find_class(_of(str, module), _of(str, name))
    layout = layout_of(cls)
    if layout is None:
        raise ValueError(f"{name} is not a plain class")
    return cls, layout


def _check_fields(name: str, layout: Layout, slots: list[Any], names: list[Any]) -> None:
    if list(layout.slots) != slots:
        raise ValueError(f"{name} has other fields than this side's")
    others = [_of(str, each) for each in names if each not in layout.slots]
    if len(set(names)) != len(names) or (others and not layout.has_dict):
        raise ValueError(f"{name} has impossible fields")


def _cut(lengths: Any, values: list[Any]) -> Iterator[list[Any]]:
    """Pieces of these lengths, which must be all of `values`."""
    ends = list(accumulate(_index(length) for length in _of(list, lengths)))
    if (ends[-1] if ends else 0) != len(values):
        raise ValueError("lengths and values do not agree")
    return (values[end - length : end] for end, length in zip(ends, lengths))


def _each_column(lengths: Any, column: Any) -> Iterator[tuple[Any, ...]]:
    """A column of its own for each tuple of a block."""
    form, values = _of(list, column)
    return (([form, piece],) for piece in _cut(lengths, _of(list, values)))


def _each_of(column: Any, others: Any) -> Iterator[tuple[Any, ...]]:
    """The number of an object, and something else."""
    form, numbers = _of(list, column)
    if form != Column.OBJECTS:
        raise ValueError("not a column of objects")
    return zip(_of(list, numbers), _of(list, others), strict=True)


def _of(cls: type[T], value: Any) -> T:
    if type(value) is not cls:
        raise TypeError(f"expected {cls.__name__}, got {type(value).__name__}")
    return value


def _index(value: Any) -> int:
    if _of(int, value) < 0:
        raise ValueError("a negative number")
    return int(value)


def _only(value: Any) -> Any:
    [found] = _of(list, value)
    return found


def _numbers(shape: Any) -> tuple[int, ...]:
    if len(_of(list, shape)) > _MAX_DIMENSIONS:
        raise ValueError("too many dimensions")
    return tuple(_index(number) for number in shape)


def _dtype(kind: Any) -> np.dtype[Any]:
    found = next((dtype for dtype in DTYPES if dtype.str == kind), None)
    if found is None:
        raise TypeError("an array of another type")
    return found


def _keys(values: list[Any], *, in_frozenset: bool = False) -> list[Any]:
    for value in values:
        if type(value) not in PLAIN and not is_key(value, in_frozenset=in_frozenset):
            raise TypeError(f"{type(value).__qualname__} is no key")
    return values


_ALONE: dict[int, Callable[..., Iterator[Any]]] = {
    Kind.LIST: lambda _, count, *rest: ([] for _ in range(count)),
    Kind.SET: lambda _, count, *rest: (set() for _ in range(count)),
    Kind.DICT: lambda _, count, *rest: ({} for _ in range(count)),
    Kind.ORDERED_DICT: lambda _, count, *rest: (OrderedDict() for _ in range(count)),
    Kind.DEQUE: _Thawer._deques,
    Kind.ARRAY: _Thawer._arrays,
    Kind.NDARRAY: _Thawer._ndarrays,
    Kind.SCALAR: _Thawer._scalars,
    Kind.INSTANCE: _Thawer._instances,
    Kind.STRUCT: _Thawer._structs,
    Kind.ENUM: _Thawer._enums,
    Kind.CLASS: _Thawer._classes,
    Kind.BIG_INT: _Thawer._big_ints,
}
# How a block is taken apart, and how one object of it is made.
_OF_PARTS: dict[int, tuple[Callable[..., Iterator[tuple[Any, ...]]], Callable[..., Any]]] = {
    Kind.TUPLE: (_each_column, _Thawer._tuple),
    Kind.FROZENSET: (_each_column, _Thawer._frozenset),
    Kind.VIEW: (_each_of, _Thawer._view),
    Kind.METHOD: (_each_of, _Thawer._method),
}
_FIRST: dict[int, Callable[..., None]] = {
    Kind.LIST: _Thawer._fill_sequences,
    Kind.DEQUE: _Thawer._fill_sequences,
    Kind.INSTANCE: _Thawer._fill_instances,
}
_LAST: dict[int, Callable[..., None]] = {
    Kind.SET: _Thawer._fill_sets,
    Kind.DICT: _Thawer._fill_dicts,
    Kind.ORDERED_DICT: _Thawer._fill_dicts,
}
