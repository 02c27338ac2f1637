"""Hostile frames for one port, from a seed: what a broken or malicious peer could send.

Kinds: random bytes; messages of every type with extreme values in every field; these with bits flipped, cut, spliced; with fields swapped
or of other types; headers that promise what does not come; deep nesting. A share is well formed and means something (`Hints`), so that
what lies behind the checks is reached too.
"""

from __future__ import annotations

import random
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgspec

from llmos.protocol import messages as m
from llmos.protocol.codec import encode, pack_i32

INTS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    16,
    255,
    4096,
    2**31 - 1,
    2**31,
    -(2**31),
    2**32,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**63),
)
FLOATS = (0.0, -0.0, 1.0, 0.5, -1.0, 1e-300, 5e-324, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 2.0**63)
HEADERS = (
    b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01", b"\xdd\x00\x10\x00\x00", b"\xc1", b"\xd4\x01\x00",
)  # fmt: skip
LARGE = 20_000  # entries, characters: now and then
RARE = 0.002
_SIMPLE = frozenset({int, float, bool, str, bytes})


@cache
def _fields(kind: Any) -> tuple[tuple[str, Any, bool], ...]:
    """Name, type, and whether it may be left out."""
    return tuple((each.name, each.type, not each.required) for each in msgspec.structs.fields(kind))


_choices = cache(typing.get_args)


@dataclass
class Hints:
    """What is meaningful right now. `values`: by field name; `blobs`: makes the bytes of a field."""

    values: dict[str, Callable[[random.Random], Any]] = field(default_factory=dict)
    share: float = 0.7  # of fields that take a hint where there is one


class FrameMaker:
    """`union`: what the port takes. `weights`: types that come more or less often than 1; 0 = never by intention."""

    def __init__(
        self, seed: int, union: Any, hints: Hints | None = None, weights: dict[type, float] | None = None
    ) -> None:
        self.chance = random.Random(seed)
        self.hints = hints or Hints()
        kinds = [kind for kind in typing.get_args(union) if kind is not m.Hello]
        self._weights = [(weights or {}).get(kind, 1.0) for kind in kinds]
        self._kinds = kinds
        self._recent: list[bytes] = [encode(self.message()) for _ in range(64)]

    def frame(self) -> bytes:
        chance = self.chance
        dice = chance.random()
        if dice < 0.45:
            made = encode(self.message())
            if len(made) < 4096:
                self._recent[chance.randrange(64)] = made
            return made
        if dice < 0.75:
            return self._damage(chance.choice(self._recent))
        if dice < 0.9:
            return self._retype(chance.choice(self._recent))
        if dice < 0.95:
            return chance.randbytes(chance.choice((0, 1, 2, 5, 20, 200)))
        if dice < 0.99:
            return (
                chance.choice(self._recent)[: chance.randrange(4)]
                + chance.choice(HEADERS)
                + chance.randbytes(chance.randrange(9))
            )
        return self._deep()

    def message(self) -> m.Message:
        """One of any type, with whatever its fields can hold."""
        (kind,) = self.chance.choices(self._kinds, self._weights)
        return self.of(kind)

    def of(self, kind: Any) -> Any:
        return kind(*(self._value(name, hint) for name, hint, _ in _fields(kind)))

    # ------------------------------------------------------------ values

    def _value(self, name: str, kind: Any) -> Any:
        chance = self.chance
        hint = self.hints.values.get(name)
        if hint is not None and chance.random() < self.hints.share:
            return hint(chance)
        if kind in _SIMPLE:
            return self._plain(kind)
        choices = _choices(kind)
        if type(None) in choices:
            return None if chance.random() < 0.5 else self._value("", choices[choices[0] is type(None)])
        if Ellipsis in choices:
            count = LARGE // 10 if chance.random() < RARE else chance.choice((0, 0, 1, 2, 3))
            return tuple(self._value("", choices[0]) for _ in range(count))
        if choices:
            return tuple(self._value("", each) for each in choices)
        return self._part(kind)

    def _part(self, kind: Any) -> Any:
        """Where a field has a default it mostly stays at that, or nothing would ever pass the checks."""
        return kind(
            **{
                name: self._value(name, hint)
                for name, hint, is_optional in _fields(kind)
                if not is_optional or name in self.hints.values or self.chance.random() < 0.1
            }
        )

    def _plain(self, kind: Any) -> Any:
        chance = self.chance
        if kind is int:
            return chance.choice(INTS) if chance.random() < 0.6 else chance.randrange(-5, 70)
        if kind is float:
            return chance.choice(FLOATS) if chance.random() < 0.5 else chance.uniform(-2, 2)
        if kind is bool:
            return chance.random() < 0.5
        size = LARGE if chance.random() < RARE else chance.choice((0, 1, 3, 8, 65, 129))
        if kind is str:
            return chance.choice(("a", "\0", "é", "🙂", "demo", "{{", "\n", "\u202e")) * size
        assert kind is bytes, kind
        if chance.random() < 0.5:
            return pack_i32(chance.randrange(-2, 300) for _ in range(size))
        return chance.randbytes(size)

    # ------------------------------------------------------------ damage

    def _damage(self, frame: bytes) -> bytes:
        chance, damaged = self.chance, bytearray(frame)
        for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
            at = chance.randrange(len(damaged) + 1)
            what = chance.randrange(6)
            if what == 0 and at < len(damaged):
                damaged[at] ^= 1 << chance.randrange(8)
            elif what == 1 and at < len(damaged):
                damaged[at] = chance.randrange(256)
            elif what == 2:
                del damaged[at : at + chance.randrange(1, 9)]
            elif what == 3:
                damaged[at:at] = chance.randbytes(chance.randrange(1, 9))
            elif what == 4:
                damaged[at:at] = chance.choice(self._recent)[: chance.randrange(40)]
            else:
                damaged[at:at] = chance.choice(HEADERS)
        return bytes(damaged)

    def _retype(self, frame: bytes) -> bytes:
        """Fields swapped, dropped, doubled, or of another type."""
        chance = self.chance
        values = msgspec.msgpack.decode(frame)
        for _ in range(chance.choice((1, 1, 2))):
            if len(values) < 2:
                break
            at, other = chance.randrange(1, len(values)), chance.randrange(1, len(values))
            what = chance.randrange(4)
            if what == 0:
                values[at], values[other] = values[other], values[at]
            elif what == 1:
                del values[at]
            elif what == 2:
                values.insert(at, values[other])
            else:
                values[at] = chance.choice(
                    (None, True, -1, 2**64 - 1, 1.5, float("nan"), "x", b"\0\xff", [], [[]], {}, {"a": [1]})
                )
        return msgspec.msgpack.encode(values)

    def _deep(self) -> bytes:
        chance = self.chance
        return chance.choice(self._recent)[:2] + chance.choice((b"\x91", b"\x81", b"\x92\x91")) * chance.choice(
            (10, 600, 5000)
        )
