"""Calls of tools, read out of an output's text as it comes. Pure.

States of a `CallParser`: text -> block (the mark of a call was seen, or the answer began with `{` where that is a call) -> call (inside
one call's object) -> block ... -> text. Held back is only what may still become a mark, and a call until its name is known.

Invariants: for any cut of the text into pieces the joined events are the same; every character of the output outside of marks and calls,
but for space around them, comes out as text, in order; each `CallBegin` has exactly one `CallEnd`. What does not become a call after all
comes out as text, marks included; a call whose name was told already ends with `is_complete` False.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from llmos.tools.formats import FAMILIES, Family
from llmos.tools.jsonscan import ValueScanner

_SPACE = " \t\r\n"
_ARGUMENTS = frozenset({"arguments", "parameters"})  # models mix the two words up


@dataclass(frozen=True, slots=True)
class TextPiece:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    index: int
    is_complete: bool


Event = TextPiece | CallBegin | CallArguments | CallEnd


class _State(Enum):
    START = 1  # nothing but space has come
    TEXT = 2
    BLOCK = 3
    CALL = 4
    AFTER = 5  # a call has ended
    GAP = 6  # its block too


class CallParser:
    """`family` None: the text is text. `names`: of the tools, None = any; an answer that is an object without a mark is a call only
    of one of these."""

    def __init__(self, family: str | None, names: Collection[str] | None = None) -> None:
        self._family: Family | None = None if family is None else FAMILIES[family]
        self._names = names
        self._state = _State.START
        self._buffer = ""  # not understood yet
        self._raw = ""  # what comes out as text if this block is none
        self._call: _Call | None = None
        self._count = 0

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._count

    def push(self, text: str) -> list[Event]:
        if self._family is None:
            return [TextPiece(text)] if text else []
        self._buffer += text
        events: list[Event] = []
        while self._step(self._family, events):
            pass
        return _joined(events)

    def finish(self) -> list[Event]:
        """The output has ended."""
        events: list[Event] = []
        if self._call is not None:
            self._broken(self._call, events)
        elif self._state is _State.BLOCK:
            events.append(TextPiece(self._raw + self._buffer))
        elif self._state not in (_State.AFTER, _State.GAP):
            events.append(TextPiece(self._buffer))
        elif rest := self._buffer.lstrip(self._between()):
            events.append(TextPiece(rest))
        self._buffer = self._raw = ""
        return _joined(events)

    def _step(self, family: Family, events: list[Event]) -> bool:
        """Understand a little more of the buffer; False if more text is needed for that."""
        if not self._buffer:
            return False
        if self._state is _State.CALL:
            return self._in_call(events)
        if self._state is _State.BLOCK:
            return self._in_block(family, events)
        if self._state is _State.AFTER:
            return self._after(family)
        if self._state is _State.GAP:
            self._buffer = self._buffer.lstrip(_SPACE)
            self._state = _State.TEXT if self._buffer else _State.GAP
            return bool(self._buffer)
        return self._in_text(family, events)

    def _in_text(self, family: Family, events: list[Event]) -> bool:
        if self._state is _State.START:
            stripped = self._buffer.lstrip(_SPACE)
            if not stripped or (len(stripped) < len(family.begin) and family.begin.startswith(stripped)):
                return False
            if family.is_bare and stripped[0] == "{":
                return self._open("", self._buffer)
        at = self._buffer.find(family.begin)
        if at >= 0:
            if self._state is _State.TEXT or self._buffer[:at].strip(_SPACE):
                self._say(self._buffer[:at], events)
            return self._open(family.begin, self._buffer[at + len(family.begin) :])
        keep = _beginning(self._buffer, family.begin)
        said, self._buffer = self._buffer[: len(self._buffer) - keep], self._buffer[len(self._buffer) - keep :]
        if said:
            self._state = _State.TEXT
        self._say(said, events)
        return False

    def _open(self, mark: str, rest: str) -> bool:
        self._state, self._raw, self._buffer = _State.BLOCK, mark, rest
        return True

    def _in_block(self, family: Family, events: list[Event]) -> bool:
        """Between the mark and the object of a call."""
        skipped = len(self._buffer) - len(self._buffer.lstrip(_SPACE + ("[" if family.is_list else "")))
        self._raw += self._buffer[:skipped]
        self._buffer = self._buffer[skipped:]
        if not self._buffer:
            return False
        if self._buffer[0] == "{":
            is_certain = bool(self._raw.strip(_SPACE)) or self._names is None or self._count > 0
            self._call = _Call(self._count, None if is_certain else self._names)
            self._state = _State.CALL
            return True
        self._say(self._raw, events)
        self._state, self._raw = _State.TEXT, ""
        return True

    def _in_call(self, events: list[Event]) -> bool:
        assert self._call is not None
        call, text = self._call, self._buffer
        self._buffer = text[call.push(text, events) :]
        self._count = call.index + call.has_begun
        if call.is_broken:
            self._broken(call, events)
        elif call.is_done:
            events.append(CallEnd(call.index, True))
            self._call, self._state, self._raw = None, _State.AFTER, ""
        return bool(self._buffer)

    def _after(self, family: Family) -> bool:
        """Behind a call: the end mark, another call, or text."""
        rest = self._buffer.lstrip(self._between())
        if not rest:
            return False
        between = family.end or family.separator
        if between and len(rest) < len(between) and between.startswith(rest):
            return False
        if between and rest.startswith(between):
            rest = rest[len(between) :]
            if family.end:
                self._state, self._buffer = _State.GAP, rest
                return bool(rest)
            return self._open("", rest)
        if family.is_list and rest[0] == "{":
            return self._open("", rest)
        self._state, self._buffer = _State.TEXT, rest
        return True

    def _between(self) -> str:
        """What may stand between calls and means nothing."""
        return _SPACE + ("]," if self._family is not None and self._family.is_list else "")

    def _broken(self, call: _Call, events: list[Event]) -> None:
        """This is no call, or none any more."""
        if call.has_begun:
            events.append(CallEnd(call.index, False))
        else:
            self._say(self._raw + call.untold, events)
        self._call, self._state, self._raw = None, _State.TEXT, ""

    def _say(self, text: str, events: list[Event]) -> None:
        if text:
            events.append(TextPiece(text))


class _Call:
    """The object of one call: {"name": ..., "arguments": {...}}, keys in any order, other keys ignored. `names`: it has to be one of
    these."""

    def __init__(self, index: int, names: Collection[str] | None) -> None:
        self.index = index
        self._names = names
        self.has_begun = self.is_done = self.is_broken = False
        self.untold = ""  # read, but not told to anybody
        self._name = ""
        self._early = ""  # arguments that came before the name
        self._has_arguments = False
        self._where = "open"  # -> key -> colon -> value -> comma -> key ...
        self._key = ""
        self._value = ValueScanner()
        self._text = ""  # of the key or value so far

    def push(self, text: str, events: list[Event]) -> int:
        """Returns how much of `text` belongs to the call."""
        at = 0
        while at < len(text) and not self.is_done and not self.is_broken:
            at += self._take(text[at:], events)
        return at

    def _take(self, text: str, events: list[Event]) -> int:
        if self._where in ("key", "value") and (self._text or text[0] not in _SPACE):
            return self._scan(text, events)
        char = text[0]
        self.untold += char
        if char in _SPACE:
            return 1
        if self._where == "open" and char == "{":
            self._where = "key"
        elif self._where == "colon" and char == ":":
            self._where = "value"
        elif self._where == "comma" and char == ",":
            self._where = "key"
        elif self._where == "comma" and char == "}":
            self._end(events)
        else:
            self.is_broken = True
        return 1

    def _scan(self, text: str, events: list[Event]) -> int:
        """A key or a value."""
        if self._where == "key" and not self._text and text[0] != '"':
            self.is_broken = True
            return 0
        used = self._value.push(text)
        piece, done = text[:used], self._value.is_done
        self._text += piece
        if self._where == "value" and self._key in _ARGUMENTS and not self._has_arguments:
            self._arguments(piece, events)
        else:
            self.untold += piece
        if done:
            self._value = ValueScanner()
            self._take_value(events)
            self._text = ""
        return used

    def _arguments(self, piece: str, events: list[Event]) -> None:
        if self._text[0] != "{":
            self.is_broken = True
            self.untold += piece
        elif self.has_begun:
            events.append(CallArguments(self.index, piece))
        else:
            self._early += piece
            self.untold += piece

    def _take_value(self, events: list[Event]) -> None:
        if self._where == "key":
            self._key, self._where = _string(self._text) or "", "colon"
            return
        self._where = "comma"
        if self._key == "name" and not self.has_begun:
            name = _string(self._text)
            if not name or (self._names is not None and name not in self._names):
                self.is_broken = True
                return
            self.has_begun, self.untold = True, ""
            events.append(CallBegin(self.index, name))
            if self._early:
                events.append(CallArguments(self.index, self._early))
        elif self._key in _ARGUMENTS:
            self._has_arguments = True

    def _end(self, events: list[Event]) -> None:
        self.is_done = self.has_begun
        self.is_broken = not self.has_begun
        if self.is_done:
            self.untold = ""
            if not self._has_arguments:
                events.append(CallArguments(self.index, "{}"))


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _beginning(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)


def _joined(events: list[Event]) -> list[Event]:
    """Neighbouring pieces as one."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, TextPiece) and isinstance(last, TextPiece):
            joined[-1] = TextPiece(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and last.index == event.index:
            joined[-1] = CallArguments(event.index, last.text + event.text)
        elif not isinstance(event, TextPiece) or event.text:
            joined.append(event)
    return joined
