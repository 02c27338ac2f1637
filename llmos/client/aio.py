"""`AsyncClient`: the SDK on asyncio. Connects when it is first used, and again after the gateway was restarted.

    async with AsyncClient() as client:
        answer = await client.generate("Once upon a time", max_tokens=64)
        async for chunk in client.generate("Once upon a time", stream=True):
            print(chunk.text, end="")

Two sockets: `client` carries requests and tokens, `client-control` carries everything else (ps, kill,
nice, suspend, status, tenants, ...), which therefore never queues behind tokens.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

from llmos.client._core import AckCounter
from llmos.client.connection import Connection, Submission
from llmos.client.prompts import ChatLike, GenerateRequest, PromptLike, generate_request, tokenize_request
from llmos.client.stream import AsyncTokenStream, Start
from llmos.client.types import Chunk, Completion, Tokenization
from llmos.client.verbs import (
    explain_request,
    kill_request,
    nice_request,
    resume_request,
    suspend_request,
    tenant_set_request,
)
from llmos.errors import InvalidRequest, LlmosError, RequestTimeout, Unavailable
from llmos.ports.endpoint import RunDir, default_run_dir
from llmos.protocol.codec import unpack_i32
from llmos.protocol.messages import (
    Done,
    Explained,
    Killed,
    Message,
    ModelRow,
    ModelsGet,
    ModelsReply,
    PsGet,
    PsReply,
    SeqRow,
    StatusGet,
    StatusReply,
    TenantRow,
    TenantsGet,
    TenantsReply,
    Tokenized,
)
from llmos.protocol.params import SamplingParams

_CALL_TIMEOUT_S = 30.0  # everything but generate; the gateway itself gives up on its services earlier


class AsyncClient:
    """A client of one llmosd.

    `model` and `timeout_s` are defaults for its calls; `timeout_s` None = generations may take for ever.
    """

    def __init__(
        self, run_dir: str | Path | None = None, model: str | None = None, timeout_s: float | None = None
    ) -> None:
        self.run_dir = RunDir(run_dir if run_dir is not None else default_run_dir())
        self.model = model
        self.timeout_s = check_timeout(timeout_s)
        self._connections: dict[str, Connection] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._closed = False

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
    ) -> Coroutine[Any, Any, Completion]: ...

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
    ) -> AsyncTokenStream: ...

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
    ) -> Coroutine[Any, Any, Completion] | AsyncTokenStream:
        """Continue `prompt`: a str is plain text, a list of `{"role", "content"}` is a chat, a list of ints is token
        ids.

        Keyword arguments that are not listed are fields of `SamplingParams` and win over `params`. Await the result,
        or with `stream=True` iterate over it. Bad arguments raise `InvalidRequest` at once.

        `nice`: 19 waits for everybody, -20 (below 0: administrators) for nobody. `deadline_s`: a sequence that still waits
        this many seconds from now fails with `SequenceFailed`; one that can not be done by then is refused.
        """
        request = generate_request(prompt, model or self.model, params, client_request_id, sampling, nice, deadline_s)
        limit = self.timeout_s if timeout_s is None else check_timeout(timeout_s)
        if stream:
            return AsyncTokenStream(self.start(request), limit)
        return self.complete(request, limit)

    def start(self, request: GenerateRequest) -> Start:
        """A function that submits `request` on the running loop (shared with the blocking client)."""

        async def submit(sink: Callable[[Any], None]) -> Submission:
            return Submission(await self._connection("client"), request, sink)

        return submit

    async def complete(self, request: GenerateRequest, timeout_s: float | None) -> Completion:
        """Submit and collect (shared with the blocking client)."""
        items: asyncio.Queue[Any] = asyncio.Queue()
        acks = AckCounter()
        submission: Submission | None = None
        try:
            async with asyncio.timeout(timeout_s):
                submission = await self.start(request)(items.put_nowait)
                while isinstance(item := await items.get(), Chunk):
                    if (upto := acks.read(len(item.token_ids))) is not None:
                        submission.acknowledge(upto)
        except TimeoutError:
            raise RequestTimeout(f"the answer did not end within {timeout_s:g} s", field="timeout_s") from None
        finally:
            if submission is not None:
                submission.cancel()
        if isinstance(item, LlmosError):
            raise item
        assert isinstance(item, Completion), item
        return item

    async def tokenize(self, prompt: str | Sequence[ChatLike], *, model: str | None = None) -> Tokenization:
        """Token ids of a text, or of a chat with the model's template around it."""
        reply = await self._call("client", tokenize_request(prompt, model or self.model), Tokenized)
        return Tokenization(reply.model, tuple(unpack_i32(reply.token_ids)), reply.pieces)

    async def models(self) -> tuple[ModelRow, ...]:
        """Registered models."""
        reply: ModelsReply = await self._call("client-control", ModelsGet, ModelsReply)
        return reply.models

    async def status(self) -> StatusReply:
        """Version, served models with their pages and counters, and the daemon's processes."""
        reply: StatusReply = await self._call("client-control", StatusGet, StatusReply)
        return reply

    async def ps(self) -> tuple[SeqRow, ...]:
        """Live sequences of this user; of all users for root and the daemon's own user."""
        reply: PsReply = await self._call("client-control", PsGet, PsReply)
        return reply.rows

    async def kill(self, rid: int) -> None:
        """End a sequence; raises `NotFound` if it is not yours or not there."""
        await self._call("client-control", kill_request(rid), Killed)

    async def nice(self, rid: int, value: int) -> None:
        """Change how urgent a live sequence is: -20 (first; below 0 is for administrators) to 19."""
        await self._call("client-control", nice_request(rid, value), Done)

    async def suspend(self, rid: int, keep_pages: bool = True) -> None:
        """Take a live sequence off the machine until `resume`; nothing is lost.

        Its pages stay until somebody else needs them; without `keep_pages` they are given back at once.
        """
        await self._call("client-control", suspend_request(rid, keep_pages), Done)

    async def resume(self, rid: int) -> None:
        """Let a suspended sequence go on."""
        await self._call("client-control", resume_request(rid), Done)

    async def explain(self, rid: int) -> Explained:
        """Where a live sequence's time went: queue, prefill, decode, preempted, suspended, client."""
        answer: Explained = await self._call("client-control", explain_request(rid), Explained)
        return answer

    async def tenants(self) -> tuple[TenantRow, ...]:
        """Limits and use of this user, one row per model; of all tenants for administrators."""
        reply: TenantsReply = await self._call("client-control", TenantsGet, TenantsReply)
        return reply.tenants

    async def set_tenant(
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
        values = {
            "weight": weight,
            "max_pages": max_pages,
            "guaranteed_pages": guaranteed_pages,
            "max_running": max_running,
            "max_waiting": max_waiting,
            "tokens_per_s": tokens_per_s,
        }
        reply: TenantsReply = await self._call("client-control", tenant_set_request(name, values), TenantsReply)
        return reply.tenants

    async def close(self) -> None:
        """Leave: unfinished requests of this client fail with `Unavailable`, and their sequences are cancelled."""
        self._closed = True
        for connection in self._connections.values():
            connection.close(Unavailable("the client was closed"))
        self._connections.clear()
        await asyncio.sleep(0)  # let the connections' cancelled tasks end

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, socket: str, build: Callable[[int], Message], expected: type[Message]) -> Any:
        limit = _CALL_TIMEOUT_S if self.timeout_s is None else self.timeout_s
        return await (await self._connection(socket)).call(build, expected, limit)

    async def _connection(self, socket: str) -> Connection:
        """The open connection to a socket, made now if there is none."""
        async with self._locks.setdefault(socket, asyncio.Lock()):
            if self._closed:
                raise Unavailable("the client is closed")
            found = self._connections.get(socket)
            if found is None or found.closed:
                found = Connection(self.run_dir, socket)
                await found.open(f"{os.path.basename(sys.argv[0] or 'python')[:64]}")
                self._connections[socket] = found
            return found


def check_timeout(timeout_s: float | None) -> float | None:
    """Refuse what can not be a time limit."""
    if timeout_s is not None and not (isinstance(timeout_s, (int, float)) and timeout_s > 0):
        raise InvalidRequest(f"timeout_s: {timeout_s!r} is not a positive number of seconds", field="timeout_s")
    return timeout_s
