"""One request of a client through the SDK, written into its history as it goes.

A request that is refused before it was accepted is asked again, as any client would: under the same `client_request_id`, or, where
there is none, after having looked whether it was done after all. After acceptance nothing is repeated here: going on is the SDK's
promise, and an error then is what the run is about.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from chaos.history import HistoryWriter
from llmos.client.stream import AsyncTokenStream
from llmos.errors import LlmosError, Overloaded, RequestTimeout, Unavailable

REFUSALS = (Unavailable, Overloaded, RequestTimeout)  # nothing was promised
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 0.5
Start = Callable[[], AsyncTokenStream]
T = TypeVar("T")


class GaveUp(Exception):
    """A request ended otherwise than it had to; it is in the history, and what was to follow makes no sense."""


@dataclass
class Reading:
    """A stream that is being read. `whole`: it came to its good end; `over`: nothing more will come."""

    rid: int | None = None
    tokens: int = 0
    whole: bool = False
    over: bool = False
    req: int = 0
    _moved: asyncio.Event = field(default_factory=asyncio.Event)

    def move(self) -> None:
        self._moved.set()

    async def reaches(self, tokens: int) -> bool:
        """Wait until so many tokens came; False if it ended before."""
        while self.tokens < tokens and not self.over:
            self._moved.clear()
            await self._moved.wait()
        return self.tokens >= tokens


class Patience:
    """Growing pauses between attempts, until `limit_s` are over."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._deadline = time.monotonic() + limit_s
        self._pause_s = FIRST_PAUSE_S

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._deadline

    async def pause(self) -> None:
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


class Requests:
    """`patience_s`: longer than any recovery may take; a client that waits so long without any sign gives up."""

    def __init__(self, history: HistoryWriter, patience_s: float) -> None:
        self._history = history
        self._patience_s = patience_s

    # ------------------------------------------------------------ streams

    async def read(
        self, reading: Reading, verb: str, begin: Start, *, again: Callable[[], Awaitable[Start]] | None = None,
        upto: int | None = None, **ask: Any,
    ) -> Reading:  # fmt: skip
        """Read a stream to its end, or until `upto` tokens came, and leave it then. `again`: finds out how to ask once more after a
        refusal, if not in the same way. `ask` goes into the history."""
        req = reading.req = self._history.new_request()
        self._history.write(req, "ask", verb=verb, **ask)
        patience = Patience(self._patience_s)
        try:
            while True:
                try:
                    await self._attempt(reading, verb, begin, upto)
                    return reading
                except REFUSALS as error:
                    self._refused(req, error, patience)
                await patience.pause()
                if again is not None:
                    begin = await self._found(req, again, patience)
        except LlmosError as error:
            self._write_error(req, error)
            raise GaveUp from None
        finally:
            reading.over = True
            reading.move()

    async def _attempt(self, reading: Reading, verb: str, begin: Start, upto: int | None) -> None:
        """Raises a refusal if it was not accepted; `GaveUp` after an error that is in the history already."""
        write, req = self._history.write, reading.req
        stream = begin()
        try:
            while (chunk := await self._next(stream)) is not None:
                if reading.rid is None:
                    reading.rid = chunk.rid
                    write(req, "accepted", rid=chunk.rid)
                write(req, "tokens", offset=chunk.offset, ids=chunk.token_ids, text=chunk.text)
                reading.tokens += len(chunk.token_ids)
                reading.move()
                if upto is not None and reading.tokens >= upto:
                    await stream.aclose()
                    write(req, "left")
                    return
        except TimeoutError:
            write(req, "gave_up", message=f"nothing for {self._patience_s:g} s")
            await stream.aclose()
            raise GaveUp from None
        except REFUSALS as error:
            # The number of a new sequence is known when it is accepted; of an existing one only tokens show that it was.
            if verb == "generate" and stream.rid is not None and reading.rid is None:
                write(req, "accepted", rid=stream.rid)
                reading.rid = stream.rid
            if reading.rid is None:
                raise
            self._write_error(req, error)
            raise GaveUp from None
        answer = stream.completion
        reading.rid, reading.whole = answer.rid, True
        write(req, "end", reason=answer.finish_reason, ids=len(answer.token_ids), text=answer.text)

    async def _next(self, stream: AsyncTokenStream) -> Any:
        async with asyncio.timeout(self._patience_s):
            return await anext(stream, None)

    def hand_over(self, reading: Reading) -> None:
        """Somebody is about to become the reader in its place."""
        if not reading.over:
            self._history.write(reading.req, "handover")

    # ------------------------------------------------------------ one answer

    async def ask(
        self, verb: str, call: Callable[[], Awaitable[T]], value: Callable[[T], dict[str, Any]], *,
        look: Callable[[], Awaitable[T | None]] | None = None, **ask: Any,
    ) -> T:  # fmt: skip
        """One question, one answer. `value`: what of it goes into the history. `look`: after a refusal, the answer if it was done
        after all, else None."""
        req = self._history.new_request()
        self._history.write(req, "ask", verb=verb, **ask)
        patience = Patience(self._patience_s)
        try:
            while True:
                try:
                    answer: T | None = await call()
                except REFUSALS as error:
                    self._refused(req, error, patience)
                    await patience.pause()
                    answer = None if look is None else await self._found(req, look, patience)
                if answer is not None:
                    self._history.write(req, "reply", value=value(answer))
                    return answer
        except LlmosError as error:
            self._write_error(req, error)
            raise GaveUp from None

    async def _found(self, req: int, look: Callable[[], Awaitable[T]], patience: Patience) -> T:
        """The answer of `look`, however often it is refused."""
        while True:
            try:
                return await look()
            except REFUSALS as error:
                self._refused(req, error, patience)
            await patience.pause()

    def _refused(self, req: int, error: LlmosError, patience: Patience) -> None:
        self._history.write(req, "refused", error=type(error).__name__, message=str(error))
        if patience.is_over:
            self._history.write(req, "gave_up", message=f"refused for {patience.limit_s:g} s")
            raise GaveUp

    def _write_error(self, req: int, error: LlmosError) -> None:
        self._history.write(req, "error", error=type(error).__name__, message=str(error))
