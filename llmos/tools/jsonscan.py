"""Find where a JSON value ends in text that comes in pieces. Pure; each character is looked at once.

It follows strings and brackets only: what it finds the end of need not be valid JSON.
"""

from __future__ import annotations

_OPEN, _CLOSE = frozenset("{["), frozenset("}]")
_AFTER_SCALAR = frozenset(",}] \t\r\n")


class ValueScanner:
    """One value. `push` says how many characters of a piece belong to it; when it has ended, `is_done`."""

    def __init__(self) -> None:
        self.is_done = False
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._kind = ""  # "", "s" string, "c" container, "n" number or word

    def push(self, text: str) -> int:
        assert not self.is_done
        for at, char in enumerate(text):
            if self._in_string:
                self._string(char)
            elif self._kind == "n" and char in _AFTER_SCALAR:
                self.is_done = True
                return at
            else:
                self._plain(char)
            if self.is_done:
                return at + 1
        return len(text)

    def _string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False
            self.is_done = self._kind == "s"

    def _plain(self, char: str) -> None:
        if char == '"':
            self._in_string = True
            self._kind = self._kind or "s"
        elif char in _OPEN:
            self._depth += 1
            self._kind = self._kind or "c"
        elif char in _CLOSE:
            self._depth -= 1
            self.is_done = self._depth <= 0
        else:
            self._kind = self._kind or "n"
