"""The messages of the client port, from what callers pass to what goes on the wire, pure: checked requests that only lack their
number. Whatever comes in, the only exception that comes out is `InvalidRequest`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from llmos.client.chat import parse_tools
from llmos.client.checked import (
    checked_after,
    checked_deadline_ms,
    checked_name,
    checked_nice,
    checked_offset,
    checked_rid,
    utf8_size,
)
from llmos.client.options import GenerateOptions, OutputOptions, SpawnOptions
from llmos.client.prompts import parse_prompt, parse_tokens
from llmos.client.sampling import OPTIONS, merge_params, refuse_unknown
from llmos.errors import InvalidRequest
from llmos.protocol import limits
from llmos.protocol.messages import Append, Attach, Continue, Generate, Message, Spawn, Tokenize, Tool
from llmos.protocol.params import SamplingParams

_LEAST_DEADLINE_MS = 0.001  # so that the daemon says in its own words that it has passed
M = TypeVar("M", bound=Message, covariant=True)
Build = Callable[[int], M]
ForModel = Callable[[str], Build[M]]  # a handle may have to ask for its sequence's model first


def generate_request(prompt: Any, model: str | None, options: Mapping[str, Any]) -> Build[Generate]:
    """`model`: the client's own, if `options` name none."""
    refuse_unknown(options, GenerateOptions.__optional_keys__)
    text, token_ids, messages = parse_prompt(prompt)
    params, deadline_ms = _output(options)
    name, nice, parent, after = placement(model, options)
    key = request_id(options)
    tools, choice, parallel = _tools(options)
    return lambda req: Generate(
        req,
        name,
        text,
        token_ids,
        messages,
        params,
        key,
        nice,
        deadline_ms,
        parent,
        after,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=parallel,
    )


def spawn_request(prompt: Any, model: str | None, options: Mapping[str, Any]) -> Build[Spawn]:
    """`prompt` None: a sequence without tokens."""
    refuse_unknown(options, SpawnOptions.__optional_keys__)
    text, token_ids, messages = (None, None, None) if prompt is None else parse_prompt(prompt)
    name, nice, parent, after = placement(model, options)
    key = request_id(options)
    return lambda req: Spawn(req, name, text, token_ids, messages, nice, parent, after, key)


def append_request(rid: int, text: Any) -> ForModel[Append]:
    words, token_ids = parse_tokens(text, "text")
    return lambda model: lambda req: Append(req, rid, model, words, token_ids)


def continue_request(rid: int, options: Mapping[str, Any]) -> ForModel[Continue]:
    refuse_unknown(options, OutputOptions.__optional_keys__)
    params, deadline_ms = _output(options)
    return lambda model: lambda req: Continue(req, rid, model, params, deadline_ms)


def attach_request(rid: int, offset: Any) -> Build[Attach]:
    first = checked_offset(offset)
    return lambda req: Attach(req, rid, first)


def tokenize_request(prompt: Any, model: str | None) -> Build[Tokenize]:
    text, token_ids, messages = parse_prompt(prompt)
    if token_ids is not None:
        raise InvalidRequest("prompt: these are token ids already", field="prompt")
    name = _model(model)
    return lambda req: Tokenize(req, name, text, messages)


def identified(build: Build[Generate | Spawn], request_id: str) -> Build[Generate | Spawn]:
    """The request under an id, so that it can be asked for again; the caller's own, if he gave one."""

    def build_identified(req: int) -> Generate | Spawn:
        message = build(req)
        given = message.client_request_id
        return message if given is not None else msgspec.structs.replace(message, client_request_id=request_id)

    return build_identified


def aged(build: Build[Message], seconds: Callable[[], float]) -> Build[Message]:
    """The request, asked for again so long after it was first: deadlines count from then."""

    def build_aged(req: int) -> Message:
        message = build(req)
        if isinstance(message, Generate):
            message = msgspec.structs.replace(message, again=True)
        deadline_ms = getattr(message, "deadline_ms", None)
        if deadline_ms is None:
            return message
        return msgspec.structs.replace(message, deadline_ms=max(_LEAST_DEADLINE_MS, deadline_ms - seconds() * 1e3))

    return build_aged


def _output(options: Mapping[str, Any]) -> tuple[SamplingParams, float | None]:
    """How an output is made, and by when."""
    sampling = {name: options[name] for name in OPTIONS if name in options}
    return merge_params(options.get("params"), sampling), checked_deadline_ms(options.get("deadline_s"))


def _tools(options: Mapping[str, Any]) -> tuple[tuple[Tool, ...], str, bool]:
    """(tools, choice, whether several calls may be made)."""
    choice, parallel = options.get("tool_choice", "auto"), options.get("parallel_tool_calls", True)
    if not isinstance(choice, str):
        raise InvalidRequest(f"tool_choice: expected a str, got {type(choice).__name__}", field="tool_choice")
    if not isinstance(parallel, bool):
        kind = type(parallel).__name__
        raise InvalidRequest(f"parallel_tool_calls: expected a bool, got {kind}", field="parallel_tool_calls")
    utf8_size("tool_choice", choice)
    tools = parse_tools(options["tools"]) if options.get("tools") is not None else ()
    return tools, choice, parallel


def placement(model: str | None, options: Mapping[str, Any]) -> tuple[str | None, int, int | None, tuple[int, ...]]:
    """(model, nice, parent, after)."""
    parent = options.get("parent")
    return (
        _model(model if options.get("model") is None else options["model"]),
        checked_nice(options.get("nice", 0)),
        None if parent is None else checked_rid(parent, "parent"),
        checked_after(options.get("after", ())),
    )


def _model(name: Any) -> str | None:
    return None if name is None else checked_name("model", name, limits.MAX_MODEL_NAME_CHARS)


def request_id(options: Mapping[str, Any]) -> str | None:
    name = options.get("client_request_id")
    return None if name is None else checked_name("client_request_id", name, limits.MAX_REQUEST_ID_CHARS)
