"""Server-sent events: how a stream leaves, and how a client that comes again says what it has.

The id of an event is `CREATED:PLACE,PLACE,...`, one place for each output: `RID.OFFSET`, `0.0` before it is known; behind it `~` once
the last text was sent, `!` once the end was. Every event has the id of what a client has that got it and nothing after it. That is all
that is needed to go on: a request with the same body and the header `Last-Event-ID` gets what comes after that event, from whatever
process. So a gateway keeps nothing of a stream that a `kill -9` could take away.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from llmos.services.gateway.http.failures import HttpError
from llmos.services.gateway.http.outputs import Output, Outputs, Place

_PLACE = re.compile(r"(\d{1,19})\.(\d{1,19})([~!]?)", re.ASCII)
_MAX_ID = 65_536
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Resume:
    """`places` () = a stream from its beginning."""

    created: int
    places: tuple[Place, ...] = ()

    @property
    def is_again(self) -> bool:
        return bool(self.places)


def read_resume(request: Request, count: int) -> Resume:
    """Where a client that asks for `count` outputs has got to."""
    text = request.headers.get("last-event-id", "")
    if not text:
        return Resume(int(time.time()))
    created, _, rest = text.partition(":")
    parts = [_PLACE.fullmatch(part) for part in rest.split(",")] if len(text) <= _MAX_ID else []
    if not created.isascii() or not created.isdigit() or len(created) > 12 or None in parts or len(parts) != count:
        raise HttpError(
            400, f"Last-Event-ID: not the id of an event of a stream with {count} outputs", param="Last-Event-ID"
        )
    places = tuple(
        Place(int(part[1]), int(part[2]), bool(part[3]), part[3] == "!") for part in parts if part is not None
    )
    if max(place.rid for place in places) >= 2**63 or max(place.offset for place in places) >= 2**63:
        raise HttpError(400, "Last-Event-ID: a number is too large", param="Last-Event-ID")
    return Resume(int(created), places)


class Marks:
    """Ids for the events of one stream, which say what was sent until then. Where text is read for calls of tools, places count its
    characters instead of tokens: what comes out of a reader depends on these alone."""

    def __init__(self, created: int, places: Sequence[Place]) -> None:
        self._created = created
        self._parts = [f"{place.rid}.{place.offset}{_mark(place)}" for place in places]

    def tokens(self, output: Output, upto: int) -> bytes:
        """The `id:` line of an event with which a client has the first `upto` tokens."""
        return self._line(output.index, f"{output.rid}.{upto}")

    def text(self, output: Output, upto: int | None = None) -> bytes:
        """... with which it has all text."""
        return self._line(output.index, f"{output.rid}.{output.upto if upto is None else upto}~")

    def end(self, output: Output, upto: int | None = None) -> bytes:
        """... with which it has the end."""
        return self._line(output.index, f"{output.rid}.{output.upto if upto is None else upto}!")

    def _line(self, index: int, part: str) -> bytes:
        self._parts[index] = part
        return f"id: {self._created}:{','.join(self._parts)}\n".encode()


def _mark(place: Place) -> str:
    return "!" if place.is_over else "~" if place.has_text else ""


class EventStream:
    """A response whose body is made by `events`; each item is sent as it is and then acknowledged. An ASGI application, as starlette's
    responses are.

    `outputs` are left when the client goes, or when the stream is over. `on_error` makes the last words of a stream that fails.
    """

    def __init__(
        self,
        outputs: Outputs,
        events: AsyncIterator[bytes],
        on_error: Callable[[Exception], bytes],
        headers: dict[str, str],
    ) -> None:
        self._outputs = outputs
        self._events = events
        self._on_error = on_error
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._outputs.leave()
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _headers(self._headers)})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                self._outputs.acknowledge()
        except Exception as error:  # noqa: BLE001 - whatever it is, the client has a half answer and is told so; bugs are logged there
            await send({"type": "http.response.body", "body": self._on_error(error), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(request: Request, outputs: Outputs, work: Awaitable[object]) -> object:
    """The result of `work`; if the client goes meanwhile, its outputs are left and the request ends."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HttpError(499, "the client left", code="disconnected")
        return working.result()
    finally:
        outputs.leave()
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _headers(more: dict[str, str]) -> list[tuple[bytes, bytes]]:
    fixed = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (fixed | more).items()]
