"""The SDK without I/O: the request table of one connection. `aio.py` moves the bytes, `sync.py` only wraps `aio.py`.

A request is a waiter under a number that is never reused. A `Reply` waits for one message, a `Generation` for a whole
stream; each hands what arrives to its sink, a callable that must not block. States of a generation:

    sent -> accepted (Accepted) -> ended (Finished, Error, a gap in the offsets, or the connection's death)

A reader that leaves a sequence which is to go on puts a `Drain` in its place: what still comes is acknowledged unread, because a
sequence whose reader does not read is held back.

Invariants: after the terminal item (Completion or LlmosError) the sink gets nothing more; every waiter of a dead
connection is failed; messages for unknown numbers are dropped and counted in `stray` (the tail of a cancelled request
is one).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from llmos.client.types import Chunk, Completion
from llmos.codes import FinishReason
from llmos.errors import LlmosError, ProtocolError, SequenceFailed, from_code
from llmos.protocol.messages import Accepted, Ack, Cancel, Error, Finished, Message, TokenLogprobs, Tokens, Welcome

ACK_EVERY_TOKENS = 256
_WHY = {  # the other names speak for themselves
    FinishReason.DEADLINE: "its deadline passed while it waited,",
    FinishReason.DEPENDENCY: "its dependency (`after`) ended badly,",
}
Sink = Callable[[Any], None]


class Waiter(Protocol):
    """What the table needs of a request."""

    ended: bool

    def deliver(self, message: Message) -> Message | None:
        """Take one message of this request; returns what to send back."""
        ...

    def fail(self, error: LlmosError) -> None: ...


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

    def receive(self, message: Any) -> Message | None:
        """Route one message to its waiter; returns what to send back."""
        if isinstance(message, Welcome):
            return None  # a gateway probes idle connections with it
        if isinstance(message, Error) and message.req == 0:
            self.fail_all(_typed(message))
            return None
        waiter = self._waiters.get(message.req)
        if waiter is None:
            self.stray += 1
            return None
        answer = waiter.deliver(message)
        if waiter.ended:
            del self._waiters[message.req]
        return answer

    def fail_all(self, error: LlmosError) -> None:
        """The connection is dead: nobody may wait for it any longer."""
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters.values():
            waiter.fail(error)


class Reply:
    """Waits for one message of type `expected`; the sink gets it, or the error."""

    def __init__(self, expected: type[Message], sink: Sink) -> None:
        self.ended = False
        self._expected = expected
        self._sink = sink

    def deliver(self, message: Message) -> Message | None:
        self.ended = True
        if isinstance(message, self._expected):
            self._sink(message)
        elif isinstance(message, Error):
            self._sink(_typed(message))
        else:
            self._sink(ProtocolError(f"expected {self._expected.__name__}, got {type(message).__name__}"))
        return None

    def fail(self, error: LlmosError) -> None:
        self.ended = True
        self._sink(error)


class Generation:
    """Waits for a stream from token `start` of an output on; the sink gets Chunks, then one Completion or LlmosError.

    `rid` is None until it is accepted. `upto`: the offset of the token that comes next. `detaches`: whoever leaves it lets the
    sequence go on; else the output ends.
    """

    def __init__(self, req: int, sink: Sink, start: int = 0, *, detaches: bool = False) -> None:
        self.req = req
        self.ended = False
        self.rid: int | None = None
        self.upto = start
        self.detaches = detaches
        self._model = ""
        self._sink = sink
        self._text: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None

    def deliver(self, message: Message) -> Message | None:
        if isinstance(message, Tokens):
            return self._tokens(message)
        if isinstance(message, Accepted):
            self.rid, self._model = message.rid, message.model
        elif isinstance(message, Finished):
            self._finished(message)
        elif isinstance(message, Error):
            self.fail(_typed(message))
        else:
            return self._broken(f"a {type(message).__name__} does not belong to a stream")
        return None

    def fail(self, error: LlmosError) -> None:
        self.ended = True
        self._sink(error)

    def _tokens(self, message: Tokens) -> Message | None:
        if message.offset != self.upto:
            return self._broken(f"gap in the stream: got offset {message.offset}, expected {self.upto}")
        self.upto += len(message.ids)
        self._ids.extend(message.ids)
        self._text.append(message.text)
        if message.logprobs is not None:
            self._logprobs = [*(self._logprobs or ()), *message.logprobs]
        self._sink(Chunk(message.text, message.ids, message.offset, message.logprobs, self.rid or 0))
        return None

    def _broken(self, why: str) -> Message | None:
        self.fail(ProtocolError(why, rid=self.rid))
        return None if self.detaches else Cancel(self.req)

    def _finished(self, message: Finished) -> None:
        try:
            reason = FinishReason(message.reason)
        except ValueError:
            self.fail(ProtocolError(f"unknown finish reason {message.reason}", field="reason", rid=message.rid))
            return
        if reason.is_failure:
            why = _WHY.get(reason, reason.name.lower())
            text = f"sequence {message.rid} ended: {why} after {len(self._ids)} tokens"
            self.fail(SequenceFailed(text, field="reason", rid=message.rid))
            return
        self.ended = True
        if message.text:
            self._text.append(message.text)
            self._sink(Chunk(message.text, (), self.upto, None, message.rid))
        logprobs = None if self._logprobs is None else tuple(self._logprobs)
        self._sink(
            Completion(
                message.rid,
                self._model,
                "".join(self._text),
                tuple(self._ids),
                reason.name.lower(),
                message.stop_string,
                message.usage,
                logprobs,
            )
        )


class Drain:
    """Takes the place of a Generation whose reader left: acknowledges and drops what comes."""

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


def _typed(message: Error) -> LlmosError:
    return from_code(message.code, message.message, field=message.field, rid=message.rid)
