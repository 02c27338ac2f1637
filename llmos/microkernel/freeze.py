"""Object graphs as bytes: `freeze` writes them, `thaw` (thaw.py) reads them. Made for snapshots of the whole kernel.

Format: msgpack `[format, number of objects, blocks, column of the root]`, kinds of blocks and columns in graph.py. Objects are written by
type, attribute by attribute and all elements of all lists in a row, because that is work for C loops: about 8 us for a sequence with
everything that belongs to it. Identity and cycles are kept, and the order of dicts and sequences. A set is rebuilt in the order in
which it was iterated, but how it will be iterated then depends also on its history: nothing that is decided may.

Only data is written; classes and methods are named. What can not be named or written is a `FreezeError` that says where it hangs, e.g.
`kernel.state.lanes['demo'].x`.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from itertools import chain
from operator import attrgetter
from types import MethodType
from typing import Any

import msgspec
import numpy as np

from llmos.errors import LlmosError
from llmos.microkernel.graph import (
    ARRAY_TYPES,
    DTYPES,
    FORMAT,
    MAX_DEPTH,
    MAX_INT,
    MIN_INT,
    PLAIN,
    Column,
    Kind,
    Layout,
    function_of,
    is_key,
    is_ours,
    layout_of,
)

_encoder = msgspec.msgpack.Encoder()
_NOT_PACKED = (
    OverflowError,
    TypeError,
    UnicodeEncodeError,
)  # what the encoder says to values that msgpack can not hold
Block = list[Any]
Writer = Callable[[list[int], list[Any]], Iterable[Block]]


class FreezeError(LlmosError):
    """Something in the graph can not be written."""


class TooLarge(FreezeError):
    """The graph would cost more than the caller allows."""


def freeze(obj: object, *, limit: int | None = None) -> bytes:
    """`obj` and everything it refers to. `limit` bounds the cost, in objects; `TooLarge` soon after it is reached."""
    try:
        return _Freezer(limit).run(obj)
    except _Refusal as refusal:
        culprit = refusal.obj
        raise FreezeError(f"{_search(obj, lambda part: part is culprit)}: {refusal}") from None
    except _NOT_PACKED as error:
        raise FreezeError(f"{_search(obj, _is_not_packed)}: {error}") from None


class _Refusal(Exception):
    def __init__(self, obj: object, text: str) -> None:
        super().__init__(text)
        self.obj = obj


class _Freezer:
    """One walk over a graph, in waves: what is met waits, by type, until its type is written."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit if limit is not None else 1 << 62
        self._spent = 0  # on plain values, in objects
        self._objects: list[Any] = []  # by number; keeps them alive, so that their ids stay theirs
        self._numbers: dict[int, int] = {}  # id -> number
        self._waiting: defaultdict[type, list[int]] = defaultdict(list)
        self._depths: dict[int, int] = {}  # of tuples in tuples
        self._writers: dict[type, Writer] = {
            list: self._lists, tuple: self._tuples, set: self._sets, frozenset: self._frozensets, deque: self._deques,
            dict: self._dicts, OrderedDict: self._dicts, array: self._arrays, np.ndarray: self._ndarrays,
            MethodType: self._methods, int: self._big_ints,
        }  # fmt: skip

    def run(self, root: object) -> bytes:
        blocks: list[Block] = []
        top = self._column([root])
        while self._waiting:
            cls, numbers = self._waiting.popitem()
            if len(self._objects) + self._spent > self._limit:
                raise TooLarge(f"more than {self._limit} objects")
            objects = [self._objects[number] for number in numbers]
            writer = self._writers.get(cls) or self._writer_for(cls, objects[0])
            blocks += writer(numbers, objects)
        return _encoder.encode([FORMAT, len(self._objects), blocks, top])

    # ------------------------------------------------------------ columns

    def _column(self, values: list[Any]) -> list[Any]:
        self._spent += len(values) >> 4
        types = set(map(type, values))
        if types <= PLAIN:
            if int not in types or _in_range(values, types):
                return [Column.PLAIN, values]
        elif types.isdisjoint(PLAIN):
            return [Column.OBJECTS, self._enter(values, types)]
        fits = _fits if int in types and not _in_range(values, types) else _is_plain
        others = [value for value in values if not fits(value)]
        numbers = iter(self._enter(others, set(map(type, others))))
        return [Column.MIXED, [value if fits(value) else [next(numbers)] for value in values]]

    def _enter(self, values: list[Any], types: set[type]) -> list[int]:
        """The objects' numbers. What is new will be written."""
        known, objects, waiting = self._numbers, self._objects, self._waiting
        ids = list(map(id, values))
        if (
            len(types) == 1 and known.keys().isdisjoint(ids) and len(set(ids)) == len(ids)
        ):  # the usual case, without a loop
            numbers = list(range(len(objects), len(objects) + len(values)))
            known.update(zip(ids, numbers))
            objects += values
            waiting[next(iter(types))] += numbers
            return numbers
        numbers = []
        for key, value in zip(ids, values):
            number = known.get(key)
            if number is None:
                number = known[key] = len(objects)
                objects.append(value)
                waiting[type(value)].append(number)
            numbers.append(number)
        return numbers

    def _flat(self, kind: int, numbers: list[int], objects: list[Any], *more: Any) -> Block:
        return [kind, numbers, list(map(len, objects)), self._column(list(chain.from_iterable(objects))), *more]

    # ------------------------------------------------------------ blocks

    def _lists(self, numbers: list[int], objects: list[Any]) -> Iterable[Block]:
        return [self._flat(Kind.LIST, numbers, objects)]

    def _tuples(self, numbers: list[int], objects: list[Any]) -> Iterable[Block]:
        nested = tuple in set(map(type, chain.from_iterable(objects)))
        block = self._flat(Kind.TUPLE, numbers, objects)
        for number, obj in zip(numbers, objects) if nested else ():
            depth = self._depths.get(number, 0) + 1
            if depth > MAX_DEPTH:
                raise _Refusal(obj, f"tuples are nested deeper than {MAX_DEPTH}")
            for part in obj:
                if type(part) is tuple:
                    self._depths[self._numbers[id(part)]] = depth
        return [block]

    def _sets(self, numbers: list[int], objects: list[Any]) -> Iterable[Block]:
        _check_keys(objects)
        return [self._flat(Kind.SET, numbers, objects)]

    def _frozensets(self, numbers: list[int], objects: list[Any]) -> Iterable[Block]:
        _check_keys(objects, in_frozenset=True)
        return [self._flat(Kind.FROZENSET, numbers, objects)]

    def _deques(self, numbers: list[int], objects: list[Any]) -> Iterable[Block]:
        return [self._flat(Kind.DEQUE, numbers, objects, [obj.maxlen for obj in objects])]

    def _dicts(self, numbers: list[int], objects: list[Any]) -> Iterable[Block]:
        _check_keys(objects)
        kind = Kind.DICT if type(objects[0]) is dict else Kind.ORDERED_DICT
        values = list(chain.from_iterable(obj.values() for obj in objects))
        return [self._flat(kind, numbers, objects, self._column(values))]

    def _arrays(self, numbers: list[int], objects: list[Any]) -> Iterable[Block]:
        for obj in objects:
            if obj.typecode not in ARRAY_TYPES:
                raise _Refusal(obj, f"an array of {obj.typecode!r} can not be frozen")
        contents = [obj.tobytes() for obj in objects]
        self._spent += sum(map(len, contents)) >> 12
        return [[Kind.ARRAY, numbers, [obj.typecode for obj in objects], [obj.itemsize for obj in objects], contents]]

    def _ndarrays(self, numbers: list[int], objects: list[Any]) -> Iterable[Block]:
        for number, obj in zip(numbers, objects):
            self._spent += obj.nbytes >> 12
            if obj.dtype not in DTYPES:
                raise _Refusal(obj, f"an array of {obj.dtype} can not be frozen")
            about = [obj.dtype.str, obj.shape, obj.flags.writeable]
            base = obj
            while isinstance(base.base, np.ndarray):
                base = base.base
            if base is not obj and base.flags.owndata and obj.size:
                if not base.flags.c_contiguous:
                    raise _Refusal(obj, "a view of an array that is not contiguous can not be frozen")
                offset = obj.__array_interface__["data"][0] - base.__array_interface__["data"][0]
                yield [Kind.VIEW, [number], self._column([base]), [[*about, offset, obj.strides]]]
            elif base.flags.owndata or not base.flags.writeable:
                yield [Kind.NDARRAY, [number], [[*about, obj.tobytes()]]]
            else:
                raise _Refusal(obj, "an array over memory of something else can not be frozen")

    def _methods(self, numbers: list[int], objects: list[Any]) -> Iterable[Block]:
        for obj in objects:
            if function_of(type(obj.__self__), obj.__func__.__name__) is not obj.__func__:
                raise _Refusal(obj, f"{obj.__func__.__qualname__} is no method of {type(obj.__self__).__name__}")
        owners, names = [obj.__self__ for obj in objects], [obj.__func__.__name__ for obj in objects]
        return [[Kind.METHOD, numbers, self._column(owners), names]]

    def _big_ints(self, numbers: list[int], objects: list[Any]) -> Iterable[Block]:
        return [[Kind.BIG_INT, numbers, [hex(obj) for obj in objects]]]

    # ------------------------------------------------------------ types that are met for the first time

    def _writer_for(self, cls: type, obj: Any) -> Writer:
        writer: Writer
        if issubclass(cls, type):
            writer = self._classes
        elif issubclass(cls, Enum):
            writer = self._enums
        elif issubclass(cls, np.generic):
            writer = self._scalars
        elif issubclass(cls, msgspec.Struct):
            writer = self._structs
        else:
            layout = layout_of(cls)
            if layout is None:
                raise _Refusal(obj, f"objects of {cls.__module__}.{cls.__qualname__} can not be frozen")
            writer = _InstanceWriter(layout, self._column).write
        self._writers[cls] = writer
        return writer

    def _classes(self, numbers: list[int], objects: list[Any]) -> Iterable[Block]:
        return [[Kind.CLASS, numbers, [_name_of(obj, obj) for obj in objects]]]

    def _enums(self, numbers: list[int], objects: list[Any]) -> Iterable[Block]:
        cls = type(objects[0])
        for obj in objects:
            if obj.name not in cls.__members__:
                raise _Refusal(obj, f"{obj!r} is no member of {cls.__name__}")
        return [[Kind.ENUM, numbers, *_name_of(objects[0], cls), [obj.name for obj in objects]]]

    def _scalars(self, numbers: list[int], objects: list[Any]) -> Iterable[Block]:
        if objects[0].dtype not in DTYPES:
            raise _Refusal(objects[0], f"a number of {objects[0].dtype} can not be frozen")
        return [[Kind.SCALAR, numbers, [[obj.dtype.str, obj.tobytes()] for obj in objects]]]

    def _structs(self, numbers: list[int], objects: list[Any]) -> Iterable[Block]:
        return [[Kind.STRUCT, numbers, *_name_of(objects[0], type(objects[0])), objects]]


class _InstanceWriter:
    """Blocks of one class's instances. Those that lack attributes, or have others, get blocks of their own."""

    def __init__(self, layout: Layout, column: Callable[[list[Any]], list[Any]]) -> None:
        self._slots = tuple(layout.slots)
        self._has_dict = layout.has_dict
        self._column = column

    def write(self, numbers: list[int], objects: list[Any]) -> Iterator[Block]:
        if self._has_dict:
            yield from self._by_attributes(numbers, objects)
            return
        try:
            columns = [list(map(attrgetter(name), objects)) for name in self._slots]
        except AttributeError:
            yield from self._by_attributes(numbers, objects)
        else:
            yield self._block(numbers, objects[0], self._slots, columns)

    def _by_attributes(self, numbers: list[int], objects: list[Any]) -> Iterator[Block]:
        groups: defaultdict[tuple[str, ...], list[tuple[int, Any]]] = defaultdict(list)
        for number, obj in zip(numbers, objects):
            present = tuple(name for name in self._slots if hasattr(obj, name))
            groups[present + tuple(vars(obj) if self._has_dict else ())].append((number, obj))
        for names, members in groups.items():
            columns = [[getattr(obj, name) for _, obj in members] for name in names]
            yield self._block([number for number, _ in members], members[0][1], names, columns)

    def _block(self, numbers: list[int], obj: Any, names: tuple[str, ...], columns: list[list[Any]]) -> Block:
        about = [Kind.INSTANCE, numbers, *_name_of(obj, type(obj)), self._slots, names]
        return [*about, [self._column(column) for column in columns]]


def _in_range(values: list[Any], types: set[type]) -> bool:
    """Can msgpack hold the integers among plain values?"""
    numbers = values if len(types) == 1 else [value for value in values if type(value) is int]
    return min(numbers) >= MIN_INT and max(numbers) <= MAX_INT


def _is_plain(value: Any) -> bool:
    return type(value) in PLAIN


def _fits(value: Any) -> bool:
    return type(value) in PLAIN and (type(value) is not int or MIN_INT <= value <= MAX_INT)


def _check_keys(objects: list[Any], *, in_frozenset: bool = False) -> None:
    if PLAIN.issuperset(map(type, chain.from_iterable(objects))):
        return
    for key in chain.from_iterable(objects):
        if type(key) not in PLAIN and not is_key(key, in_frozenset=in_frozenset):
            raise _Refusal(key, f"{type(key).__qualname__} can not be frozen as a key or an element of a set")


def _name_of(obj: object, cls: type) -> tuple[str, str]:
    if not is_ours(cls.__module__) or "<" in cls.__qualname__:
        raise _Refusal(obj, f"{cls.__module__}.{cls.__qualname__} can not be frozen")
    return cls.__module__, cls.__qualname__


# ------------------------------------------------------------ where something hangs; only for messages


def _search(root: object, wanted: Callable[[Any], bool]) -> str:
    """The path to the first object that is wanted."""
    todo: deque[tuple[Any, str]] = deque([(root, type(root).__name__.lower())])
    seen = {id(root)}
    while todo:
        holder, path = todo.popleft()
        if wanted(holder):
            return path
        for label, part in _parts(holder):
            if id(part) not in seen or type(part) in PLAIN:
                seen.add(id(part))
                todo.append((part, path + label))
    return "?"


def _parts(holder: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(holder, dict):
        items = [(key, repr(key) if type(key) in PLAIN else type(key).__name__) for key in holder]
        return [*((f"[{name}]", holder[key]) for key, name in items), *((f" key {name}", key) for key, name in items)]
    if isinstance(holder, (list, tuple, deque, set, frozenset)):
        return [(f"[{index}]", item) for index, item in enumerate(holder)]
    if isinstance(holder, MethodType):
        return [(".__self__", holder.__self__)]
    if isinstance(holder, type) or (layout := layout_of(type(holder))) is None:
        return []
    names = [*(name for name in layout.slots if hasattr(holder, name)), *getattr(holder, "__dict__", ())]
    return [(f".{name}", getattr(holder, name)) for name in names]


def _is_not_packed(part: Any) -> bool:
    if type(part) is str or isinstance(part, msgspec.Struct):
        try:
            _encoder.encode(part)
        except _NOT_PACKED:
            return True
    return False
