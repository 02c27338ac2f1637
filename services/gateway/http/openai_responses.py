"""/v1/responses: made at once, as a stream, or in the background; found again, read on, and cancelled by their id.

The id has the sequence's number in it, and the microkernel has the output for a while (`retention_s`), so a response needs no memory of the
gateway. What it was asked with is not kept: a response that is found again has its output, its state and its usage. Numbers of events
are a function of the tokens: 0 to 3 open the response, `3 + n` is the delta after which n tokens were sent, and what follows the last
token counts on from there. So `starting_after` means the same in every process.
"""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.types import ASGIApp

from llmos.codes import SeqState
from llmos.protocol import limits
from llmos.protocol.messages import ChatMessage, Generate, Kill, Killed, Stat, Stats
from llmos.protocol.params import SamplingParams
from llmos.services.gateway.http.bodies import Refused, decode, read_body
from llmos.services.gateway.http.context import Call, json_response
from llmos.services.gateway.http.failures import HttpError
from llmos.services.gateway.http.openai_answer import begin, named, response_headers
from llmos.services.gateway.http.outputs import Outputs, Place, collect
from llmos.services.gateway.http.requests import KEY_HEADER, NAMES, TIERS, Wish, wishes
from llmos.services.gateway.http.response_events import FIRST_DELTA, Response, error_event, events
from llmos.services.gateway.http.sse import EventStream, unless_left

WITHOUT_EFFECT = frozenset(
    {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "store", "metadata", "include"}
)
REFUSED = {
    "tools": Refused("tool calls are to come", (None, [])),
    "tool_choice": Refused("tool calls are to come", (None, "none", "auto")),
    "parallel_tool_calls": Refused("tool calls are to come", (None, True, False)),
    "max_tool_calls": Refused("tool calls are to come"),
    "previous_response_id": Refused("send the conversation as input"),
    "conversation": Refused("send the conversation as input"),
    "prompt": Refused("there are no stored prompts"),
    "reasoning": Refused("no model here has such a setting", (None, {}, {"effort": "none"})),
    "text": Refused("structured output is to come", (None, {}, {"format": {"type": "text"}})),
    "truncation": Refused("prompts are never cut", (None, "disabled")),
    "top_logprobs": Refused("/v1/chat/completions has log-probabilities", (None, 0)),
    "context_management": Refused("prompts are never cut", (None, [])),
}
_QUEUED = (SeqState.WAITING, SeqState.BLOCKED)


class ContentPart(Struct, forbid_unknown_fields=True):
    """Text of a message; `annotations` and `logprobs` of an earlier answer may come along and change nothing."""

    type: str
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputItem(Struct, forbid_unknown_fields=True):
    """A message of the conversation; an earlier answer's may be given as it was."""

    role: str
    content: str | list[ContentPart]
    type: str = "message"
    id: str | None = None
    status: str | None = None
    phase: None = None


class ResponseRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/responses."""

    model: str | None = None
    input: str | Annotated[list[InputItem], Meta(min_length=1, max_length=limits.MAX_CHAT_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=limits.MAX_TOKENS)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=limits.MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stream: bool | None = None
    background: bool | None = None
    service_tier: str | None = None
    priority: Annotated[int, Meta(ge=limits.MIN_NICE, le=limits.MAX_NICE)] | None = None


async def create(call: Call) -> ASGIApp:
    asked, idle = decode(await read_body(call.request, call.site.max_body), ResponseRequest, REFUSED, WITHOUT_EFFECT)
    tier = asked.service_tier or "auto"
    if tier not in TIERS:
        text = f"service_tier: {tier!r:.40} is none of {', '.join(TIERS)}"
        raise HttpError(400, text, param="service_tier", code="invalid_value")
    params = SamplingParams(temperature=asked.temperature, top_p=asked.top_p, max_tokens=asked.max_output_tokens)
    nice = TIERS[tier] if asked.priority is None else asked.priority
    wanted = wishes(call.request, asked.model, [Wish(messages=_chat(asked))], 1, params, nice)
    if asked.background and KEY_HEADER not in call.request.headers:
        wanted = [_named_request(wanted[0])]
    outputs = Outputs(call.session, wanted)
    response = Response(
        outputs.outputs[0],
        int(time.time()),
        {
            "background": bool(asked.background),
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
        },
    )
    with named(NAMES):
        if not asked.stream and not asked.background:
            await unless_left(call.request, outputs, _collected(outputs, response))
            return json_response(response.body(), response_headers(outputs, idle))
        await begin(outputs)
    headers = response_headers(outputs, idle)
    if asked.stream:
        return EventStream(outputs, events(response, outputs, -1, None), error_event, headers)
    outputs.leave()  # it has a name, so it goes on
    return json_response(response.body("queued"), headers)


async def retrieve(call: Call) -> ASGIApp:
    """GET /v1/responses/ID, `?stream=true` and `starting_after=N`."""
    created, rid = _parse_id(call.request.path_params["name"])
    stats = await call.session.ask(lambda req: Stat(req, rid), Stats)
    query = call.request.query_params
    unknown = set(query) - {"stream", "starting_after", "include", "include[]", "include_obfuscation"}
    if unknown:
        name = min(unknown)
        raise HttpError(400, f"{name}: no such parameter", param=name, code="unknown_parameter")
    if query.get("stream") == "true":
        return await _stream_again(call, rid, created, _starting_after(query.get("starting_after", "-1")))
    outputs = _reading(call, rid, 0)
    response = Response(outputs.outputs[0], created, {})
    if not stats.reason:
        response.output.rid, response.output.model = rid, stats.row.model
        state = "queued" if stats.row.state in _QUEUED and not stats.row.output_tokens else "in_progress"
        return json_response(response.body(state), {"llmos-rid": str(rid)})
    await unless_left(call.request, outputs, _collected(outputs, response))
    return json_response(response.body(), {"llmos-rid": str(rid)})


async def cancel(call: Call) -> ASGIApp:
    created, rid = _parse_id(call.request.path_params["name"])
    await read_body(call.request, call.site.max_body)
    await call.session.ask(lambda req: Kill(req, rid), Killed)
    outputs = _reading(call, rid, 0)
    response = Response(outputs.outputs[0], created, {})
    await unless_left(call.request, outputs, _collected(outputs, response))
    return json_response(response.body(), {"llmos-rid": str(rid)})


async def _stream_again(call: Call, rid: int, created: int, after: int) -> ASGIApp:
    outputs = _reading(call, rid, max(0, after + 1 - FIRST_DELTA))
    await begin(outputs)
    whole = _reading(call, rid, 0) if after >= FIRST_DELTA else None
    response = Response(outputs.outputs[0], created, {})
    return EventStream(outputs, events(response, outputs, after, whole), error_event, {"llmos-rid": str(rid)})


async def _collected(outputs: Outputs, response: Response) -> None:
    try:
        await outputs.begin()
        (found,) = await collect(outputs)
    finally:
        outputs.leave()
    response.text = "".join(found.text)


def _reading(call: Call, rid: int, offset: int) -> Outputs:
    nothing = Generate(0, None, "", None, None, SamplingParams())  # never asked for: the place is known
    return Outputs(call.session, [nothing], 1, [Place(rid, offset)])


def _named_request(wanted: Generate) -> Generate:
    """What goes on without its reader needs a name."""
    fields = {name: getattr(wanted, name) for name in wanted.__struct_fields__}
    return Generate(**(fields | {"client_request_id": f"resp-{secrets.token_hex(16)}"}))


def _chat(asked: ResponseRequest) -> tuple[ChatMessage, ...]:
    system = () if asked.instructions is None else (ChatMessage("system", asked.instructions),)
    if isinstance(asked.input, str):
        return (*system, ChatMessage("user", asked.input))
    return (*system, *(_message(item, place) for place, item in enumerate(asked.input)))


def _message(item: InputItem, place: int) -> ChatMessage:
    if item.type != "message" or item.role not in ("system", "developer", "user", "assistant"):
        text = f"input[{place}]: only messages of system, developer, user and assistant are supported"
        raise HttpError(400, text, param=f"input[{place}]", code="unsupported_parameter")
    if isinstance(item.content, str):
        return ChatMessage(item.role, item.content)
    for part in item.content:
        if part.type not in ("input_text", "output_text"):
            text = f"input[{place}].content: parts of type {part.type!r:.40} are not supported"
            raise HttpError(400, text, param=f"input[{place}].content", code="unsupported_parameter")
    return ChatMessage(item.role, "".join(part.text for part in item.content))


def _parse_id(name: str) -> tuple[int, int]:
    """When it was made, and its sequence."""
    prefix, _, rest = name.partition("_")
    created, _, rid = rest.partition("_")
    is_one = prefix == "resp" and all(part.isascii() and part.isdigit() and len(part) < 19 for part in (created, rid))
    if not is_one or not int(rid):
        raise HttpError(
            404, f"no response {name[:80]!r}", kind="not_found_error", param="response_id", code="not_found"
        )
    return int(created), int(rid)


def _starting_after(text: str) -> int:
    if not text.removeprefix("-").isdigit() or not text.isascii() or len(text) > 15:
        raise HttpError(400, "starting_after: not the number of an event", param="starting_after", code="invalid_value")
    return int(text)
