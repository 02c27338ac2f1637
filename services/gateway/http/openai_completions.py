"""POST /v1/completions: plain text and token ids go on; one prompt or a batch of them."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.types import ASGIApp

from llmos.protocol import limits
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import Detokenize, Detokenized, TokenLogprobs
from llmos.services.gateway.http.bodies import Refused, decode, read_body
from llmos.services.gateway.http.context import Call
from llmos.services.gateway.http.failures import HttpError, unsupported
from llmos.services.gateway.http.openai_answer import Answer, named, respond
from llmos.services.gateway.http.openai_output import finish_word, text_logprobs
from llmos.services.gateway.http.outputs import Collected, Output, Outputs
from llmos.services.gateway.http.requests import (
    WITHOUT_EFFECT,
    Sampling,
    Wish,
    names_of,
    nice_of,
    sampling_params,
    wishes,
)
from llmos.services.gateway.http.sse import Resume, read_resume

DEFAULT_MAX_TOKENS = 16  # OpenAI's
REFUSED = {
    "best_of": Refused("ask for n samples and choose", (None, 1)),
    "suffix": Refused("no model here fills gaps", (None, "")),
}
_TOKENS = 2**31


class CompletionRequest(Sampling, kw_only=True):
    """POST /v1/completions. `prompt`: a text, a list of texts, token ids, or a list of lists of token ids."""

    prompt: str | list[str | int | list[int]]
    max_tokens: Annotated[int, Meta(ge=0, le=limits.MAX_TOKENS)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=limits.MAX_LOGPROBS)] | None = None


async def completions(call: Call) -> ASGIApp:
    body = await read_body(call.request, call.site.max_body)
    asked, idle = decode(body, CompletionRequest, REFUSED, WITHOUT_EFFECT)
    scores = asked.logprobs if asked.echo else None
    if scores is not None and asked.stream:
        raise unsupported("echo", "the prompt's log-probabilities (echo with logprobs) do not come as a stream")
    max_tokens = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
    prompts = _prompts(asked.prompt)
    samples = asked.n or 1
    params = sampling_params(asked, max_tokens, asked.logprobs)
    if scores is not None or not max_tokens:
        params = msgspec.structs.replace(params, prompt_logprobs=scores or 0)
    wanted = wishes(call.request, asked.model, prompts, samples, params, nice_of(asked))
    resume = read_resume(call.request, len(wanted)) if asked.stream else Resume(int(time.time()))
    with named(names_of(asked)):
        echoed = [await _text(call, asked.model, prompt) for prompt in prompts] if asked.echo else []
        outputs = Outputs(call.session, wanted, samples, resume.places)
        answer = TextAnswer(call, outputs, resume.created, samples, with_logprobs=asked.logprobs is not None)
        answer.echoed = echoed
        return await respond(answer, resume, asked, idle)


def _prompts(prompt: str | list[str | int | list[int]]) -> list[Wish]:
    if isinstance(prompt, str):
        return [Wish(text=prompt)]
    if not prompt:
        raise HttpError(400, "prompt is empty", param="prompt", code="invalid_value")
    if isinstance(prompt[0], int):
        return [Wish(token_ids=_packed(prompt))]
    if len({type(each) for each in prompt}) > 1:
        raise HttpError(400, "prompt: texts and token ids do not mix", param="prompt", code="invalid_type")
    return [Wish(text=each) if isinstance(each, str) else Wish(token_ids=_packed(each)) for each in prompt]  # type: ignore[arg-type]


def _packed(ids: Sequence[Any]) -> bytes:
    try:
        return pack_i32(array("i", ids))
    except (TypeError, OverflowError):
        raise HttpError(
            400, "prompt: token ids are whole numbers from 0 on", param="prompt", code="invalid_type"
        ) from None


async def _text(call: Call, model: str | None, prompt: Wish) -> str:
    if prompt.text is not None:
        return prompt.text
    ids = prompt.token_ids or b""
    return (await call.session.ask(lambda req: Detokenize(req, model, ids), Detokenized)).text


class TextAnswer(Answer):
    """Its parts as /v1/completions has them. `echoed`: the text of each prompt, if it is to be repeated; with `logprobs` also those of
    its tokens, before those of the output."""

    prefix = "cmpl"
    kind = "text_completion"
    chunk_kind = "text_completion"
    echoed: Sequence[str] = ()

    def opening(self, output: Output) -> bytes:
        return self.piece(output, self._echo(output)) if self.echoed else b""

    def piece(self, output: Output, text: str, logprobs: bytes = b"null") -> bytes:
        return self._choice(output.index, msgspec.json.encode(text), logprobs)

    def end(self, output: Output) -> bytes:
        return self._choice(output.index, b'""', b"null", msgspec.json.encode(finish_word(output)))

    def logprobs(
        self, output: Output, ids: Sequence[int], given: Sequence[TokenLogprobs | None], table: dict[int, bytes]
    ) -> dict[str, Any]:
        found, output.chars = text_logprobs(ids, given, table, output.chars)
        return found

    async def _whole_logprobs(self, whole: Collected) -> dict[str, Any] | None:
        if self.with_logprobs and self.echoed:
            whole.ids[:0] = [token for token, _ in whole.output.scored]
            whole.logprobs[:0] = [logprobs for _, logprobs in whole.output.scored]
        return await super()._whole_logprobs(whole)

    def choice(self, whole: Collected, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "index": whole.output.index,
            "text": self._echo(whole.output) + "".join(whole.text),
            "logprobs": logprobs,
            "finish_reason": finish_word(whole.output),
        }

    def _echo(self, output: Output) -> str:
        return self.echoed[output.index // self.samples] if self.echoed else ""

    def _choice(self, index: int, text: bytes, logprobs: bytes = b"null", reason: bytes = b"null") -> bytes:
        fields = (self.head, text, index, logprobs, reason, self.tail)
        return b'data: %b,"choices":[{"text":%b,"index":%d,"logprobs":%b,"finish_reason":%b}]%b' % fields
