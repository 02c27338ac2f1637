"""What freeze.py and thaw.py agree on: kinds of blocks and columns, and which classes and methods a frozen graph may name.

Only what is defined in `llmos.microkernel`, `llmos.protocol` and `llmos.codes` counts; the shell's module does things to the outside, so
it does not.
"""

from __future__ import annotations

import collections.abc
import sys
from abc import ABC
from dataclasses import dataclass
from enum import Enum
from types import FunctionType, MemberDescriptorType
from typing import Any, Generic, Protocol

import msgspec
import numpy as np

FORMAT = f"llmos-graph-1-{sys.byteorder}"
PLAIN = frozenset({type(None), bool, int, float, str, bytes})
DTYPES = frozenset(np.dtype(kind) for kind in (np.bool_, np.int32, np.int64, np.float64))
ARRAY_TYPES = frozenset("bBhHiIlLqQfd")
MIN_INT, MAX_INT = -(1 << 63), (1 << 64) - 1  # what msgpack holds
MAX_DEPTH = 100  # of tuples inside tuples: hashing and comparing them is recursive
_MAX_KEY_WEIGHT = 1000  # values inside one key
_BASES = {
    object,
    Generic,
    Protocol,
    ABC,
    *(getattr(collections.abc, name) for name in collections.abc.__all__),
}  # stateless


class Kind:
    """The first number of a block `[kind, numbers of the objects, ...]`, with what follows."""

    LIST = 1  # lengths, column
    TUPLE = 2  # lengths, column
    SET = 3  # lengths, column
    FROZENSET = 4  # lengths, column
    DEQUE = 5  # lengths, column, maxlens
    DICT = 6  # lengths, column of keys, column of values
    ORDERED_DICT = 7  # lengths, column of keys, column of values
    ARRAY = 8  # typecodes, item sizes, contents
    NDARRAY = 9  # [dtype, shape, writeable, contents] of each
    VIEW = 10  # column of bases, [dtype, shape, writeable, offset, strides] of each
    SCALAR = 11  # [dtype, contents] of each
    INSTANCE = 12  # module, name, slots of the class, attributes that these have, a column for each
    STRUCT = 13  # module, name, structs
    ENUM = 14  # module, name, members
    CLASS = 15  # [module, name] of each
    METHOD = 16  # column of owners, names
    BIG_INT = 17  # hexadecimal digits of each


class Column:
    """The first number of a column `[form, values]`."""

    PLAIN = 0  # the values themselves
    OBJECTS = 1  # numbers of objects
    MIXED = 2  # a plain value, or [number]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where instances of a class keep their attributes."""

    slots: dict[str, MemberDescriptorType]
    has_dict: bool


def is_ours(module: str) -> bool:
    """May a frozen graph name what is defined there?"""
    known = module == "llmos.codes" or module.startswith(("llmos.microkernel.", "llmos.protocol."))
    return known and module != "llmos.microkernel.main"


def layout_of(cls: type) -> Layout | None:
    """None if instances of this class are not plain bundles of attributes, all of whose classes are ours."""
    if any(base not in _BASES and not is_ours(base.__module__) for base in cls.__mro__):
        return None
    slots = {
        name: member
        for base in reversed(cls.__mro__)
        for name, member in vars(base).items()
        if isinstance(member, MemberDescriptorType)
    }
    return Layout(slots, any("__dict__" in vars(base) for base in cls.__mro__))


def function_of(cls: type, name: str) -> FunctionType | None:
    """The plain function of ours that instances of `cls` have as a method; nothing is called to find it."""
    found = next(((base, vars(base)[name]) for base in cls.__mro__ if name in vars(base)), None)
    if found is None or not is_ours(found[0].__module__):
        return None
    return found[1] if isinstance(found[1], FunctionType) else None


def is_key(value: object, *, in_frozenset: bool = False) -> bool:
    """May `value` be a key or set element: can its hash be computed, in bounded time, while a graph is being rebuilt?"""
    todo, weight = [value], 0
    while todo:
        item = todo.pop()
        weight += 1
        if weight > _MAX_KEY_WEIGHT:
            return False
        cls: Any = type(item)
        if cls in PLAIN or cls.__hash__ is object.__hash__ or isinstance(item, (Enum, msgspec.Struct, type)):
            continue
        if cls in (tuple, frozenset):
            todo += item  # type: ignore[arg-type]
        elif (
            in_frozenset
            or not (params := getattr(cls, "__dataclass_params__", None))
            or not params.frozen
            or not all(type(getattr(item, name)) in PLAIN for name in cls.__dataclass_fields__)
        ):
            return False
    return True
