"""Which function handles which message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from llmos.microkernel.sender import Sender
from llmos.microkernel.state import State
from llmos.protocol.messages import Message

_M = TypeVar("_M", bound=Message)
Handler = Callable[[State, Sender, _M, float], None]


class VerbTable:
    """`@table.handles(Kind)` enters a function; a message type has one handler."""

    def __init__(self) -> None:
        self.handlers: dict[type[Message], Handler[Any]] = {}

    def handles(self, kind: type[_M]) -> Callable[[Handler[_M]], Handler[_M]]:
        def enter(handler: Handler[_M]) -> Handler[_M]:
            assert kind not in self.handlers
            self.handlers[kind] = handler
            return handler

        return enter
