"""Calls of tools in an output's text, as OpenAI's deltas say them.

What a reader says is a function of the characters it was given, however they were cut. So a client that comes again with a count of
characters gets what comes after them: the reader is given all text again, and what the first `skip` characters say is not said again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from llmos.tools import CallArguments, CallBegin, CallParser, Event, TextPiece, call_id

Delta = dict[str, Any]


class CallReader:
    """`chars`: how much text it was given. `skip`: so much of it the client knows."""

    def __init__(self, rid: int, family: str | None, names: Collection[str], skip: int = 0) -> None:
        self.chars = 0
        self.skip = skip
        self._rid = rid
        self._parser = CallParser(family, names)

    @property
    def has_calls(self) -> bool:
        return self._parser.num_calls > 0

    def push(self, text: str) -> list[Delta]:
        """What more text says, beyond what is known."""
        known = max(0, min(len(text), self.skip - self.chars))
        self.chars += len(text)
        self._parser.push(text[:known])
        return self._deltas(self._parser.push(text[known:]))

    def finish(self) -> list[Delta]:
        """There is no more."""
        return self._deltas(self._parser.finish())

    def _deltas(self, events: Sequence[Event]) -> list[Delta]:
        return [delta for event in events if (delta := self._delta(event))]

    def _delta(self, event: Event) -> Delta:
        if isinstance(event, TextPiece):
            return {"content": event.text}
        if isinstance(event, CallBegin):
            function = {"name": event.name, "arguments": ""}
            call = {
                "index": event.index,
                "id": call_id(self._rid, event.index),
                "type": "function",
                "function": function,
            }
            return {"tool_calls": [call]}
        if isinstance(event, CallArguments):
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        return {}


def merged(deltas: Sequence[Delta]) -> Delta:
    """One delta for several, so that one event has one id."""
    text = "".join(delta["content"] for delta in deltas if "content" in delta)
    calls: dict[int, dict[str, Any]] = {}
    for call in (call for delta in deltas for call in delta.get("tool_calls", ())):
        known = calls.setdefault(call["index"], call)
        if known is not call:
            known["function"]["arguments"] += call["function"]["arguments"]
    return ({"content": text} if text else {}) | ({"tool_calls": list(calls.values())} if calls else {})
