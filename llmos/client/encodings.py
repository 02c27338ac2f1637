"""What encoders are asked for, and prompts that are only scored: `embed`, `classify`, `score`, `loglikelihood`.

Each text is a request, and so a sequence, of its own: they are scheduled, counted and recomputed like others. At most `_AT_ONCE` of a
call are on their way at a time.
"""

from __future__ import annotations

import asyncio
import secrets
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from llmos.client.checked import checked_deadline_ms, utf8_size
from llmos.client.options import EncodeOptions, ScoringOptions
from llmos.client.prompts import parse_tokens
from llmos.client.requests import placement, request_id
from llmos.client.sampling import refuse_unknown
from llmos.client.types import Classification, Embedding, Likelihood
from llmos.client.wire import DATA, Build, Wire
from llmos.errors import InvalidRequest, ProtocolError
from llmos.protocol import limits
from llmos.protocol.messages import Embed, Embedded

if TYPE_CHECKING:
    from llmos.client.aio import AsyncClient

_AT_ONCE = 128


def embed_request(text: Any, second: Any, model: str | None, options: Mapping[str, Any]) -> Embed:
    """Checked; it only lacks its number."""
    refuse_unknown(options, EncodeOptions.__optional_keys__)
    words, token_ids = parse_tokens(text, "text")
    if second is not None:
        if not isinstance(second, str):
            raise InvalidRequest(f"second: expected a str, got {type(second).__name__}", field="second")
        utf8_size("second", second)
    truncate = options.get("truncate", False)
    if not isinstance(truncate, bool):
        raise InvalidRequest(f"truncate: expected a bool, got {type(truncate).__name__}", field="truncate")
    name, nice, parent, after = placement(model, options)
    given = request_id(options)
    key = f"{limits.MADE_UP_REQUEST_ID}{secrets.token_hex(16)}" if given is None else given
    deadline_ms = checked_deadline_ms(options.get("deadline_s"))
    return Embed(0, name, words, token_ids, second, truncate, key, nice, deadline_ms, parent, after)


async def encode_all(wire: Wire, requests: Sequence[Embed], timeout_s: float | None) -> list[Embedded]:
    """All answers in their order; the first failure ends the rest."""
    slots = asyncio.Semaphore(_AT_ONCE)

    def build(request: Embed) -> Build:
        return lambda req: msgspec.structs.replace(request, req=req)

    async def one(request: Embed) -> Embedded:
        async with slots:
            return await wire.wait(DATA, build(request), Embedded, timeout_s)

    tasks = [asyncio.ensure_future(one(request)) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def is_one(texts: Any) -> bool:
    """A text or its token ids, not several of these."""
    if isinstance(texts, str):
        return True
    if isinstance(texts, (bytes, Mapping)) or not isinstance(texts, Iterable):
        raise InvalidRequest(f"texts: expected a str or several, got {type(texts).__name__}", field="texts")
    return isinstance(texts, Sequence) and len(texts) > 0 and isinstance(texts[0], int)


def embedding(answer: Embedded) -> Embedding:
    return Embedding(answer.rid, answer.model, _numbers(answer), answer.usage)


def classification(answer: Embedded) -> Classification:
    scores = tuple(_numbers(answer))
    labels = answer.labels or tuple(str(index) for index in range(len(scores)))
    return Classification(answer.rid, answer.model, labels, scores, answer.usage)


def one_score(answer: Embedded) -> float:
    """The score of a pair, of a model with one class; of one with several, `classify` tells all."""
    values = _numbers(answer)
    if len(values) != 1:
        text = f"model {answer.model!r} has {len(values)} classes, a score needs one; use classify"
        raise InvalidRequest(text, field="model")
    return values[0]


def _numbers(answer: Embedded) -> array[float]:
    values = array("f")
    try:
        values.frombytes(answer.values)
    except ValueError:
        raise ProtocolError(f"{len(answer.values)} bytes are not float32", field="values", rid=answer.rid) from None
    return values


async def likelihood(client: AsyncClient, text: Any, continuation: Any, options: Mapping[str, Any]) -> Likelihood:
    """The prompt's own log-probabilities; with a `continuation` only its tokens count, those behind the ones that `text` has alone."""
    refuse_unknown(options, ScoringOptions.__optional_keys__)
    whole, first = text, 1
    if continuation is not None:
        if not isinstance(text, str) or not isinstance(continuation, str):
            raise InvalidRequest("continuation: text and continuation must both be str", field="continuation")
        whole = text + continuation
        first = max(1, len(await client.tokenize(text, model=options.get("model")))) if text else 1
    answer = await client.generate(whole, max_tokens=0, prompt_logprobs=1, **options)  # type: ignore[typeddict-item]
    scored = answer.prompt_logprobs or ()
    return Likelihood(answer.rid, answer.model, scored, min(first, len(scored)), answer.usage)
