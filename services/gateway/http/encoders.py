"""POST /v1/embeddings, /rerank, /score, /classify: what encoder models make of texts. Each text is a sequence of its own.

/v1/embeddings is OpenAI's; the other three have the forms that other servers of such models have (Jina and Cohere for /rerank, vLLM for
/score and /classify), and stand under /v1, too. Scores are what the model's own activation makes of its numbers.
"""

from __future__ import annotations

import asyncio
import base64
import math
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from starlette.types import ASGIApp

from llmos.protocol import limits
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import Embed, Embedded
from llmos.services.gateway.http.bodies import decode, read_body
from llmos.services.gateway.http.context import Call, json_response
from llmos.services.gateway.http.failures import HttpError
from llmos.services.gateway.http.openai_answer import named
from llmos.services.gateway.http.requests import WITHOUT_EFFECT

MAX_TEXTS = 2048  # of one request, as OpenAI has it
_AT_ONCE = 64


class _Common(Struct, forbid_unknown_fields=True, kw_only=True):
    """`truncate`: cut a text that is too long instead of refusing it. `priority`: the nice value. Both are llmos's own."""

    model: str | None = None
    truncate: bool = False
    priority: Annotated[int, Meta(ge=limits.MIN_NICE, le=limits.MAX_NICE)] = 0


class EmbeddingsRequest(_Common, kw_only=True):
    """POST /v1/embeddings. `input`: a text, several, token ids, or several lists of these. `dimensions`: only so many numbers of each
    vector, made to a length of 1 again."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1)] | None = None


class Document(Struct, forbid_unknown_fields=True):
    text: str


class RerankRequest(_Common, kw_only=True):
    """POST /rerank. `top_n`: only so many, the best ones."""

    query: str
    documents: list[str | Document]
    top_n: Annotated[int, Meta(ge=1)] | None = None
    return_documents: bool = True


class ScoreRequest(_Common, kw_only=True):
    """POST /score: each of `text_1` with the one of `text_2` at the same place, or one with all."""

    text_1: str | list[str]
    text_2: str | list[str]


class ClassifyRequest(_Common, kw_only=True):
    """POST /classify."""

    input: str | list[str]


@dataclass(frozen=True, slots=True)
class Answers:
    """What came back, in order. `idle`: fields of the request that changed nothing."""

    each: list[Embedded]
    idle: tuple[str, ...]

    @property
    def usage(self) -> dict[str, int]:
        tokens = sum(answer.usage.prompt_tokens for answer in self.each)
        return {"prompt_tokens": tokens, "total_tokens": tokens}

    def response(self, body: dict[str, Any]) -> ASGIApp:
        found = {"model": self.each[0].model, "usage": self.usage} | body
        return json_response(found, {"llmos-no-effect": ", ".join(self.idle)} if self.idle else None)


async def embeddings(call: Call) -> ASGIApp:
    """Vectors of texts, by an embedding model."""
    asked, idle = decode(await read_body(call.request, call.site.max_body), EmbeddingsRequest, {}, WITHOUT_EFFECT)
    wanted = [Embed(0, asked.model, *form) for form in _inputs(asked.input)]
    answers = await _encode(call, asked, wanted, idle, "input")
    data = []
    for place, answer in enumerate(answers.each):
        vector = _cut(answer.values, asked.dimensions)
        shown: Any = base64.b64encode(vector).decode() if asked.encoding_format == "base64" else _numbers(vector)
        data.append({"object": "embedding", "index": place, "embedding": shown})
    return answers.response({"object": "list", "data": data})


async def rerank(call: Call) -> ASGIApp:
    """Documents by how well they go with a query, the best first; by a model that reads both together."""
    asked, idle = decode(await read_body(call.request, call.site.max_body), RerankRequest, {}, WITHOUT_EFFECT)
    texts = [each if isinstance(each, str) else each.text for each in asked.documents]
    wanted = [Embed(0, asked.model, asked.query, second=text) for text in texts]
    answers = await _encode(call, asked, wanted, idle, "query", "documents")
    ranked = sorted(enumerate(map(_score, answers.each)), key=lambda pair: -pair[1])
    results = [
        {"index": place, "relevance_score": score}
        | ({"document": {"text": texts[place]}} if asked.return_documents else {})
        for place, score in ranked[: asked.top_n]
    ]
    return answers.response({"id": f"rerank-{answers.each[0].rid}", "results": results})


async def score(call: Call) -> ASGIApp:
    """How well each pair of texts goes together; by a model that reads both."""
    asked, idle = decode(await read_body(call.request, call.site.max_body), ScoreRequest, {}, WITHOUT_EFFECT)
    first, second = ([each] if isinstance(each, str) else each for each in (asked.text_1, asked.text_2))
    if len(first) == 1:
        first = first * len(second)
    if len(second) == 1:
        second = second * len(first)
    if len(first) != len(second):
        text = f"text_2: {len(second)} texts for {len(first)} of text_1"
        raise HttpError(400, text, param="text_2", code="invalid_value")
    wanted = [Embed(0, asked.model, left, second=right) for left, right in zip(first, second)]
    answers = await _encode(call, asked, wanted, idle, "text_1", "text_2")
    data = [{"object": "score", "index": place, "score": _score(each)} for place, each in enumerate(answers.each)]
    return answers.response(_listed("score", answers) | {"data": data})


async def classify(call: Call) -> ASGIApp:
    """Scores of the classes of a classification model for each text."""
    asked, idle = decode(await read_body(call.request, call.site.max_body), ClassifyRequest, {}, WITHOUT_EFFECT)
    texts = [asked.input] if isinstance(asked.input, str) else asked.input
    answers = await _encode(call, asked, [Embed(0, asked.model, text) for text in texts], idle, "input")
    data = []
    for place, answer in enumerate(answers.each):
        probs = _numbers(answer.values)
        best = max(range(len(probs)), key=probs.__getitem__)
        label = answer.labels[best] if answer.labels else f"LABEL_{best}"
        data.append({"index": place, "label": label, "probs": probs, "num_classes": len(probs)})
    return answers.response(_listed("classify", answers) | {"data": data})


def _listed(prefix: str, answers: Answers) -> dict[str, Any]:
    return {"id": f"{prefix}-{answers.each[0].rid}", "object": "list", "created": int(time.time())}


async def _encode(
    call: Call, asked: _Common, wanted: Sequence[Embed], idle: tuple[str, ...], name: str, second: str = ""
) -> Answers:
    """All of them; the first failure ends the rest. `name` and `second`: what the caller calls the texts."""
    if not 0 < len(wanted) <= MAX_TEXTS:
        text = f"{second or name}: {len(wanted)} texts, allowed are 1 to {MAX_TEXTS}"
        raise HttpError(400, text, param=second or name, code="invalid_value")
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(text: Embed) -> Embedded:
        async with slots:
            return await call.session.ask(
                lambda req: Embed(
                    req, text.model, text.text, text.token_ids, text.second, asked.truncate, nice=asked.priority
                ),
                Embedded,
            )

    with named({"prompt": name, "second": second or name, "nice": "priority"}):
        tasks = [asyncio.ensure_future(one(text)) for text in wanted]
        try:
            return Answers(list(await asyncio.gather(*tasks)), idle)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _inputs(given: str | list[str | int | list[int]]) -> list[tuple[str | None, bytes | None]]:
    """(text, token ids) of each."""
    if isinstance(given, str):
        return [(given, None)]
    if given and all(isinstance(each, int) for each in given):
        return [(None, _packed(given))]
    if len({type(each) for each in given}) > 1:
        raise HttpError(400, "input: texts and token ids do not mix", param="input", code="invalid_type")
    return [(each, None) if isinstance(each, str) else (None, _packed(each)) for each in given]


def _packed(ids: Any) -> bytes:
    try:
        return pack_i32(array("i", ids))
    except (TypeError, OverflowError):
        text = "input: token ids are whole numbers from 0 on"
        raise HttpError(400, text, param="input", code="invalid_type") from None


def _numbers(values: bytes) -> list[float]:
    found = array("f")
    found.frombytes(values)
    return found.tolist()


def _cut(values: bytes, dimensions: int | None) -> bytes:
    if dimensions is None:
        return values
    size = len(values) // 4
    if dimensions > size:
        text = f"dimensions: {dimensions} is more than the {size} of this model"
        raise HttpError(400, text, param="dimensions", code="invalid_value")
    found = _numbers(values)[:dimensions]
    length = math.sqrt(sum(number * number for number in found)) or 1.0
    return array("f", (number / length for number in found)).tobytes()


def _score(answer: Embedded) -> float:
    found = _numbers(answer.values)
    if len(found) != 1:
        text = f"model {answer.model!r} has {len(found)} classes, a score needs one; use /classify"
        raise HttpError(400, text, param="model", code="invalid_value")
    return found[0]
