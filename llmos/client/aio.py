"""`AsyncClient`: the SDK on asyncio. Connects when it is first used. When a connection is lost it makes a new one and goes on where it
was: callers notice a pause.

    async with AsyncClient() as client:
        answer = await client.generate("Once upon a time", max_tokens=64)
        async for chunk in client.generate("Once upon a time", stream=True):
            print(chunk.text, end="")
        async with await client.spawn("Once upon a time") as seq:
            kids = await seq.fork(4)

What a sequence can do is in `asequence.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack, overload

from llmos.client.asequence import AsyncSequence, unknown
from llmos.client.encodings import (
    classification,
    embed_request,
    embedding,
    encode_all,
    is_one,
    likelihood,
    one_score,
)
from llmos.client.link import OnOutage
from llmos.client.options import (
    ChatLike,
    EncodeOptions,
    GenerateOptions,
    PageWord,
    PromptLike,
    SampleOptions,
    ScoringOptions,
    SequenceLike,
    SpawnOptions,
    TokensLike,
)
from llmos.client.output import Output
from llmos.client.place import find_place
from llmos.client.requests import generate_request, identified, spawn_request, tokenize_request
from llmos.client.samples import draw_samples
from llmos.client.stream import AsyncTokenStream
from llmos.client.types import Classification, Completion, Embedding, Likelihood, Tokenization
from llmos.client.verbs import kill_request, tenant_set_request
from llmos.client.wire import CONTROL, DATA, RECONNECT_S, Build, Wire
from llmos.protocol import limits
from llmos.protocol.codec import unpack_i32
from llmos.protocol.messages import (
    Done,
    Embedded,
    Explained,
    Killed,
    LaneMeasures,
    MeasuresGet,
    MeasuresReply,
    ModelRow,
    ModelsGet,
    ModelsReply,
    PsGet,
    PsReply,
    RecordWrite,
    RecordWritten,
    RestartService,
    SeqRow,
    Spawned,
    StatusGet,
    StatusReply,
    TenantRow,
    TenantsGet,
    TenantsReply,
    Tokenized,
)


class AsyncClient:
    """A client of one llmosd.

    `url`: "tcp://HOST:PORT", with `key` and `server_key`, or the run directory of a daemon on this machine. What is None comes from the
    environment (LLMOS_URL, LLMOS_KEY, LLMOS_SERVER_KEY); without LLMOS_URL it is this machine's daemon.
    `model` and `timeout_s` are defaults for its calls; `timeout_s` None = generations may take for ever. `reconnect_s`: how long a lost
    connection is waited for, 0 = not at all. `on_outage` is called with the reason when that waiting begins, and with None when it
    is over; it must not block.
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
        self.model = model
        self._wire = Wire(find_place(url, key, server_key), timeout_s, reconnect_s, on_outage)

    @overload
    def generate(
        self, prompt: PromptLike, *, stream: Literal[False] = False, **options: Unpack[GenerateOptions]
    ) -> Coroutine[Any, Any, Completion]: ...

    @overload
    def generate(
        self, prompt: PromptLike, *, stream: Literal[True], **options: Unpack[GenerateOptions]
    ) -> AsyncTokenStream: ...

    def generate(
        self, prompt: PromptLike, *, stream: bool = False, **options: Unpack[GenerateOptions]
    ) -> Coroutine[Any, Any, Completion] | AsyncTokenStream:
        """Continue `prompt`: a str is plain text, a list of `{"role", "content"}` is a chat, a list of ints is token
        ids.

        Options: the fields of `SamplingParams`, which win over `params=`; `model`; `nice`: 19 waits for everybody, -20 (below 0:
        administrators) for nobody; `deadline_s`: a sequence that still waits this many seconds from now fails with
        `SequenceFailed`, one that can not be done by then is refused; `timeout_s`: the longest time for the whole answer;
        `parent`: the sequence whose job it belongs to; `after`: the sequences that have to end well before it begins;
        `client_request_id`.

        Await the result, or with `stream=True` iterate over it; leaving early cancels the sequence. Bad arguments raise
        `InvalidRequest` at once.
        """
        output = self._output(prompt, options)
        return AsyncTokenStream(output, self.sequence) if stream else output.collect()

    async def spawn(self, prompt: PromptLike | None = None, **options: Unpack[SpawnOptions]) -> AsyncSequence:
        """An open sequence: its tokens are computed at once, then it rests until it is told to generate.

        Without a prompt it begins with the first `append`. Options: `model`, `nice`, `parent`, `after`, `client_request_id`, as in
        `generate`. It ends by `close`, `kill` or when nobody used it for too long.
        """
        build = identified(spawn_request(prompt, self.model, options), _new_id())
        reply = await self._wire.call(DATA, build, Spawned)
        lengths = self._wire.lengths
        lengths.enter(reply.rid, lengths.change(reply.rid), reply.num_tokens)
        return AsyncSequence(self._wire, reply.rid, reply.model)

    def sequence(self, rid: SequenceLike) -> AsyncSequence:
        """A handle to any sequence, by number. Whether it is there, its first verb will tell."""
        return AsyncSequence(self._wire, rid)

    async def samples(self, prompt: PromptLike, n: int, **options: Unpack[SampleOptions]) -> list[Completion]:
        """`n` answers to one prompt, made together; the prompt is computed once. Options as in `generate`.

        With `seed`, answer i is made with `seed + i`. If one fails, all end.
        """
        return await draw_samples(self, prompt, n, options)

    @overload
    async def embed(  # type: ignore[overload-overlap]  # a str is one text, though also an iterable of them
        self, texts: TokensLike, **options: Unpack[EncodeOptions]
    ) -> Embedding: ...

    @overload
    async def embed(self, texts: Iterable[TokensLike], **options: Unpack[EncodeOptions]) -> list[Embedding]: ...

    async def embed(
        self, texts: TokensLike | Iterable[TokensLike], **options: Unpack[EncodeOptions]
    ) -> Embedding | list[Embedding]:
        """What an encoder model makes of a text (or its token ids), or of each of several.

        Options: `model`, `nice`, `parent`, `after`, `client_request_id` (of one text), `deadline_s`, `timeout_s` as in `generate`;
        `truncate`: cut a text that is too long for the model instead of refusing it.
        """
        found = [embedding(answer) for answer in await self._encode(texts, options)]
        return found[0] if is_one(texts) else found

    async def classify(self, texts: str | Iterable[str], **options: Unpack[EncodeOptions]) -> list[Classification]:
        """Scores of a classification model for one text or several; a list in both cases. Options as in `embed`."""
        return [classification(answer) for answer in await self._encode(texts, options)]

    async def score(self, query: str, texts: Iterable[str], **options: Unpack[EncodeOptions]) -> list[float]:
        """How well each of `texts` goes with `query`, by a model that reads both together (a cross-encoder, with one class). Options
        as in `embed`."""
        requests = [embed_request(query, text, self.model, options) for text in texts]
        answers = await encode_all(self._wire, requests, self._wire.limit(options.get("timeout_s")))
        return [one_score(answer) for answer in answers]

    async def loglikelihood(
        self, text: TokensLike, continuation: str | None = None, **options: Unpack[ScoringOptions]
    ) -> Likelihood:
        """How likely a generating model finds `text`; with a `continuation`, how likely it finds that behind `text`.

        Nothing is generated. Options: `model`, `nice`, `parent`, `after`, `client_request_id`, `deadline_s`, `timeout_s`.
        """
        return await likelihood(self, text, continuation, options)

    async def kill(
        self,
        rid: SequenceLike | None = None,
        *,
        tenant: str | None = None,
        job: SequenceLike | None = None,
        model: str | None = None,
    ) -> tuple[int, ...]:
        """End one sequence, or all that match every selector given; returns the numbers of those ended.

        `job`: any sequence of it. Raises `NotFound` if the sequence or job is not yours or not there. If the connection is lost on
        the way, a kill by selector raises `Unavailable`: whether it was done is not known.
        """
        build = kill_request(rid, tenant, job, model)
        if rid is not None and tenant is None and job is None and model is None:
            return (await self.sequence(rid)._kill(build)).rids
        reply = await self._wire.call(CONTROL, build, Killed, unknown("sequences were killed"))
        return reply.rids

    async def nice(self, rid: SequenceLike, value: int) -> None:
        """The same as `sequence(rid).nice(value)`."""
        await self.sequence(rid).nice(value)

    async def suspend(self, rid: SequenceLike, pages: PageWord = "keep") -> None:
        """The same as `sequence(rid).suspend(pages)`."""
        await self.sequence(rid).suspend(pages)

    async def resume(self, rid: SequenceLike) -> None:
        """The same as `sequence(rid).resume()`."""
        await self.sequence(rid).resume()

    async def explain(self, rid: SequenceLike) -> Explained:
        """The same as `sequence(rid).explain()`."""
        return await self.sequence(rid).explain()

    async def tokenize(self, prompt: str | Sequence[ChatLike], *, model: str | None = None) -> Tokenization:
        """Token ids of a text, or of a chat with the model's template around it."""
        reply = await self._wire.call(DATA, tokenize_request(prompt, model or self.model), Tokenized)
        return Tokenization(reply.model, tuple(unpack_i32(reply.token_ids)), reply.pieces)

    async def models(self) -> tuple[ModelRow, ...]:
        """Registered models."""
        return (await self._wire.call(CONTROL, ModelsGet, ModelsReply)).models

    async def status(self) -> StatusReply:
        """Version, served models with their pages and counters, and the daemon's processes."""
        return await self._wire.call(CONTROL, StatusGet, StatusReply)

    async def measures(self) -> tuple[LaneMeasures, ...]:
        """Histograms of each served model: time in the queue, to the first token, between tokens, of steps; and how outputs ended."""
        return (await self._wire.call(CONTROL, MeasuresGet, MeasuresReply)).lanes

    async def ps(self) -> tuple[SeqRow, ...]:
        """Live sequences of this user; of all users for root and the daemon's own user."""
        return (await self._wire.call(CONTROL, PsGet, PsReply)).rows

    async def tenants(self) -> tuple[TenantRow, ...]:
        """Limits and use of this user, one row per model; of all tenants for administrators."""
        return (await self._wire.call(CONTROL, TenantsGet, TenantsReply)).tenants

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
        return (await self._wire.call(CONTROL, tenant_set_request(name, values), TenantsReply)).tenants

    async def write_record(self) -> RecordWritten:
        """Write the flight recorder to a file beside the daemon's state, for administrators; says where."""
        return await self._wire.call(CONTROL, RecordWrite, RecordWritten)

    async def restart_service(self, name: str) -> None:
        """Let llmosd end a service's process and start another one, for administrators; what runs goes on. Returns when llmosd was told;
        `status` shows when it is done. Raises `NotFound` with the names there are."""

        async def ended() -> Done | None:
            return Done(0, 0) if name == "gateway" else None  # its end may be faster than its answer

        await self._wire.call(CONTROL, lambda req: RestartService(req, name), Done, ended)

    async def close(self) -> None:
        """Leave: unfinished requests of this client fail with `Unavailable`. Sequences made by `generate` are cancelled, open ones
        live on."""
        await self._wire.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _encode(self, texts: Any, options: EncodeOptions) -> list[Embedded]:
        each = [texts] if is_one(texts) else list(texts)
        requests = [embed_request(text, None, self.model, options) for text in each]
        return await encode_all(self._wire, requests, self._wire.limit(options.get("timeout_s")))

    def _output(self, prompt: PromptLike, options: GenerateOptions) -> Output:
        build = identified(generate_request(prompt, self.model, options), _new_id())

        async def prepare() -> Build:
            return build

        limit = self._wire.limit(options.get("timeout_s"))
        return Output(wire=self._wire, prepare=prepare, timeout_s=limit, owned=True)


def _new_id() -> str:
    """What a request that brings no `client_request_id` is known by if it has to be asked for again."""
    return f"{limits.MADE_UP_REQUEST_ID}{secrets.token_hex(16)}"
