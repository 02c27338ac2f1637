"""The outputs of one HTTP request: one or more sequences, read together in the order in which their tokens come.

A request has prompts, and of each prompt one or more samples. The first sample of a prompt is asked for at once; the others of it as soon
as the first has a token: then the prompt's pages are in the prefix cache, and the others share them, as forks would, but each is a one-shot
sequence of its own that ends with its reader and can be found again by its number.

    asked -> accepted -> finished        `Place.rid` 0: not asked for, or not accepted yet

Invariants: the tokens of one output come in order and without a gap; what one output fails of fails all, and the others are ended;
whoever leaves early leaves all. Everything read is acknowledged, so a client that does not read holds its sequences back and nothing else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs

from llmos.codes import FinishReason
from llmos.errors import ProtocolError, SequenceFailed
from llmos.protocol.failures import typed
from llmos.protocol.messages import (
    Accepted,
    Attach,
    Error,
    Finished,
    Generate,
    PromptLogprobs,
    TokenLogprobs,
    Tokens,
    Usage,
)
from llmos.protocol.prompt_logprobs import unpack_records
from llmos.services.gateway.http.sessions import Session

ACK_EVERY_TOKENS = 256  # as our SDK does


@dataclass(frozen=True, slots=True)
class Place:
    """How far a client has read one output: what `Last-Event-ID` says. `has_text`: it has all text; `is_over`: it has its end, too."""

    rid: int = 0
    offset: int = 0
    has_text: bool = False
    is_over: bool = False


@dataclass(slots=True)
class Output:
    """One of them, as it is now. `upto`: how many of its tokens were taken; `chars`: of text, in `logprobs` of events. `scored`: tokens of
    the prompt with their log-probabilities, if they were asked for; of the first one there is none."""

    index: int
    wanted: Generate
    place: Place = Place()
    req: int = 0
    rid: int = 0
    model: str = ""
    prompt_tokens: int = 0
    upto: int = 0
    chars: int = 0
    acked: int = 0
    scored: list[tuple[int, TokenLogprobs | None]] = field(default_factory=list)
    usage: Usage | None = None
    reason: FinishReason | None = None
    stop_string: str | None = None

    @property
    def is_asked(self) -> bool:
        return self.req != 0


@dataclass(slots=True)
class Piece:
    """What came for one output: tokens, or its end."""

    output: Output
    message: Tokens | Finished


class Outputs:
    """`wanted[i * samples]` is the first sample of prompt i. `places`: where a client that comes again had got to. `from_start`: read it
    all again, whatever they say."""

    def __init__(
        self,
        session: Session,
        wanted: Sequence[Generate],
        samples: int = 1,
        places: Sequence[Place] = (),
        *,
        from_start: bool = False,
    ) -> None:
        self._session = session
        self._samples = samples
        self.outputs = [Output(index, message) for index, message in enumerate(wanted)]
        for output, place in zip(self.outputs, places):
            output.place = place
            if not from_start:
                output.upto = output.acked = place.offset
        self._arrived: deque[tuple[Output, Any]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._left = len(self.outputs)
        self._unaccepted = 0
        self._is_closed = False

    async def begin(self) -> None:
        """Ask; returns when the first sample of each prompt is accepted. Raises the typed refusal."""
        loop = asyncio.get_running_loop()
        for output in self.outputs:
            if output.index % self._samples == 0 or output.place.rid:
                self._ask(output)
        while self._unaccepted > 0:
            if self._arrived and isinstance(self._arrived[-1][1], Error):
                raise typed(self._arrived[-1][1])
            await self._wait(loop)

    async def take(self) -> list[Piece]:
        """What has come, at least one piece; [] after the last one. Raises the typed error of an output that failed."""
        if not self._left:
            return []
        loop = asyncio.get_running_loop()
        while not self._arrived:
            await self._wait(loop)
        pieces = []
        while self._arrived:
            output, message = self._arrived.popleft()
            if isinstance(message, Error):
                raise typed(message)
            if isinstance(message, Tokens):
                if message.offset != output.upto:
                    raise ProtocolError(f"sequence {output.rid}: tokens at {message.offset}, expected {output.upto}")
                output.upto += len(message.ids)
            else:
                self._finished(output, message)
            pieces.append(Piece(output, message))
            if output.index % self._samples == 0:
                self._ask_siblings(output)
        return pieces

    def acknowledge(self) -> None:
        """The client has what was taken."""
        for output in self.outputs:
            if output.upto - output.acked >= ACK_EVERY_TOKENS and output.reason is None:
                output.acked = output.upto
                self._session.acknowledge(output.req, output.upto)

    def cancel(self) -> None:
        """End all of them; their ends still come."""
        for output in self.outputs:
            if output.is_asked and output.reason is None:
                self._session.cancel(output.req)

    def leave(self) -> None:
        """Read no further: sequences without a name of their own end, named ones go on."""
        self._is_closed = True
        for output in self.outputs:
            if output.is_asked:
                self._session.leave(output.req)

    # ------------------------------------------------------------ asking

    def _ask(self, output: Output) -> None:
        place = output.place
        self._unaccepted += 1

        def make(req: int) -> Generate | Attach:
            return Attach(req, place.rid, output.upto) if place.rid else structs.replace(output.wanted, req=req)

        output.req = self._session.send(make, lambda message: self._sink(output, message))

    def _ask_siblings(self, first: Output) -> None:
        """The prompt of `first` is computed."""
        if self._is_closed:
            return
        for output in self.outputs[first.index + 1 : first.index + self._samples]:
            if not output.is_asked:
                output.wanted = structs.replace(output.wanted, parent=first.wanted.parent or first.rid)
                self._ask(output)

    # ------------------------------------------------------------ what comes

    def _sink(self, output: Output, message: Any) -> None:
        if self._is_closed:
            return
        if isinstance(message, Accepted):
            output.rid, output.model, output.prompt_tokens = message.rid, message.model, message.prompt_tokens
            self._unaccepted -= 1
        elif isinstance(message, PromptLogprobs):
            self._scores(output, message)
        else:
            self._arrived.append((output, message))
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _scores(self, output: Output, message: PromptLogprobs) -> None:
        found = list(unpack_records(message.values, message.top))
        for token, logprobs in found[len(output.scored) - message.start :]:
            output.scored.append((token, logprobs if output.scored else None))

    async def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waiter = loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _finished(self, output: Output, message: Finished) -> None:
        reason = FinishReason(message.reason)
        if reason.is_failure:
            text = f"sequence {message.rid} ended: {reason.name.lower()} after {output.upto} tokens"
            raise SequenceFailed(text, rid=message.rid)
        output.reason, output.usage, output.stop_string = reason, message.usage, message.stop_string
        self._left -= 1


@dataclass(slots=True)
class Collected:
    """A whole output."""

    output: Output
    text: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)


async def collect(outputs: Outputs) -> list[Collected]:
    """Read all of them to their ends."""
    found = [Collected(output) for output in outputs.outputs]
    while pieces := await outputs.take():
        for piece in pieces:
            whole = found[piece.output.index]
            whole.text.append(piece.message.text)
            if isinstance(piece.message, Tokens):
                whole.ids += piece.message.ids
                whole.logprobs += piece.message.logprobs or [None] * len(piece.message.ids)
        outputs.acknowledge()
    return found
