"""Chat messages and tools as callers write them, pure: dicts in the form of OpenAI's interface, or our own types."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from llmos.client.checked import utf8_size
from llmos.errors import InvalidRequest
from llmos.protocol.messages import ChatMessage, Tool, ToolCall
from llmos.tools import CallArguments, CallBegin, CallParser, TextPiece, call_id

_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name"})


def parse_message(where: str, item: Any, field: str) -> tuple[ChatMessage, int]:
    """(message, its size in bytes). `where` names it, `field` is what the caller calls the whole."""
    if isinstance(item, ChatMessage):
        kept = {"tool_calls": item.tool_calls, "tool_call_id": item.tool_call_id, "name": item.name}
        item = {"role": item.role, "content": item.content} | {name: value for name, value in kept.items() if value}
    if not isinstance(item, Mapping):
        raise InvalidRequest(f"{where}: expected a chat message, got {type(item).__name__}", field=field)
    if unknown := set(item) - _KEYS:
        raise InvalidRequest(f"{where}: unknown key {sorted(map(str, unknown))[0]!r}", field=field)
    calls = tuple(
        _call(f"{where}.tool_calls[{at}]", call, field) for at, call in enumerate(item.get("tool_calls") or ())
    )
    texts = {key: item.get(key) for key in ("role", "content", "tool_call_id", "name")}
    if calls and texts["content"] is None:
        texts["content"] = ""
    size = 0
    for key, value in texts.items():
        if value is None and key in ("tool_call_id", "name"):
            continue
        size += _size(f"{where}.{key}", value, field)
    size += sum(_size(where, part, field) for call in calls for part in (call.name, call.arguments))
    message = ChatMessage(str(texts["role"]), str(texts["content"]), calls, texts["tool_call_id"], texts["name"])
    return message, size


def parse_tools(tools: Any) -> tuple[Tool, ...]:
    """`Tool`s, or dicts: {"name": ..., "description": ..., "parameters": {...}}, perhaps as {"type": "function", "function": ...}."""
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise InvalidRequest(f"tools: expected a list, got {type(tools).__name__}", field="tools")
    return tuple(_tool(f"tools[{at}]", tool) for at, tool in enumerate(tools))


def split_calls(family: str, text: str, rid: int) -> tuple[str, tuple[ToolCall, ...]]:
    """(the text without calls, the calls that are complete) of an answer of sequence `rid`."""
    parser = CallParser(family)
    said, calls = "", []
    name = arguments = ""
    for event in parser.push(text) + parser.finish():
        if isinstance(event, TextPiece):
            said += event.text
        elif isinstance(event, CallBegin):
            name, arguments = event.name, ""
        elif isinstance(event, CallArguments):
            arguments += event.text
        elif event.is_complete:
            calls.append(ToolCall(name, arguments, call_id(rid, event.index)))
    return said, tuple(calls)


def _tool(where: str, tool: Any) -> Tool:
    if isinstance(tool, Tool):
        return tool
    if isinstance(tool, Mapping) and tool.get("type") == "function" and "function" in tool:
        tool = tool["function"]
    if not isinstance(tool, Mapping):
        raise InvalidRequest(f"{where}: expected a tool, got {type(tool).__name__}", field="tools")
    if unknown := set(tool) - {"name", "description", "parameters"}:
        raise InvalidRequest(f"{where}: unknown key {sorted(map(str, unknown))[0]!r}", field="tools")
    name, description, parameters = (tool.get(key) for key in ("name", "description", "parameters"))
    _size(f"{where}.name", name, "tools")
    if description is not None:
        _size(f"{where}.description", description, "tools")
    text = parameters or ""
    if not isinstance(text, str):
        text = _dumps(f"{where}.parameters", text, "tools")
    return Tool(str(name), description, text)


def _call(where: str, call: Any, field: str) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{where}: expected a call of a function", field=field)
    name, arguments = function.get("name"), function.get("arguments", "")
    if not isinstance(arguments, str):
        arguments = _dumps(f"{where}.arguments", arguments, field)
    for key, value in (("name", name), ("arguments", arguments), ("id", call.get("id", ""))):
        _size(f"{where}.{key}", value, field)
    return ToolCall(str(name), arguments, call.get("id"))


def _size(where: str, value: Any, field: str) -> int:
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}: expected a str, got {type(value).__name__}", field=field)
    return utf8_size(where, value, field=field)


def _dumps(where: str, value: Any, field: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where}: not JSON: {error}", field=field) from None
