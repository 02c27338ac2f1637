"""Streams of an answer: iterators over `Chunk` that are context managers too.

States: open -> ended (all chunks read; `completion` is set, or the error was raised) | left (closed early). Leaving early is:
`close`, the end of a `with` block, an exception, or nobody holding the stream any longer. It ends the output that the stream
asked for; a stream that is only attached leaves it to go on.

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
from llmos.client.connection import Submission
from llmos.client.types import Chunk, Completion
from llmos.client.wire import Output, late
from llmos.errors import InvalidRequest, LlmosError, Unavailable

if TYPE_CHECKING:
    from llmos.client.asequence import AsyncSequence
    from llmos.client.sequence import Sequence


class _Request:
    """The stream's request, as the event loop holds it. All methods run on the loop."""

    def __init__(self) -> None:
        self._submission: Submission | None = None
        self._left = False

    @property
    def rid(self) -> int | None:
        return None if self._submission is None else self._submission.rid

    async def begin(self, output: Output, sink: Sink) -> None:
        """Submit; a failure goes where the reader will find it."""
        try:
            self._submission = await output.submit(sink)
        except LlmosError as error:
            sink(error)
        except asyncio.CancelledError:
            sink(Unavailable("the client was closed"))
            raise
        if self._left:
            self.leave()

    def acknowledge(self, upto: int) -> None:
        if self._submission is not None:
            self._submission.acknowledge(upto)

    def leave(self) -> None:
        """Read no further, neither what was asked for nor what is about to be."""
        self._left = True
        if self._submission is not None:
            self._submission.leave()


class _Reading:
    """What both kinds of stream do with what they take from their queue."""

    def __init__(self, output: Output) -> None:
        self._acks = AckCounter(output.start)
        self._completion: Completion | None = None
        self._over = False
        self._request = _Request()
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
        return self._request.rid if self._rid is None else self._rid

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
        super().__init__(output)
        self._sequence = sequence
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._request.begin(output, self._queue.put_nowait))

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
            self._request.acknowledge(upto)
        return chunk

    async def aclose(self) -> None:
        """Leave; ends the output unless the stream is only attached to it."""
        if not self._over:
            self._over = True
            self._request.leave()

    async def __aenter__(self) -> AsyncTokenStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # The collector may run in any thread, and before __init__ was through.
        if hasattr(self, "_task") and not self._over:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._request.leave)


class TokenStream(_Reading):
    """`for chunk in stream`. One thread reads a stream at a time."""

    def __init__(self, output: Output, sequence: Callable[[int], Sequence], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(output)
        self._sequence = sequence
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._loop = loop
        self._task = asyncio.run_coroutine_threadsafe(self._request.begin(output, self._queue.put), loop)

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
            self._on_loop(self._request.acknowledge, upto)
        return chunk

    def close(self) -> None:
        """Leave; ends the output unless the stream is only attached to it."""
        if not self._over:
            self._over = True
            self._on_loop(self._request.leave)

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_task"):
            self.close()

    def _on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the client was closed: its loop is gone, and the sequence with it
            self._loop.call_soon_threadsafe(function, *arguments)
