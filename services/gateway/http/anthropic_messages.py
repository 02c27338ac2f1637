"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's protocol."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from starlette.types import ASGIApp

from llmos.codes import FinishReason
from llmos.protocol import limits
from llmos.protocol.messages import ChatMessage, Tokenize, Tokenized, Tokens
from llmos.protocol.params import SamplingParams
from llmos.services.gateway.http.bodies import Refused, decode, read_body
from llmos.services.gateway.http.context import Call, json_response
from llmos.services.gateway.http.failures import HttpError, anthropic_body
from llmos.services.gateway.http.openai_answer import begin, named, response_headers, stream_error
from llmos.services.gateway.http.openai_output import finish_word
from llmos.services.gateway.http.outputs import Output, Outputs, collect
from llmos.services.gateway.http.requests import Wish, wishes
from llmos.services.gateway.http.sse import EventStream, Marks, Resume, read_resume, unless_left

WITHOUT_EFFECT = frozenset({"metadata", "service_tier", "inference_geo", "cache_control"})
REFUSED = {
    "tools": Refused("tool calls are to come", (None, [])),
    "tool_choice": Refused("tool calls are to come", (None, {"type": "auto"}, {"type": "none"})),
    "thinking": Refused("no model here has such a setting", (None, {"type": "disabled"})),
    "output_config": Refused("structured output is to come", (None, {})),
    "output_format": Refused("structured output is to come"),
    "container": Refused("nothing is executed here"),
    "mcp_servers": Refused("nothing is executed here", (None, [])),
    "context_management": Refused("the caller keeps the conversation"),
}
_REASONS = {"stop": "end_turn", "length": "max_tokens"}
_NAMES = {"stop": "stop_sequences", "prompt": "messages"}


class TextBlock(Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Text; other kinds of blocks are refused. `cache_control` changes nothing: prefixes are cached anyway."""

    text: str
    cache_control: dict[str, Any] | None = None
    citations: list[Any] | None = None


class AnthropicMessage(Struct, forbid_unknown_fields=True):
    """One turn."""

    role: Literal["user", "assistant"]
    content: str | list[TextBlock]


class Conversation(Struct, forbid_unknown_fields=True, kw_only=True):
    """What /v1/messages/count_tokens needs."""

    model: str
    messages: Annotated[list[AnthropicMessage], Meta(min_length=1, max_length=limits.MAX_CHAT_MESSAGES)]
    system: str | list[TextBlock] | None = None


class MessagesRequest(Conversation, kw_only=True):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_TOKENS)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=limits.MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, lt=2**31)] | None = None


async def count_tokens(call: Call) -> ASGIApp:
    asked, idle = decode(await read_body(call.request, call.site.max_body), Conversation, REFUSED, WITHOUT_EFFECT)
    chat = _chat(asked)
    with named(_NAMES):
        found = await call.session.ask(lambda req: Tokenize(req, asked.model, None, chat), Tokenized)
    headers = {"llmos-no-effect": ", ".join(idle)} if idle else {}
    return json_response({"input_tokens": len(found.token_ids) // 4}, headers)


async def messages(call: Call) -> ASGIApp:
    asked, idle = decode(await read_body(call.request, call.site.max_body), MessagesRequest, REFUSED, WITHOUT_EFFECT)
    params = SamplingParams(
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        max_tokens=asked.max_tokens,
        stop=tuple(asked.stop_sequences or ()),
    )
    wanted = wishes(call.request, asked.model, [Wish(messages=_chat(asked))], 1, params, 0)
    resume = read_resume(call.request, 1) if asked.stream else Resume(int(time.time()))
    outputs = Outputs(call.session, wanted, 1, resume.places)
    with named(_NAMES):
        if asked.stream:
            await begin(outputs)
            events = _events(outputs, resume)
            return EventStream(outputs, events, _error_event, response_headers(outputs, idle))
        found = await unless_left(call.request, outputs, _whole(outputs))
    return json_response(found, response_headers(outputs, idle))


def _chat(asked: Conversation) -> tuple[ChatMessage, ...]:
    if asked.messages[-1].role == "assistant":
        text = "messages: the last one must be the user's; going on from an assistant's text is not supported"
        raise HttpError(400, text, param="messages", code="unsupported_parameter")
    system = () if asked.system is None else (ChatMessage("system", _text(asked.system)),)
    return (*system, *(ChatMessage(message.role, _text(message.content)) for message in asked.messages))


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _message(output: Output, text: str | None) -> dict[str, Any]:
    """`text` None: it has only begun."""
    return {
        "id": f"msg_{output.rid}",
        "type": "message",
        "role": "assistant",
        "model": output.model,
        "content": [] if text is None else [{"type": "text", "text": text, "citations": None}],
        "stop_reason": None if text is None else _reason(output),
        "stop_sequence": output.stop_string,
        "usage": _usage(output),
    }


def _reason(output: Output) -> str:
    is_ours = output.reason is FinishReason.STOP and output.stop_string is not None
    return "stop_sequence" if is_ours else _REASONS[finish_word(output)]


def _usage(output: Output) -> dict[str, Any]:
    """What was found in the cache does not count as input, in Anthropic's way of counting."""
    cached = 0 if output.usage is None else output.usage.cached_tokens
    return {
        "input_tokens": output.prompt_tokens - cached,
        "output_tokens": 0 if output.usage is None else output.usage.output_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "service_tier": "standard",
    }


async def _whole(outputs: Outputs) -> dict[str, Any]:
    await outputs.begin()
    (found,) = await collect(outputs)
    return _message(found.output, "".join(found.text))


async def _events(outputs: Outputs, resume: Resume) -> AsyncIterator[bytes]:
    (output,) = outputs.outputs
    marks = Marks(resume.created, [output.place])
    if not resume.is_again:
        block = {"type": "text", "text": "", "citations": None}
        start = _event("message_start", message=_message(output, None))
        yield start + marks.tokens(output, 0) + _event("content_block_start", index=0, content_block=block)
    while pieces := await outputs.take():
        parts = []
        for piece in pieces:
            message = piece.message
            is_known = not isinstance(message, Tokens) and output.place.has_text
            if message.text and not is_known:
                upto = message.offset + len(message.ids) if isinstance(message, Tokens) else None
                parts.append(marks.text(output) if upto is None else marks.tokens(output, upto))
                delta = {"type": "text_delta", "text": message.text}
                parts.append(_event("content_block_delta", index=0, delta=delta))
        if parts:
            yield b"".join(parts)
    if not output.place.is_over:
        ended = {"stop_reason": _reason(output), "stop_sequence": output.stop_string}
        yield (
            _event("content_block_stop", index=0)
            + marks.end(output)
            + _event("message_delta", delta=ended, usage=_usage(output))
        )
    yield _event("message_stop")


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))


def _error_event(error: Exception) -> bytes:
    return b"event: error\ndata: %b\n\n" % msgspec.json.encode(anthropic_body(stream_error(error)))
