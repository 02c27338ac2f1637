"""Messages and their differences in words, for people who look at a replay."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np

from llmos.protocol.messages import Message

_MOST_CHARS = 200
_MOST_ROWS = 4
_BLOBS: dict[str, tuple[str, tuple[str, ...]]] = {  # field -> number format, columns
    "row_frees": ("<i4", ("row",)),
    "page_appends": ("<i4", ("row", "index", "page")),
    "prefill": ("<i4", ("row", "start", "length", "sample")),
    "decode": ("<i4", ("row",)),
    "swap_out": ("<i4", ("page", "host page")),
    "swap_in": ("<i4", ("host page", "page")),
    "copies": ("<i4", ("from", "to")),
    "pages": ("<i4", ("page",)),
    "tokens": ("<i4", ("token",)),
    "prompt": ("<i4", ("token",)),
    "output": ("<i4", ("token",)),
    "samples": ("<i4", ("row", "position", "token")),
    "failed": ("<i4", ("row", "reason")),
    "columns": ("<i8", ("rid", "offset", "token")),
}


class FieldDifference(NamedTuple):
    """Where two messages differ first, and what is there in words."""

    field: str
    left: str
    right: str


def brief(message: Message) -> str:
    """One line: the type and its fields, shortened."""
    fields = (f"{name}={_value(name, getattr(message, name))}" for name in message.__struct_fields__)
    return _shortened(f"{type(message).__name__}({', '.join(fields)})")


def first_difference(left: Any, right: Any, path: str = "") -> FieldDifference | None:
    """The first field in which two messages of one type differ; None if they are equal."""
    for name in left.__struct_fields__:
        mine, theirs = getattr(left, name), getattr(right, name)
        if mine == theirs:
            continue
        where = f"{path}{name}"
        if isinstance(mine, bytes) and isinstance(theirs, bytes) and name in _BLOBS:
            return _first_row(where, name, mine, theirs)
        if isinstance(mine, msgspec.Struct) and type(mine) is type(theirs):
            return first_difference(mine, theirs, f"{where}.")
        if isinstance(mine, tuple) and isinstance(theirs, tuple):
            return _first_item(where, mine, theirs)
        return FieldDifference(where, _value(name, mine), _value(name, theirs))
    return None


def _first_row(where: str, name: str, left: bytes, right: bytes) -> FieldDifference:
    mine, theirs = _rows(name, left), _rows(name, right)
    index = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
    return FieldDifference(f"{where}[{index}]", _row_at(name, mine, index), _row_at(name, theirs, index))


def _row_at(name: str, rows: list[tuple[int, ...]], index: int) -> str:
    if index >= len(rows):
        return f"nothing, only {len(rows)}"
    return ", ".join(f"{column} {value}" for column, value in zip(_BLOBS[name][1], rows[index]))


def _first_item(where: str, left: tuple[Any, ...], right: tuple[Any, ...]) -> FieldDifference | None:
    index = next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))
    if index < min(len(left), len(right)) and isinstance(left[index], msgspec.Struct):
        return first_difference(left[index], right[index], f"{where}[{index}].")
    mine, theirs = (
        _value("", items[index]) if index < len(items) else f"nothing, only {len(items)}" for items in (left, right)
    )
    return FieldDifference(f"{where}[{index}]", mine, theirs)


def _rows(name: str, blob: bytes) -> list[tuple[int, ...]]:
    kind, columns = _BLOBS[name]
    width = len(columns) * np.dtype(kind).itemsize
    numbers = np.frombuffer(blob[: len(blob) // width * width], kind).reshape(-1, len(columns))
    return [tuple(row) for row in numbers.tolist()]


def _value(name: str, value: Any) -> str:
    if name == "decode" and value is None:
        return "the same rows as before"
    if isinstance(value, bytes):
        if name not in _BLOBS:
            return f"{len(value)} bytes"
        rows = _rows(name, value)
        shown = [str(row[0]) if len(row) == 1 else str(row) for row in rows[:_MOST_ROWS]]
        more = f", ... {len(rows)} in all" if len(rows) > _MOST_ROWS else ""
        return f"[{', '.join(shown)}{more}]"
    if isinstance(value, msgspec.Struct):
        fields = (f"{each}={_value(each, getattr(value, each))}" for each in value.__struct_fields__)
        return _shortened(f"{type(value).__name__}({', '.join(fields)})")
    if isinstance(value, tuple) and value and isinstance(value[0], msgspec.Struct):
        return _shortened(f"[{', '.join(_value('', item) for item in value[:_MOST_ROWS])}]")
    return _shortened(repr(value))


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_CHARS else f"{text[: _MOST_CHARS - 3]}..."
