"""How /v1/chat/completions and /v1/completions answer: in one piece or as events. What their parts look like is theirs to say.

Answer       one request's answer; subclasses say how a piece, an end and a choice are written
respond()    the response, once the first sample of each prompt is accepted
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, ClassVar

import msgspec
from starlette.types import ASGIApp

from llmos.errors import LlmosError
from llmos.protocol.messages import TokenLogprobs, Tokens
from llmos.services.gateway.http.context import Call, json_response
from llmos.services.gateway.http.failures import HttpError, as_http, openai_body
from llmos.services.gateway.http.openai_output import usage_body
from llmos.services.gateway.http.outputs import Collected, Output, Outputs, Piece, collect
from llmos.services.gateway.http.requests import Sampling
from llmos.services.gateway.http.sse import DONE, EventStream, Marks, Resume, unless_left
from llmos.services.gateway.http.token_texts import ids_in

log = logging.getLogger(__name__)


class Answer(ABC):
    """`prefix` of its id, `kind` and `chunk_kind`: OpenAI's names. `head` and `tail`: how all its events begin and end."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, call: Call, outputs: Outputs, created: int, samples: int, *, with_logprobs: bool) -> None:
        self.call = call
        self.outputs = outputs
        self.created = created
        self.samples = samples
        self.with_logprobs = with_logprobs
        self.head = b""
        self.tail = b"}\n\n"

    def begin(self, *, with_usage: bool) -> None:
        """Its outputs have numbers now."""
        self.head = msgspec.json.encode(self._named(self.chunk_kind))[:-1]
        self.tail = b',"usage":null}\n\n' if with_usage else b"}\n\n"

    @abstractmethod
    def opening(self, output: Output) -> bytes:
        """The first event of an output; may be none."""

    @abstractmethod
    def piece(self, output: Output, text: str, logprobs: bytes = b"null") -> bytes:
        """An event with text."""

    @abstractmethod
    def end(self, output: Output) -> bytes:
        """The last event of an output."""

    @abstractmethod
    def logprobs(
        self, output: Output, ids: Sequence[int], given: Sequence[TokenLogprobs | None], table: dict[int, bytes]
    ) -> dict[str, Any]: ...

    @abstractmethod
    def choice(self, whole: Collected, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        """One of the choices of an answer in one piece."""

    def more(self) -> dict[str, Any]:
        """Further fields of an answer in one piece."""
        return {}

    def usage(self) -> dict[str, Any]:
        return usage_body(self.outputs.outputs, self.samples)

    def _named(self, kind: str) -> dict[str, Any]:
        first = self.outputs.outputs[0]
        return {"id": f"{self.prefix}-{first.rid}", "object": kind, "created": self.created, "model": first.model}

    # ------------------------------------------------------------ in one piece

    async def whole(self) -> dict[str, Any]:
        await self.outputs.begin()
        found = await collect(self.outputs)
        choices = [self.choice(one, await self._whole_logprobs(one)) for one in found]
        return self._named(self.kind) | {
            "choices": choices,
            "usage": self.usage(),
            "system_fingerprint": None,
            **self.more(),
        }

    async def _whole_logprobs(self, whole: Collected) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        return self.logprobs(whole.output, whole.ids, whole.logprobs, await self._table(whole.ids, whole.logprobs))

    async def _table(self, ids: Sequence[int], given: Sequence[TokenLogprobs | None]) -> dict[int, bytes]:
        model = self.outputs.outputs[0].model
        return await self.call.site.texts.learn(self.call.session, model, ids_in(ids, given))

    # ------------------------------------------------------------ as events

    async def events(self, resume: Resume, *, with_usage: bool) -> AsyncIterator[bytes]:
        """Each item is what a round of the microkernel gave, as one write."""
        self.begin(with_usage=with_usage)
        marks = Marks(self.created, [output.place for output in self.outputs.outputs])
        if not resume.is_again:
            opening = [
                marks.tokens(output, 0) + event for output in self.outputs.outputs if (event := self.opening(output))
            ]
            if opening:
                yield b"".join(opening)
        while pieces := await self.outputs.take():
            if events := b"".join([await self.event(marks, piece) for piece in pieces]):
                yield events
        if with_usage:
            yield b'data: %b,"choices":[],"usage":%b}\n\n' % (self.head, msgspec.json.encode(self.usage()))
        yield DONE

    async def event(self, marks: Marks, piece: Piece) -> bytes:
        """Nothing for what the client has already, or what says nothing yet."""
        output, message = piece.output, piece.message
        if isinstance(message, Tokens):
            logprobs = b"null"
            if self.with_logprobs and message.logprobs:
                table = await self._table(message.ids, message.logprobs)
                logprobs = msgspec.json.encode(self.logprobs(output, message.ids, message.logprobs, table))
            elif not message.text:
                return b""
            mark = marks.tokens(output, message.offset + len(message.ids))
            return mark + self.piece(output, message.text, logprobs)
        if output.place.is_over:
            return b""
        event = b""
        if message.text and not output.place.has_text:
            event = marks.text(output) + self.piece(output, message.text)
        return event + marks.end(output) + self.end(output)


async def respond(answer: Answer, resume: Resume, asked: Sampling, idle: tuple[str, ...]) -> ASGIApp:
    """Raises the typed refusal."""
    outputs = answer.outputs
    if not asked.stream:
        if asked.stream_options is not None:
            raise HttpError(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")
        found = await unless_left(answer.call.request, outputs, answer.whole())
        return json_response(found, response_headers(outputs, idle))
    await begin(outputs)
    options = asked.stream_options
    events = answer.events(resume, with_usage=options is not None and options.include_usage)
    return EventStream(outputs, events, error_event, response_headers(outputs, idle))


async def begin(outputs: Outputs) -> None:
    """Ask; whatever comes in between, nothing is left behind."""
    try:
        await outputs.begin()
    except BaseException:
        outputs.leave()
        raise


@contextlib.contextmanager
def named(names: dict[str, str]) -> Iterator[None]:
    """Typed errors come out with the caller's names of the fields."""
    try:
        yield
    except LlmosError as error:
        raise as_http(error, names) from None


def response_headers(outputs: Outputs, idle: tuple[str, ...] = ()) -> dict[str, str]:
    """`llmos-rid`: the numbers of the sequences, as far as they are known. `llmos-no-effect`: fields that changed nothing."""
    rids = ",".join(str(output.rid) for output in outputs.outputs if output.rid)
    headers = {"llmos-rid": rids, "x-request-id": f"req-{rids.partition(',')[0]}"} if rids else {}
    return headers | ({"llmos-no-effect": ", ".join(idle)} if idle else {})


def stream_error(error: Exception) -> HttpError:
    """What a stream that fails is told; a bug is logged, and says nothing of itself."""
    if isinstance(error, LlmosError | HttpError):
        return as_http(error)
    log.error("a stream failed by a bug", exc_info=error)
    return HttpError(500, "internal error", kind="server_error", code="internal_error")


def error_event(error: Exception) -> bytes:
    return b"data: " + msgspec.json.encode(openai_body(stream_error(error))) + b"\n\n"
