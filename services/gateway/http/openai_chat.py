"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.types import ASGIApp

from llmos.protocol import limits
from llmos.protocol.messages import TokenLogprobs, Tokens
from llmos.services.gateway.http.bodies import Refused, decode, read_body
from llmos.services.gateway.http.chat_input import (
    JsonFormat,
    Message,
    NamedChoice,
    SchemaFormat,
    TextFormat,
    ToolField,
    chat_messages,
    grammar_of,
    tools_of,
)
from llmos.services.gateway.http.context import Call
from llmos.services.gateway.http.failures import HttpError, unsupported
from llmos.services.gateway.http.openai_answer import Answer, named, respond
from llmos.services.gateway.http.openai_output import chat_logprobs, finish_word
from llmos.services.gateway.http.outputs import Collected, Output, Outputs, Piece
from llmos.services.gateway.http.requests import (
    LATER,
    NO_TOOLS,
    WITHOUT_EFFECT,
    Sampling,
    Wish,
    names_of,
    nice_of,
    sampling_params,
    wishes,
)
from llmos.services.gateway.http.sse import Marks, Resume, read_resume
from llmos.services.gateway.http.tool_calls import CallReader, merged

REFUSED = {
    "functions": Refused("use tools", (None, [])),
    "function_call": Refused("use tools", (None, "none", "auto")),
    "modalities": Refused("there is only text", (None, ["text"])),
    "audio": LATER,
    "prediction": LATER,
    "web_search_options": LATER,
    "reasoning_effort": Refused("no model here has such a setting", (None, "none")),
    "verbosity": Refused("no model here has such a setting", (None, "medium")),
    "store": Refused("answers are not stored; /v1/responses keeps them for a while", (None, False)),
}


class ChatRequest(Sampling, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=limits.MAX_CHAT_MESSAGES)]
    max_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=limits.MAX_LOGPROBS)] | None = None
    response_format: TextFormat | JsonFormat | SchemaFormat | None = None
    tools: list[ToolField] | None = None
    tool_choice: str | NamedChoice | None = None
    parallel_tool_calls: bool | None = None


async def chat_completions(call: Call) -> ASGIApp:
    body = await read_body(call.request, call.site.max_body)
    asked, idle = decode(body, ChatRequest, REFUSED, WITHOUT_EFFECT)
    params = sampling_params(asked, _max_tokens(asked), _logprobs(asked), grammar_of(asked.response_format))
    tools = tools_of(asked.tools, asked.tool_choice, asked.parallel_tool_calls)
    if tools.tools and asked.logprobs:
        raise unsupported("logprobs", "not together with tools: text that is a call has no tokens of its own")
    prompt = Wish(messages=chat_messages(asked.messages))
    samples = asked.n or 1
    wanted = wishes(call.request, asked.model, [prompt], samples, params, nice_of(asked), tools)
    resume = read_resume(call.request, len(wanted)) if asked.stream else Resume(int(time.time()))
    outputs = Outputs(call.session, wanted, samples, resume.places, from_start=bool(tools.tools))
    answer = ChatAnswer(call, outputs, resume.created, samples, with_logprobs=bool(asked.logprobs))
    answer.tier = asked.service_tier or "default"
    answer.tools = tools
    with named(names_of(asked)):
        return await respond(answer, resume, asked, idle)


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
    tools = NO_TOOLS
    _readers: dict[int, CallReader] | None = None

    def opening(self, output: Output) -> bytes:
        return self._delta(output.index, b'{"role":"assistant","content":"","refusal":null}')

    def piece(self, output: Output, text: str, logprobs: bytes = b"null") -> bytes:
        return self._delta(output.index, b'{"content":%b}' % msgspec.json.encode(text), logprobs)

    def end(self, output: Output) -> bytes:
        return self._delta(output.index, b"{}", b"null", msgspec.json.encode(self._word(output)))

    def logprobs(
        self, output: Output, ids: Sequence[int], given: Sequence[TokenLogprobs | None], table: dict[int, bytes]
    ) -> dict[str, Any]:
        return chat_logprobs(ids, given, table)

    def choice(self, whole: Collected, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        reader = self._reader(whole.output)
        reader.skip = 0
        delta = merged([*reader.push("".join(whole.text)), *reader.finish()])
        calls = [{key: value for key, value in call.items() if key != "index"} for call in delta.get("tool_calls", ())]
        message = {"role": "assistant", "content": delta.get("content", None if calls else ""), "refusal": None}
        return {
            "index": whole.output.index,
            "message": message | ({"tool_calls": calls} if calls else {}),
            "logprobs": logprobs,
            "finish_reason": self._word(whole.output),
        }

    async def event(self, marks: Marks, piece: Piece) -> bytes:
        if not self.tools.tools:
            return await super().event(marks, piece)
        output, message = piece.output, piece.message
        reader = self._reader(output)
        found = reader.push(message.text)
        event = b""
        if (delta := merged(found)) and not output.place.has_text:
            event = marks.tokens(output, reader.chars) + self._delta(output.index, msgspec.json.encode(delta))
        if isinstance(message, Tokens) or output.place.is_over:
            return event
        if (delta := merged(reader.finish())) and not output.place.has_text:
            event += marks.text(output, reader.chars) + self._delta(output.index, msgspec.json.encode(delta))
        return event + marks.end(output, reader.chars) + self.end(output)

    def _reader(self, output: Output) -> CallReader:
        """Reads the calls out of one output's text."""
        self._readers = {} if self._readers is None else self._readers
        if output.index not in self._readers:
            info = self.call.site.core.router.models.get(output.model)
            is_asked = self.tools.tools and self.tools.choice != "none" and info is not None and info.tools is not None
            family = info.tools.family if is_asked and info is not None and info.tools is not None else None
            names = {tool.name for tool in self.tools.tools}
            self._readers[output.index] = CallReader(output.rid, family, names, output.place.offset)
        return self._readers[output.index]

    def _word(self, output: Output) -> str:
        word = finish_word(output)
        return "tool_calls" if word == "stop" and self._reader(output).has_calls else word

    def more(self) -> dict[str, Any]:
        return {"service_tier": self.tier}

    def _delta(self, index: int, delta: bytes, logprobs: bytes = b"null", reason: bytes = b"null") -> bytes:
        fields = (self.head, index, delta, logprobs, reason, self.tail)
        return b'data: %b,"choices":[{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}]%b' % fields
