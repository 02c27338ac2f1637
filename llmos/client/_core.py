"""The SDK without I/O: the request table of one connection. `aio.py` moves the bytes, `sync.py` only wraps `aio.py`.

A request is a waiter under a number that is never reused. A `Reply` waits for one message, a `Generation` for a whole
stream; each hands what arrives to its sink, a callable that must not block. States of a generation:

    sent -> accepted (Accepted) -> ended (Finished, Error, a gap in the offsets, or the connection's death)

Invariants: after the terminal item (Completion or LlmosError) the sink gets nothing more; every waiter of a dead
connection is failed; messages for unknown numbers are dropped and counted in `stray` (the tail of a cancelled request
is one).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol

from llmos.client.types import Chunk, Completion
from llmos.codes import FinishReason
from llmos.errors import LlmosError, ProtocolError, SequenceFailed, from_code
from llmos.protocol.messages import Accepted, Cancel, Error, Finished, Message, TokenLogprobs, Tokens, Welcome

ACK_EVERY_TOKENS = 256
_WHY = {FinishReason.DEADLINE: "its deadline passed while it waited,"}  # the other names speak for themselves
Sink = Callable[[Any], None]


class Waiter(Protocol):
    """What the table needs of a request."""

    ended: bool

    def deliver(self, message: Message) -> Message | None:
        """Take one message of this request; returns what to send back."""
        ...

    def fail(self, error: LlmosError) -> None: ...


class ClientCore:
    """Requests of one connection."""

    def __init__(self) -> None:
        self.stray = 0
        self._waiters: dict[int, Waiter] = {}
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._waiters)

    def add(self, make: Callable[[int], Waiter]) -> tuple[int, Waiter]:
        """Give a waiter the next number."""
        req = next(self._numbers)
        waiter = make(req)
        self._waiters[req] = waiter
        return req, waiter

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
    """Waits for a stream; the sink gets Chunks, then one Completion or LlmosError."""

    def __init__(self, req: int, sink: Sink) -> None:
        self.req = req
        self.ended = False
        self.rid = 0
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
            self.fail(ProtocolError(f"a {type(message).__name__} does not belong to a stream"))
            return Cancel(self.req)
        return None

    def fail(self, error: LlmosError) -> None:
        self.ended = True
        self._sink(error)

    def _tokens(self, message: Tokens) -> Message | None:
        if message.offset != len(self._ids):
            self.fail(
                ProtocolError(
                    f"gap in the stream: got offset {message.offset}, expected {len(self._ids)}", rid=self.rid
                )
            )
            return Cancel(self.req)
        self._ids.extend(message.ids)
        self._text.append(message.text)
        if message.logprobs is not None:
            self._logprobs = [*(self._logprobs or ()), *message.logprobs]
        self._sink(Chunk(message.text, message.ids, message.offset, message.logprobs, self.rid))
        return None

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
            self._sink(Chunk(message.text, (), len(self._ids), None, self.rid))
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


class AckCounter:
    """Decides when to tell the gateway how far the consumer has read: every `ACK_EVERY_TOKENS`."""

    def __init__(self) -> None:
        self._read = 0
        self._told = 0

    def read(self, num_tokens: int) -> int | None:
        """The consumer took `num_tokens` more; returns the offset to acknowledge, if it is time."""
        self._read += num_tokens
        if self._read - self._told < ACK_EVERY_TOKENS:
            return None
        self._told = self._read
        return self._told


def _typed(message: Error) -> LlmosError:
    return from_code(message.code, message.message, field=message.field, rid=message.rid)
