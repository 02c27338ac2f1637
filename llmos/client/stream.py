"""Streams of an answer: iterators over `Chunk` that are context managers too.

States: open -> ended (all chunks read; `completion` is set, or the error was raised) | left (closed early). Leaving early is:
`close`, the end of a `with` block, an exception, or nobody holding the stream any longer. It ends the output that the stream
asked for; a stream that is only attached leaves it to go on. A connection that is lost and made again is no event: there is a pause.

Invariant: what the event loop holds on to is the queue, never the stream, so that a dropped stream can be collected.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llmos.client._core import AckCounter, Sink
from llmos.client.output import Output, Submission
from llmos.client.types import Chunk, Completion
from llmos.client.wire import late
from llmos.errors import InvalidRequest, LlmosError

if TYPE_CHECKING:
    from llmos.client.asequence import AsyncSequence
    from llmos.client.sequence import Sequence


class _Reading:
    """What both kinds of stream do with what they take from their queue."""

    def __init__(self, output: Output, sink: Sink) -> None:
        self._acks = AckCounter(output.start)
        self._completion: Completion | None = None
        self._over = False
        self._submission = Submission(output, sink)
        self._rid = output.rid
        self._timeout_s = output.timeout_s
        self._deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s

    @property
    def completion(self) -> Completion:
        """The whole answer; there is one after the last chunk was read."""
        if self._completion is None:
            raise InvalidRequest("the stream has no completion: it was not read to its end", field="stream")
        return self._completion

    @property
    def rid(self) -> int | None:
        """The sequence's id as `ps` shows it; that of a new sequence is known when it is accepted, at the latest from the first
        chunk on."""
        return self._submission.rid if self._rid is None else self._rid

    def _known_rid(self) -> int:
        if (rid := self.rid) is None:
            raise InvalidRequest("the stream has no sequence yet: nothing was read", field="stream")
        return rid

    def _time_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _take(self, item: Any) -> Chunk | None:
        """A chunk, None at the end; raises what ended the stream instead."""
        if isinstance(item, Chunk):
            return item
        self._over = True
        if isinstance(item, LlmosError):
            raise item
        assert isinstance(item, Completion), item
        self._completion = item
        return None


class AsyncTokenStream(_Reading):
    """`async for chunk in stream`.

    The request is on its way when the stream is made; must be made on a running event loop.
    """

    def __init__(self, output: Output, sequence: Callable[[int], AsyncSequence]) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        super().__init__(output, self._queue.put_nowait)
        self._sequence = sequence
        self._loop = asyncio.get_running_loop()
        self._submission.begin()

    @property
    def sequence(self) -> AsyncSequence:
        """A handle to the sequence; there is one when `rid` is known."""
        return self._sequence(self._known_rid())

    def __aiter__(self) -> AsyncTokenStream:
        return self

    async def __anext__(self) -> Chunk:
        if self._over:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout(self._time_left()):
                item = await self._queue.get()
        except TimeoutError:
            await self.aclose()
            raise late(self._timeout_s) from None
        except asyncio.CancelledError:
            await self.aclose()
            raise
        chunk = self._take(item)
        if chunk is None:
            raise StopAsyncIteration
        upto = self._acks.read(len(chunk.token_ids))
        if upto is not None:
            self._submission.acknowledge(upto)
        return chunk

    async def aclose(self) -> None:
        """Leave; ends the output unless the stream is only attached to it."""
        if not self._over:
            self._over = True
            self._submission.leave()

    async def __aenter__(self) -> AsyncTokenStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # The collector may run in any thread, and before __init__ was through.
        if hasattr(self, "_loop") and not self._over:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._submission.leave)


class TokenStream(_Reading):
    """`for chunk in stream`. One thread reads a stream at a time."""

    def __init__(self, output: Output, sequence: Callable[[int], Sequence], loop: asyncio.AbstractEventLoop) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        super().__init__(output, self._queue.put)
        self._sequence = sequence
        self._loop = loop
        loop.call_soon_threadsafe(self._submission.begin)

    @property
    def sequence(self) -> Sequence:
        """A handle to the sequence; there is one when `rid` is known."""
        return self._sequence(self._known_rid())

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> Chunk:
        if self._over:
            raise StopIteration
        try:
            item = self._queue.get(timeout=self._time_left())
        except queue.Empty:
            self.close()
            raise late(self._timeout_s) from None
        except BaseException:  # Ctrl-C while waiting: nobody will read the rest
            self.close()
            raise
        chunk = self._take(item)
        if chunk is None:
            raise StopIteration
        upto = self._acks.read(len(chunk.token_ids))
        if upto is not None:
            self._on_loop(self._submission.acknowledge, upto)
        return chunk

    def close(self) -> None:
        """Leave; ends the output unless the stream is only attached to it."""
        if not self._over:
            self._over = True
            self._on_loop(self._submission.leave)

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_loop"):
            self.close()

    def _on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the client was closed: its loop is gone, and the sequence with it
            self._loop.call_soon_threadsafe(function, *arguments)
