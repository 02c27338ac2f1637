"""One TOML table = one frozen dataclass: read with every problem found at once, and written back as a commented file.

Knows nothing about llmos' own keys. A key is declared with `key(default, doc, ...)`; its metadata is what is checked
and printed. Invariant: `read_table` never raises for what a person wrote; it appends to `Problems`,
which the caller raises once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
_HEADER = re.compile(r"\s*\[\[?\s*([^\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"""\s*([A-Za-z0-9_."' -]+?)\s*=""")
_SHORT_DOC = 100


def key(
    default: T,
    doc: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> T:
    """Declare one key of a table: its default, what it means, and what values it takes."""
    declared: Any = field(
        default=default, metadata={"doc": doc, "unit": unit, "low": low, "high": high, "choices": choices}
    )
    return declared  # type: ignore[no-any-return]


def required(doc: str) -> Any:
    """Declare a key that must be given."""
    return field(metadata={"doc": doc})


def nearest(word: str, valid: list[str]) -> str:
    """A hint for a mistyped word: the nearest valid one, else the list."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid: {', '.join(valid)}" if valid else "this table has no keys"


@dataclass
class Problems:
    """What is wrong with one file. `first_key` is the key of the first problem."""

    source: str
    lines: dict[tuple[str, int, str], int]
    found: list[tuple[int, str]] = field(default_factory=list)
    first_key: str | None = None

    def add(self, table: str, index: int, name: str, message: str) -> None:
        """Note a problem of key `name` ("" = the table itself) in the `index`-th table of that name."""
        line = self.lines.get((table, index, name)) or self.lines.get((table, index, "")) or 1
        self.found.append((line, message))
        self.first_key = self.first_key or (f"{table}.{name}" if name else table)

    def text(self) -> str:
        """All problems, one per line, in file order."""
        return "\n".join(f"{self.source}:{line}: {message}" for line, message in sorted(self.found))


def locate(text: str) -> dict[tuple[str, int, str], int]:
    """Line numbers, which tomllib does not tell: (table, index, key) -> line; key "" is the table's header."""
    lines: dict[tuple[str, int, str], int] = {}
    seen: dict[str, int] = {}
    table, index, in_string = "", 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if in_string:
            in_string = "" if in_string in line else in_string
            continue
        if header := _HEADER.match(line):
            table = _unquote(header[1])
            index = seen[table] = seen.get(table, -1) + 1
            lines[(table, index, "")] = number
        elif found := _KEY.match(line):
            first, _, rest = _unquote(found[1]).partition(".")
            place = (table, index, first) if table else (first, 0, rest)
            lines.setdefault(place, number)
        for quote in ('"""', "'''"):
            if line.count(quote) == 1 and not line.lstrip().startswith("#"):
                in_string = quote
    return lines


def _unquote(word: str) -> str:
    return re.sub(r"""["'\s]""", "", word)


def read_table(cls: type[T], raw: Any, problems: Problems, table: str, index: int = 0) -> T:
    """Build `cls` from a parsed table; keys with problems keep their default."""
    if not isinstance(raw, dict):
        problems.add("", 0, table, f"[{table}] must be a table")
        problems.first_key = problems.first_key or table
        raw = {}
    hints = typing.get_type_hints(cls)
    declared = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in declared:
            problems.add(table, index, name, f"unknown key {name!r} in [{table}]; {nearest(name, list(declared))}")
        elif wrong := _mistake(value, hints[name], declared[name].metadata):
            problems.add(table, index, name, f"{table}.{name}: {wrong}")
        else:
            values[name] = float(value) if hints[name] is float else value
    missing = [f.name for f in declared.values() if f.default is dataclasses.MISSING and f.name not in raw]
    for name in missing:
        problems.add(table, index, "", f"[{table}] needs the key {name!r}")
    blank = {f.name: hints[f.name]() for f in declared.values() if f.default is dataclasses.MISSING}
    return cls(**(blank | values))


def _mistake(value: Any, kind: type, rules: typing.Mapping[str, Any]) -> str | None:
    """What is wrong with a value, or None."""
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        return f"needs {_WORDS[kind]}, not {value!r}"
    if choices := rules.get("choices"):
        return (
            None
            if value in choices
            else f"{value!r} is not one of {', '.join(choices)}; {nearest(str(value), list(choices))}"
        )
    low, high = rules.get("low"), rules.get("high")
    if kind in (int, float):
        assert isinstance(value, int | float)
        too_low, too_high = low is not None and value < low, high is not None and value > high
        if too_low or too_high or not math.isfinite(value):
            return f"{value} is outside {_number(low)} to {_number(high)}"
    return None


def render_table(cls: type, table: str, *, array: bool = False, values: dict[str, Any] | None = None) -> list[str]:
    """A table as commented TOML lines: what each key means, its unit, range and default."""
    doc = (cls.__doc__ or "").strip().splitlines()[0]
    lines = [f"# {doc}", f"[[{table}]]" if array else f"[{table}]"]
    for declared in dataclasses.fields(cls):
        rules = declared.metadata
        default = declared.default if declared.default is not dataclasses.MISSING else None
        facts = [f"unit: {rules['unit']}"] if rules.get("unit") else []
        if rules.get("choices"):
            facts.append(f"one of: {', '.join(rules['choices'])}")
        elif rules.get("low") is not None or rules.get("high") is not None:
            facts.append(f"range: {_number(rules.get('low'))} to {_number(rules.get('high'))}")
        facts.append(f"default: {_toml(default)}" if default is not None else "required")
        doc, note = rules.get("doc", ""), f"({'; '.join(facts)})"
        lines += [f"# {doc} {note}"] if len(doc) + len(note) <= _SHORT_DOC else [f"# {doc}", f"# {note}"]
        lines.append(f"{declared.name} = {_toml((values or {}).get(declared.name, default))}")
    return [*lines, ""]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else _number(value)


def _number(value: float | None) -> str:
    if value is None:
        return "any"
    return f"{value:_}" if isinstance(value, int) and value >= 10_000 else f"{value}"
