"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct
from starlette.types import ASGIApp

from llmos.protocol import limits
from llmos.protocol.messages import ChatMessage, TokenLogprobs
from llmos.services.gateway.http.bodies import Refused, decode, read_body
from llmos.services.gateway.http.context import Call
from llmos.services.gateway.http.failures import HttpError, unsupported
from llmos.services.gateway.http.openai_answer import Answer, named, respond
from llmos.services.gateway.http.openai_output import chat_logprobs, finish_word
from llmos.services.gateway.http.outputs import Collected, Output, Outputs
from llmos.services.gateway.http.requests import (
    LATER,
    WITHOUT_EFFECT,
    Sampling,
    Wish,
    names_of,
    nice_of,
    sampling_params,
    wishes,
)
from llmos.services.gateway.http.sse import Resume, read_resume

REFUSED = {
    "tools": Refused("tool calls are to come", (None, [])),
    "tool_choice": Refused("tool calls are to come", (None, "none", "auto")),
    "parallel_tool_calls": Refused("tool calls are to come", (None, True, False)),
    "functions": Refused("use tools", (None, [])),
    "function_call": Refused("use tools", (None, "none", "auto")),
    "response_format": Refused("structured output is to come", (None, {"type": "text"})),
    "modalities": Refused("there is only text", (None, ["text"])),
    "audio": LATER,
    "prediction": LATER,
    "web_search_options": LATER,
    "reasoning_effort": Refused("no model here has such a setting", (None, "none")),
    "verbosity": Refused("no model here has such a setting", (None, "medium")),
    "store": Refused("answers are not stored; /v1/responses keeps them for a while", (None, False)),
}
ROLES = ("system", "developer", "user", "assistant")


class TextPart(Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Text; other kinds of parts are refused."""

    text: str


class Message(Struct, forbid_unknown_fields=True):
    """One message of the conversation."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    audio: None = None
    annotations: list[Any] | None = None
    function_call: None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None


class ChatRequest(Sampling, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=limits.MAX_CHAT_MESSAGES)]
    max_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=limits.MAX_LOGPROBS)] | None = None


async def chat_completions(call: Call) -> ASGIApp:
    body = await read_body(call.request, call.site.max_body)
    asked, idle = decode(body, ChatRequest, REFUSED, WITHOUT_EFFECT)
    params = sampling_params(asked, _max_tokens(asked), _logprobs(asked))
    prompt = Wish(messages=tuple(chat_message(message, place) for place, message in enumerate(asked.messages)))
    samples = asked.n or 1
    wanted = wishes(call.request, asked.model, [prompt], samples, params, nice_of(asked))
    resume = read_resume(call.request, len(wanted)) if asked.stream else Resume(int(time.time()))
    outputs = Outputs(call.session, wanted, samples, resume.places)
    answer = ChatAnswer(call, outputs, resume.created, samples, with_logprobs=bool(asked.logprobs))
    answer.tier = asked.service_tier or "default"
    with named(names_of(asked)):
        return await respond(answer, resume, asked, idle)


def chat_message(message: Message, place: int) -> ChatMessage:
    """As the microkernel's side of the world has it; raises 400 for what it can not say."""
    for name in ("name", "tool_calls", "tool_call_id"):
        if getattr(message, name):
            raise unsupported(f"messages[{place}].{name}", "the chat templates are given role and content only")
    if message.role not in ROLES:
        text = f"messages[{place}].role: {message.role!r:.40} is none of {', '.join(ROLES)}"
        raise HttpError(400, text, param=f"messages[{place}].role", code="invalid_value")
    content = message.content
    if content is None:
        raise HttpError(
            400, f"messages[{place}].content is missing", param=f"messages[{place}].content", code="invalid_value"
        )
    return ChatMessage(message.role, content if isinstance(content, str) else "".join(part.text for part in content))


def _max_tokens(asked: ChatRequest) -> int | None:
    if None not in (asked.max_tokens, asked.max_completion_tokens):
        text = "max_tokens and max_completion_tokens mean the same: give one of them"
        raise HttpError(400, text, param="max_completion_tokens", code="invalid_value")
    return asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens


def _logprobs(asked: ChatRequest) -> int | None:
    if asked.top_logprobs is not None and not asked.logprobs:
        raise HttpError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    return (asked.top_logprobs or 0) if asked.logprobs else None


class ChatAnswer(Answer):
    """Its parts as /v1/chat/completions has them."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    tier = "default"

    def opening(self, output: Output) -> bytes:
        return self._delta(output.index, b'{"role":"assistant","content":"","refusal":null}')

    def piece(self, output: Output, text: str, logprobs: bytes = b"null") -> bytes:
        return self._delta(output.index, b'{"content":%b}' % msgspec.json.encode(text), logprobs)

    def end(self, output: Output) -> bytes:
        return self._delta(output.index, b"{}", b"null", msgspec.json.encode(finish_word(output)))

    def logprobs(
        self, output: Output, ids: Sequence[int], given: Sequence[TokenLogprobs | None], table: dict[int, bytes]
    ) -> dict[str, Any]:
        return chat_logprobs(ids, given, table)

    def choice(self, whole: Collected, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "index": whole.output.index,
            "message": {"role": "assistant", "content": "".join(whole.text), "refusal": None},
            "logprobs": logprobs,
            "finish_reason": finish_word(whole.output),
        }

    def more(self) -> dict[str, Any]:
        return {"service_tier": self.tier}

    def _delta(self, index: int, delta: bytes, logprobs: bytes = b"null", reason: bytes = b"null") -> bytes:
        fields = (self.head, index, delta, logprobs, reason, self.tail)
        return b'data: %b,"choices":[{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}]%b' % fields
