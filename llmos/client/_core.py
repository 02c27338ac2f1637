"""The SDK without I/O: the request table of one connection. `connection.py` moves the bytes.

A request is a waiter under a number that is never reused. A `Reply` waits for one message, a `Generation` (generation.py) for a
whole stream; each hands what arrives to its sink, a callable that must not block. A reader that leaves a sequence which is to go on
puts a `Drain` in its place: what still comes is acknowledged unread, because a sequence whose reader does not read is held back.

Invariants: every waiter of a dead connection is told, either that it failed or that the connection was lost under it; messages for
unknown numbers are dropped and counted in `stray`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from llmos.errors import LlmosError, ProtocolError, Unavailable
from llmos.protocol.failures import typed
from llmos.protocol.messages import Ack, Error, Finished, Message, Tokens, Welcome

if TYPE_CHECKING:
    from llmos.client.generation import Generation

ACK_EVERY_TOKENS = 256
Sink = Callable[[Any], None]


class ConnectionLost(Unavailable):
    """The connection broke while something was asked over it: it may have been done."""


class Waiter(Protocol):
    """What the table needs of a request."""

    ended: bool
    owned: bool  # its sequence ends with its client

    def deliver(self, message: Message) -> Message | None:
        """Take one message of this request; returns what to send back."""
        ...

    def fail(self, error: LlmosError) -> None: ...

    def lose(self) -> None:
        """The connection is gone; what was asked may have been done."""
        ...


W = TypeVar("W", bound=Waiter)


class ClientCore:
    """Requests of one connection."""

    def __init__(self) -> None:
        self.stray = 0
        self._waiters: dict[int, Waiter] = {}
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, make: Callable[[int], W]) -> tuple[int, W]:
        """Give a waiter the next number."""
        req = next(self._numbers)
        waiter = make(req)
        self._waiters[req] = waiter
        return req, waiter

    def replace(self, req: int, old: Waiter, new: Waiter) -> bool:
        """`new` waits for `req` instead of `old`; False if `old` does not any more."""
        if self._waiters.get(req) is not old:
            return False
        self._waiters[req] = new
        return True

    def forget(self, req: int) -> bool:
        """Nobody waits for `req` any more; True if somebody did."""
        return self._waiters.pop(req, None) is not None

    def owned(self) -> list[int]:
        """Requests whose sequences end with this client."""
        return [req for req, waiter in self._waiters.items() if waiter.owned]

    def receive(self, message: Any) -> Message | None:
        """Route one message to its waiter; returns what to send back."""
        if isinstance(message, Welcome):
            return None  # a gateway probes idle connections with it
        if isinstance(message, Error) and message.req == 0:
            self.fail_all(typed(message))
            return None
        waiter = self._waiters.get(message.req)
        if waiter is None:
            self.stray += 1
            return None
        answer = waiter.deliver(message)
        if waiter.ended:
            self._waiters.pop(message.req, None)
        return answer

    def fail_all(self, error: LlmosError) -> None:
        """Nobody may wait for this connection any longer."""
        for waiter in self._take_all():
            waiter.fail(error)

    def lose_all(self) -> None:
        """The connection broke."""
        for waiter in self._take_all():
            waiter.lose()

    def _take_all(self) -> list[Waiter]:
        waiters, self._waiters = self._waiters, {}
        return list(waiters.values())


class Reply:
    """Waits for one message of type `expected`; the sink gets it, or the error."""

    owned = False

    def __init__(self, expected: type[Message], sink: Sink) -> None:
        self.ended = False
        self._expected = expected
        self._sink = sink

    def deliver(self, message: Message) -> Message | None:
        self.ended = True
        if isinstance(message, self._expected):
            self._sink(message)
        elif isinstance(message, Error):
            self._sink(typed(message))
        else:
            self._sink(ProtocolError(f"expected {self._expected.__name__}, got {type(message).__name__}"))
        return None

    def fail(self, error: LlmosError) -> None:
        self.ended = True
        self._sink(error)

    def lose(self) -> None:
        self.fail(ConnectionLost("the connection to the gateway was lost"))


class Drain:
    """Takes the place of a Generation whose reader left: acknowledges and drops what comes."""

    owned = False

    def __init__(self, left: Generation) -> None:
        self.ended = False
        self._req = left.req
        self._acks = AckCounter(left.upto)

    def deliver(self, message: Message) -> Message | None:
        self.ended = isinstance(message, (Finished, Error))
        upto = self._acks.read(len(message.ids)) if isinstance(message, Tokens) else None
        return None if upto is None else Ack(self._req, upto)

    def fail(self, error: LlmosError) -> None:
        self.ended = True

    def lose(self) -> None:
        self.ended = True  # without a reader the sequence is held back by nobody


class AckCounter:
    """Decides when to tell the gateway how far the consumer has read: every `ACK_EVERY_TOKENS`."""

    def __init__(self, start: int = 0) -> None:
        self._read = start
        self._told = start

    def read(self, num_tokens: int) -> int | None:
        """The consumer took `num_tokens` more; returns the offset to acknowledge, if it is time."""
        self._read += num_tokens
        if self._read - self._told < ACK_EVERY_TOKENS:
            return None
        self._told = self._read
        return self._told
