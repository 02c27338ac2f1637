"""`Client`: the SDK for code that blocks. A thin shell over `AsyncClient`, which runs on a private event-loop thread.

    with Client() as client:
        print(client.generate("Once upon a time", max_tokens=64).text)
        for chunk in client.generate("Once upon a time", stream=True):
            print(chunk.text, end="", flush=True)
        with client.spawn("Once upon a time") as seq:
            kids = seq.fork(4)

Thread-safe: any number of threads may share one Client, and each of their requests is a sequence of its own in the
same batch. What a sequence can do is in `sequence.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import CancelledError
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, Unpack, overload

from llmos.client.aio import AsyncClient
from llmos.client.blocking import blocking
from llmos.client.link import OnOutage
from llmos.client.options import EncodeOptions, GenerateOptions, PromptLike, SequenceLike, SpawnOptions, TokensLike
from llmos.client.output import Output
from llmos.client.sequence import Sequence
from llmos.client.stream import TokenStream
from llmos.client.types import Completion, Embedding
from llmos.client.wire import RECONNECT_S
from llmos.errors import Unavailable

T = TypeVar("T")
_CLOSE_TIMEOUT_S = 5.0
_LEAVE_TIMEOUT_S = 2.0  # for what an interrupted call still has to say to the gateway


class Client:
    """A client of one llmosd.

    `url`: "tcp://HOST:PORT", with `key` and `server_key`, or the run directory of a daemon on this machine. What is None comes from the
    environment (LLMOS_URL, LLMOS_KEY, LLMOS_SERVER_KEY); without LLMOS_URL it is this machine's daemon.
    `model` and `timeout_s` are defaults for its calls; `timeout_s` None = generations may take for ever. `reconnect_s`: how long a lost
    connection is waited for, 0 = not at all. `on_outage` is called with the reason when that waiting begins, and with None when it
    is over, on the client's own thread; it must not block.
    """

    def __init__(
        self,
        url: str | Path | None = None,
        model: str | None = None,
        timeout_s: float | None = None,
        *,
        key: str | None = None,
        server_key: str | None = None,
        reconnect_s: float = RECONNECT_S,
        on_outage: OnOutage | None = None,
    ) -> None:
        self._inner = AsyncClient(
            url, model, timeout_s, key=key, server_key=server_key, reconnect_s=reconnect_s, on_outage=on_outage
        )
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="llmos-client", daemon=True)
        thread.start()
        # Holds everything but the Client itself, so that a forgotten Client is closed by the collector, or at exit.
        self._finalizer = weakref.finalize(self, _stop, self._inner, self._loop, thread)

    @overload
    def generate(
        self, prompt: PromptLike, *, stream: Literal[False] = False, **options: Unpack[GenerateOptions]
    ) -> Completion: ...

    @overload
    def generate(
        self, prompt: PromptLike, *, stream: Literal[True], **options: Unpack[GenerateOptions]
    ) -> TokenStream: ...

    def generate(
        self, prompt: PromptLike, *, stream: bool = False, **options: Unpack[GenerateOptions]
    ) -> Completion | TokenStream:
        """Continue `prompt`: a str is plain text, a list of `{"role", "content"}` is a chat, a list of ints is token
        ids.

        Options: the fields of `SamplingParams`, which win over `params=`; `model`; `nice`: 19 waits for everybody, -20 (below 0:
        administrators) for nobody; `deadline_s`: a sequence that still waits this many seconds from now fails with
        `SequenceFailed`, one that can not be done by then is refused; `timeout_s`: the longest time for the whole answer;
        `parent`: the sequence whose job it belongs to; `after`: the sequences that have to end well before it begins;
        `client_request_id`.

        With `stream=True` the result is an iterator over chunks that cancels the sequence when it is left early.
        """
        output = self._inner._output(prompt, options)
        return self._stream(output, self.sequence) if stream else self._run(output.collect())

    def spawn(self, prompt: PromptLike | None = None, **options: Unpack[SpawnOptions]) -> Sequence:
        """An open sequence: its tokens are computed at once, then it rests until it is told to generate.

        Without a prompt it begins with the first `append`. Options: `model`, `nice`, `parent`, `after`, `client_request_id`, as in
        `generate`. It ends by `close`, `kill` or when nobody used it for too long.
        """
        return Sequence(self, self._run(self._inner.spawn(prompt, **options)))

    def sequence(self, rid: SequenceLike) -> Sequence:
        """A handle to any sequence, by number. Whether it is there, its first verb will tell."""
        return Sequence(self, self._inner.sequence(rid))

    @overload
    def embed(  # type: ignore[overload-overlap]  # a str is one text, though also an iterable of them
        self, texts: TokensLike, **options: Unpack[EncodeOptions]
    ) -> Embedding: ...

    @overload
    def embed(self, texts: Iterable[TokensLike], **options: Unpack[EncodeOptions]) -> list[Embedding]: ...

    def embed(
        self, texts: TokensLike | Iterable[TokensLike], **options: Unpack[EncodeOptions]
    ) -> Embedding | list[Embedding]:
        """The same as `AsyncClient.embed`, which see."""
        return self._run(self._inner.embed(texts, **options))  # type: ignore[return-value]

    samples = blocking(AsyncClient.samples)
    classify = blocking(AsyncClient.classify)
    score = blocking(AsyncClient.score)
    loglikelihood = blocking(AsyncClient.loglikelihood)
    kill = blocking(AsyncClient.kill)
    nice = blocking(AsyncClient.nice)
    suspend = blocking(AsyncClient.suspend)
    resume = blocking(AsyncClient.resume)
    explain = blocking(AsyncClient.explain)
    ps = blocking(AsyncClient.ps)
    status = blocking(AsyncClient.status)
    measures = blocking(AsyncClient.measures)
    models = blocking(AsyncClient.models)
    tokenize = blocking(AsyncClient.tokenize)
    tenants = blocking(AsyncClient.tenants)
    set_tenant = blocking(AsyncClient.set_tenant)
    write_record = blocking(AsyncClient.write_record)
    restart_service = blocking(AsyncClient.restart_service)

    def close(self) -> None:
        """Leave: unfinished requests of this client fail with `Unavailable`. Sequences made by `generate` are cancelled, open ones
        live on. Idempotent.
        """
        self._finalizer()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise Unavailable("the client is closed")

    def _stream(self, output: Output, sequence: Callable[[int], Sequence]) -> TokenStream:
        self._check_open()
        return TokenStream(output, sequence, self._loop)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if not self._finalizer.alive:
            coroutine.close()
            self._check_open()
        over = threading.Event()
        future = asyncio.run_coroutine_threadsafe(_announced(coroutine, over), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise Unavailable("the client was closed") from None
        finally:
            if not future.done():  # Ctrl-C: nobody waits for the answer, but the gateway has to hear of it
                future.cancel()
                over.wait(_LEAVE_TIMEOUT_S)


async def _announced(coroutine: Coroutine[Any, Any, T], over: threading.Event) -> T:
    try:
        return await coroutine
    finally:
        over.set()


def _stop(client: AsyncClient, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Close the connections, then the loop and its thread."""
    if threading.current_thread() is thread:  # collected on the loop's own thread
        loop.create_task(client.close()).add_done_callback(lambda _: loop.stop())
        return
    with contextlib.suppress(TimeoutError):
        asyncio.run_coroutine_threadsafe(_close(client), loop).result(_CLOSE_TIMEOUT_S)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(_CLOSE_TIMEOUT_S)
    if not thread.is_alive():
        loop.close()


async def _close(client: AsyncClient) -> None:
    """Close and let every other task of the loop end: their callers get an answer instead of a hang."""
    await client.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
