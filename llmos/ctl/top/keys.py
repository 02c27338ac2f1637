"""The keyboard of a terminal: `Decoder` turns bytes into keys (pure), `Keyboard` switches a terminal to single keys and back.

A key is a str: one character for what was typed, a longer name for the others (`UP`, `ESC`, ...). A lone escape byte may be the Escape
key or the first byte of a sequence whose rest is still on its way: the decoder waits, and `flush` decides when nothing came.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import termios
import tty
from types import TracebackType
from typing import Any

UP, DOWN, LEFT, RIGHT = "up", "down", "left", "right"
PAGE_UP, PAGE_DOWN, HOME, END = "page-up", "page-down", "home", "end"
ENTER, ESC, BACKSPACE, TAB, ERASE, REDRAW, INTERRUPT = (
    "enter", "escape", "backspace", "tab", "erase-line", "redraw", "interrupt",
)  # fmt: skip

_FINALS = {"A": UP, "B": DOWN, "C": RIGHT, "D": LEFT, "H": HOME, "F": END, "M": ENTER}  # after ESC [ or ESC O
_NUMBERED = {"1": HOME, "4": END, "5": PAGE_UP, "6": PAGE_DOWN, "7": HOME, "8": END}  # ESC [ n ~
_CONTROLS = {
    "\r": ENTER, "\n": ENTER, "\t": TAB, "\x7f": BACKSPACE, "\x08": BACKSPACE, "\x15": ERASE, "\x0c": REDRAW, "\x03": INTERRUPT,
}  # fmt: skip
_MAX_SEQUENCE = 32  # longer is no key, and nothing may grow without limit
_READ_BYTES = 4096


class Decoder:
    """Bytes in, keys out. Holds back at most one unfinished escape sequence and one unfinished UTF-8 character."""

    def __init__(self) -> None:
        self._text = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._held = ""

    @property
    def waiting(self) -> bool:
        """Is there an unfinished escape sequence?"""
        return bool(self._held)

    def feed(self, data: bytes) -> list[str]:
        keys: list[str] = []
        for character in self._text.decode(data):
            self._take(character, keys)
        return keys

    def flush(self) -> list[str]:
        """The rest did not come: a lone escape byte was the key, anything longer was broken."""
        held, self._held = self._held, ""
        return [ESC] if held == "\x1b" else []

    def _take(self, character: str, keys: list[str]) -> None:
        held = self._held
        if not held:
            if character == "\x1b":
                self._held = character
            else:
                keys += _plain(character)
        elif character == "\x1b":  # a new sequence begins, this one will not be finished
            if held == "\x1b":
                keys.append(ESC)
            self._held = character
        elif held == "\x1b" and character not in "[O":  # Escape, then a key
            self._held = ""
            keys.append(ESC)
            keys += _plain(character)
        elif held == "\x1b" or not _ends(held, character):
            self._held = held + character if len(held) < _MAX_SEQUENCE else ""
        else:
            self._held = ""
            keys += _sequence(held[1:] + character)


class Keyboard:
    """A terminal that hands over each key as it is pressed, without showing it. Leaving puts back what was there before."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.decoder = Decoder()
        self._saved: list[Any] | None = None

    def __enter__(self) -> Keyboard:
        self._saved = termios.tcgetattr(self.fd)
        tty.setcbreak(self.fd)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._saved is not None
        with contextlib.suppress(termios.error):  # the terminal may be gone
            termios.tcsetattr(self.fd, termios.TCSADRAIN, self._saved)

    def read(self) -> list[str]:
        """Keys that are there; raises EOFError if the terminal is gone. Call it when the descriptor is readable."""
        try:
            data = os.read(self.fd, _READ_BYTES)
        except OSError:
            data = b""
        if not data:
            raise EOFError
        return self.decoder.feed(data)


def _plain(character: str) -> list[str]:
    if character in _CONTROLS:
        return [_CONTROLS[character]]
    return [character] if character.isprintable() else []


def _ends(held: str, character: str) -> bool:
    """Is `character` the last one of the sequence that began with `held`?"""
    if held == "\x1b[" and character == "[":  # the Linux console's function keys: ESC [ [ A
        return False
    return "@" <= character <= "~"


def _sequence(body: str) -> list[str]:
    """The key of a whole sequence without its escape byte; modifiers (`1;5A`) count for nothing."""
    final, numbers = body[-1], body[1:-1]
    if numbers.startswith("["):
        return []
    if final == "~":
        name = _NUMBERED.get(numbers.split(";")[0])
    else:
        name = _FINALS.get(final)
    return [name] if name else []
