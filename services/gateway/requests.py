"""The life of one generation in the gateway, pure: events in, messages out through an `Outbox`.

    event                  encoding              submitted               streaming
    ---------------------  --------------------  ----------------------  -----------------------------------------------
    encoded (ids)          SeqSubmit: submitted  -                       -
    accepted (rid)         -                     Accepted, DecodeOpen:   -
                                                 streaming
    tokens                 -                     -                       to the tokenizer
    decoded                -                     -                       Tokens; at a stop string also SeqFinish
    end                    -                     -                       flush at the tokenizer, then Finished: ended
    cancel                 Finished: ended       SeqCancel once known    SeqCancel
    text_lost              -                     SeqCancel once known    SeqCancel; its end becomes tokenizer_failed
    fail (error)           Error: ended          Error: ended            Error, SeqCancel: ended
    abandon (client left)  ended                 ended                   SeqCancel: ended

A sequence that is accepted after its request ended is cancelled by the owner of the table, who knows no such request.

Invariants: the client gets exactly one Finished or Error, and nothing after it; output offsets at the client are gap-
free and every token is sent once; nothing from a stop string on is sent.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from llmos.codes import FinishReason
from llmos.errors import LlmosError, ProtocolError
from llmos.protocol.messages import (
    Accepted,
    DecodeClose,
    DecodedItem,
    DecodeItem,
    DecodeOpen,
    Error,
    Finished,
    Message,
    SeqAck,
    SeqCancel,
    SeqEnd,
    SeqFinish,
    SeqSubmit,
    TokenEntry,
    TokenLogprobs,
    Tokens,
    Usage,
)
from llmos.protocol.params import SamplingParams

_LEAST_DEADLINE_MS = 0.001


class RequestState(Enum):
    ENCODING = "encoding"
    SUBMITTED = "submitted"
    STREAMING = "streaming"
    ENDED = "ended"


TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.ENCODING: frozenset({RequestState.SUBMITTED, RequestState.ENDED}),
    RequestState.SUBMITTED: frozenset({RequestState.STREAMING, RequestState.ENDED}),
    RequestState.STREAMING: frozenset({RequestState.ENDED}),
    RequestState.ENDED: frozenset(),
}


@dataclass(slots=True)
class Outbox:
    """Messages that handling one event gave, by destination. `client` pairs each with the routing id of its client."""

    client: list[tuple[bytes, Message]] = field(default_factory=list)
    kernel: list[Message] = field(default_factory=list)
    text: list[Message] = field(default_factory=list)
    decode: list[DecodeItem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a request asks of the scheduler. `deadline_ms` counts from `received`, by the gateway's clock."""

    client_request_id: str | None = None
    nice: int = 0
    deadline_ms: float | None = None
    received: float = 0.0

    def deadline_left(self, now: float) -> float | None:
        """What is left of the deadline once the prompt is encoded; never 0, so that the microkernel refuses in its own words."""
        if self.deadline_ms is None:
            return None
        return max(_LEAST_DEADLINE_MS, self.deadline_ms - (now - self.received) * 1000)


@dataclass(frozen=True, slots=True)
class _Pending:
    """Tokens that the tokenizer has and the client has not."""

    offset: int
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None


class Request:
    """One generation.

    `number` is the gateway's own: `req` at the tokenizer and the microkernel, and the decode stream.
    """

    def __init__(
        self, number: int, client: bytes, req: int, model: str, params: SamplingParams, owner: str, terms: Terms
    ) -> None:
        self.number = number
        self.client = client
        self.req = req
        self.model = model
        self.params = params
        self.owner = owner
        self.terms = terms
        self.state = RequestState.ENCODING
        self.rid = 0
        self._prompt_tokens = 0
        self._cancel: FinishReason | None = None  # asked for; sent as soon as the rid is known
        self._received = 0  # output tokens from the microkernel
        self._delivered = 0  # output tokens sent to the client
        self._pending: deque[_Pending] = deque()
        self._stop: str | None = None
        self._text_lost = False
        self._end: SeqEnd | None = None

    def encoded(self, prompt: bytes, params: SamplingParams, now: float, out: Outbox) -> None:
        """The prompt is token ids now, and checked; `params` are complete."""
        self.params = params
        self._prompt_tokens = len(prompt) // 4
        self._move(RequestState.SUBMITTED)
        terms = self.terms
        out.kernel.append(
            SeqSubmit(
                self.number,
                self.model,
                prompt,
                params,
                self.owner,
                terms.client_request_id,
                terms.nice,
                terms.deadline_left(now),
            )
        )

    def accepted(self, rid: int, out: Outbox) -> None:
        self._move(RequestState.STREAMING)
        self.rid = rid
        out.client.append((self.client, Accepted(self.req, rid, self.model, self._prompt_tokens)))
        if not self._text_lost:
            out.text.append(DecodeOpen(self.number, self.model, self.params.stop))
        if self._cancel is not None:
            out.kernel.append(SeqCancel(rid, self._cancel))

    def tokens(self, entry: TokenEntry, out: Outbox) -> None:
        """New output. What was seen before is dropped, a gap ends the request."""
        if self.state is not RequestState.STREAMING or self._stop is not None or self._text_lost:
            return
        if entry.offset > self._received:
            text = f"sequence {self.rid}: got tokens at {entry.offset}, expected {self._received}"
            self.fail(ProtocolError(text, rid=self.rid), out)
            return
        seen = self._received - entry.offset
        ids = entry.ids[seen:]
        if not ids:
            return
        logprobs = None if entry.logprobs is None else entry.logprobs[seen:]
        self._pending.append(_Pending(self._received, ids, logprobs))
        self._received += len(ids)
        out.decode.append(DecodeItem(self.number, ids, False))

    def decoded(self, item: DecodedItem, out: Outbox) -> None:
        """The tokenizer's answer to the oldest tokens it has of this request, or to the flush after the last ones."""
        if self.state is not RequestState.STREAMING or self._stop is not None or self._text_lost:
            return
        text = item.text
        if self._pending:
            text = ""
            pending = self._pending.popleft()
            used = len(pending.ids) if item.stop is None else item.used
            logprobs = None if pending.logprobs is None else pending.logprobs[:used]
            self._delivered += used
            message = Tokens(self.req, pending.offset, pending.ids[:used], item.text, logprobs)
            out.client.append((self.client, message))
        elif self._end is None:
            self.fail(ProtocolError(f"sequence {self.rid}: text without tokens", rid=self.rid), out)
            return
        if item.stop is not None:
            self._stopped(item.stop, text, out)
        elif item.final:
            self._finish(text, out)

    def end(self, end: SeqEnd, out: Outbox) -> None:
        """The microkernel's last word; the tokenizer may still hold text back."""
        if self.state is not RequestState.STREAMING or self._end is not None:
            return
        self._end = end
        if self._stop is not None or self._text_lost:
            self._finish("", out)
        else:
            out.decode.append(DecodeItem(self.number, (), True))

    def cancel(self, out: Outbox) -> None:
        """The client does not want more. Idempotent."""
        if self.state is RequestState.ENCODING:
            usage = Usage(0, 0, 0, 0, 0.0, 0.0)
            out.client.append((self.client, Finished(self.req, 0, FinishReason.CANCELLED, "", usage)))
            self._move(RequestState.ENDED)
            return
        self._ask_cancel(FinishReason.CANCELLED, out)

    def text_lost(self, out: Outbox) -> None:
        """The tokenizer lost this request's stream: its text can not go on."""
        if self.state is RequestState.ENDED or self._stop is not None or self._text_lost:
            return
        self._text_lost = True
        self._pending.clear()
        if self._end is not None:
            self._finish("", out)
        else:
            self._ask_cancel(FinishReason.TOKENIZER_FAILED, out)

    def acknowledge(self, upto: int, out: Outbox) -> None:
        """The client has read below `upto`; more than it was sent it can not have read."""
        if self.state is RequestState.STREAMING:
            out.kernel.append(SeqAck(self.rid, min(upto, self._delivered)))

    def fail(self, error: LlmosError, out: Outbox) -> None:
        """End the request with a typed error."""
        if self.state is RequestState.ENDED:
            return
        rid = error.rid if error.rid is not None else self.rid or None
        out.client.append((self.client, Error(self.req, int(error.code), error.message, error.field, rid)))
        self.abandon(out)

    def abandon(self, out: Outbox) -> None:
        """Nobody reads this request any more."""
        if self.state is RequestState.STREAMING:
            if self._end is None:
                out.kernel.append(SeqCancel(self.rid, FinishReason.CANCELLED))
            if self._stop is None and not self._text_lost:
                out.text.append(DecodeClose(self.number))
        if self.state is not RequestState.ENDED:
            self._move(RequestState.ENDED)

    def _ask_cancel(self, reason: FinishReason, out: Outbox) -> None:
        if self._cancel is not None or self.state is RequestState.ENDED:
            return
        self._cancel = reason
        if self.state is RequestState.STREAMING and self._end is None:
            out.kernel.append(SeqCancel(self.rid, reason))

    def _stopped(self, stop: str, text: str, out: Outbox) -> None:
        """A stop string ends the text; tokens after it, already here or still to come, do not count."""
        self._stop = stop
        self._pending.clear()
        if self._end is not None:
            self._finish(text, out)
        else:
            out.kernel.append(SeqFinish(self.rid, self._delivered))

    def _finish(self, text: str, out: Outbox) -> None:
        assert self._end is not None
        reason, usage = self._end.reason, self._end.usage
        if self._stop is not None:
            reason = FinishReason.STOP
            usage = msgspec.structs.replace(usage, output_tokens=self._delivered)
        elif self._text_lost:
            reason = FinishReason.TOKENIZER_FAILED
        out.client.append((self.client, Finished(self.req, self.rid, reason, text, usage, self._stop)))
        self._move(RequestState.ENDED)

    def _move(self, state: RequestState) -> None:
        assert state in TRANSITIONS[self.state], f"request {self.number}: {self.state} -> {state}"
        self.state = state
