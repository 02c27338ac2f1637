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
from llmos.protocol.messages import Explained, ModelRow, SeqRow, StatusReply, TenantRow
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
        nice: int = 0,
        deadline_s: float | None = None,
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
        nice: int = 0,
        deadline_s: float | None = None,
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
        nice: int = 0,
        deadline_s: float | None = None,
        **sampling: Any,
    ) -> Completion | TokenStream:
        """Continue `prompt`: a str is plain text, a list of `{"role", "content"}` is a chat, a list of ints is token
        ids.

        Keyword arguments that are not listed are fields of `SamplingParams` and win over `params`. With `stream=True`
        the result is an iterator over chunks that cancels the sequence when it is left early.

        `nice`: 19 waits for everybody, -20 (below 0: administrators) for nobody. `deadline_s`: a sequence that still waits
        this many seconds from now fails with `SequenceFailed`; one that can not be done by then is refused.
        """
        self._check_open()
        request = generate_request(
            prompt, model or self._client.model, params, client_request_id, sampling, nice, deadline_s
        )
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

    def nice(self, rid: int, value: int) -> None:
        """Change how urgent a live sequence is: -20 (first; below 0 is for administrators) to 19."""
        self._run(self._client.nice(rid, value))

    def suspend(self, rid: int, keep_pages: bool = True) -> None:
        """Take a live sequence off the machine until `resume`; nothing is lost.

        Its pages stay until somebody else needs them; without `keep_pages` they are given back at once.
        """
        self._run(self._client.suspend(rid, keep_pages))

    def resume(self, rid: int) -> None:
        """Let a suspended sequence go on."""
        self._run(self._client.resume(rid))

    def explain(self, rid: int) -> Explained:
        """Where a live sequence's time went: queue, prefill, decode, preempted, suspended, client."""
        return self._run(self._client.explain(rid))

    def tenants(self) -> tuple[TenantRow, ...]:
        """Limits and use of this user, one row per model; of all tenants for administrators."""
        return self._run(self._client.tenants())

    def set_tenant(
        self,
        name: str,
        *,
        weight: float | None = None,
        max_pages: int | None = None,
        guaranteed_pages: int | None = None,
        max_running: int | None = None,
        max_waiting: int | None = None,
        tokens_per_s: float | None = None,
    ) -> tuple[TenantRow, ...]:
        """Change a tenant's limits on every model, for administrators; None leaves a value as it is.

        2147483647 = unlimited; `tokens_per_s` 0 = no limit. Returns the tenant's rows as they are now.
        """
        return self._run(
            self._client.set_tenant(
                name,
                weight=weight,
                max_pages=max_pages,
                guaranteed_pages=guaranteed_pages,
                max_running=max_running,
                max_waiting=max_waiting,
                tokens_per_s=tokens_per_s,
            )
        )

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
