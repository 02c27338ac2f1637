"""Stop strings in a stream of text: find them wherever the pieces are cut, hold back as little as possible.

The match that is complete first wins; of those that end at the same character, the longest. So what is found does not
depend on how the text was cut, and a complete stop string never waits for a longer one.
States: searching (`found` is None) -> found; after that no text comes out. Held back is the longest end of the text
that could still begin a stop string, nothing more.
"""

from __future__ import annotations


class StopFinder:
    """`push` text, get text that is safe to show."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self.found: str | None = None
        self._stops = stops
        self._prefixes = frozenset(stop[:length] for stop in stops for length in range(1, len(stop)))
        self._longest = max(map(len, self._prefixes), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        assert self.found is None, "the stream has ended"
        text = self._held + text
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            _, at, self.found = min(matches)
            self._held = ""
            return text[:at]
        cut = len(text) - self._held_length(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text ends here: what was held back is not the beginning of a stop string."""
        held, self._held = self._held, ""
        return held

    def _held_length(self, text: str) -> int:
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._prefixes:
                return length
        return 0
