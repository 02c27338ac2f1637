"""`Client`: the SDK for code that blocks. A thin shell over `AsyncClient`, which runs on a private event-loop thread.

    with Client() as client:
        print(client.generate("Once upon a time", max_tokens=64).text)
        for chunk in client.generate("Once upon a time", stream=True):
            print(chunk.text, end="", flush=True)

Thread-safe: any number of threads may share one Client, and each of their requests is a sequence of its own in the
same batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

from llmos.client.aio import AsyncClient, check_timeout
from llmos.client.prompts import ChatLike, PromptLike, generate_request
from llmos.client.stream import TokenStream
from llmos.client.types import Completion, Tokenization
from llmos.errors import Unavailable
from llmos.protocol.messages import ModelRow, SeqRow, StatusReply
from llmos.protocol.params import SamplingParams

T = TypeVar("T")
_CLOSE_TIMEOUT_S = 5.0


class Client:
    """A client of one llmosd.

    `model` and `timeout_s` are defaults for its calls; `timeout_s` None = generations may take for ever.
    """

    def __init__(
        self, run_dir: str | Path | None = None, model: str | None = None, timeout_s: float | None = None
    ) -> None:
        self._client = AsyncClient(run_dir, model, timeout_s)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="llmos-client", daemon=True)
        thread.start()
        # Holds everything but the Client itself, so that a forgotten Client is closed by the collector, or at exit.
        self._finalizer = weakref.finalize(self, _stop, self._client, self._loop, thread)

    @overload
    def generate(
        self,
        prompt: PromptLike,
        *,
        model: str | None = None,
        params: SamplingParams | None = None,
        stream: Literal[False] = False,
        client_request_id: str | None = None,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: PromptLike,
        *,
        model: str | None = None,
        params: SamplingParams | None = None,
        stream: Literal[True],
        client_request_id: str | None = None,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> TokenStream: ...

    def generate(
        self,
        prompt: PromptLike,
        *,
        model: str | None = None,
        params: SamplingParams | None = None,
        stream: bool = False,
        client_request_id: str | None = None,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> Completion | TokenStream:
        """Continue `prompt`: a str is plain text, a list of `{"role", "content"}` is a chat, a list of ints is token
        ids.

        Keyword arguments that are not listed are fields of `SamplingParams` and win over `params`. With `stream=True`
        the result is an iterator over chunks that cancels the sequence when it is left early.
        """
        self._check_open()
        request = generate_request(prompt, model or self._client.model, params, client_request_id, sampling)
        limit = self._client.timeout_s if timeout_s is None else check_timeout(timeout_s)
        if stream:
            return TokenStream(self._client.start(request), limit, self._loop)
        return self._run(self._client.complete(request, limit))

    def tokenize(self, prompt: str | Sequence[ChatLike], *, model: str | None = None) -> Tokenization:
        """Token ids of a text, or of a chat with the model's template around it."""
        return self._run(self._client.tokenize(prompt, model=model))

    def models(self) -> tuple[ModelRow, ...]:
        """Registered models."""
        return self._run(self._client.models())

    def status(self) -> StatusReply:
        """Version, served models with their pages and counters, and the daemon's processes."""
        return self._run(self._client.status())

    def ps(self) -> tuple[SeqRow, ...]:
        """Live sequences of this user; of all users for root and the daemon's own user."""
        return self._run(self._client.ps())

    def kill(self, rid: int) -> None:
        """End a sequence; raises `NotFound` if it is not yours or not there."""
        self._run(self._client.kill(rid))

    def close(self) -> None:
        """Leave: unfinished requests of this client fail with `Unavailable`, and their sequences are cancelled.

        Idempotent.
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

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if not self._finalizer.alive:
            coroutine.close()
            self._check_open()
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise Unavailable("the client was closed") from None
        finally:
            future.cancel()  # after Ctrl-C: nobody waits, so the sequence is cancelled too


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
