"""The conversation, tools and formats of OpenAI's chat, and what llmos makes of them."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from llmos.protocol.messages import ChatMessage, Tool, ToolCall
from llmos.protocol.params import Grammar
from llmos.services.gateway.http.failures import HttpError, unsupported
from llmos.services.gateway.http.requests import Tools

ROLES = ("system", "developer", "user", "assistant", "tool")


class TextPart(Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Text; other kinds of parts are refused."""

    text: str


class CalledFunction(Struct, forbid_unknown_fields=True):
    """`arguments`: JSON text of an object."""

    name: str
    arguments: str


class CallField(Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """A call that an earlier answer made."""

    id: str
    function: CalledFunction
    index: int | None = None


class Message(Struct, forbid_unknown_fields=True):
    """One message of the conversation."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = None
    function_call: None = None
    tool_calls: list[CallField] | None = None
    tool_call_id: str | None = None


class FunctionField(Struct, forbid_unknown_fields=True):
    """`parameters`: JSON schema of an object."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolField(Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """A function that the model may call."""

    function: FunctionField


class NamedFunction(Struct, forbid_unknown_fields=True):
    name: str


class NamedChoice(Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """This function is to be called."""

    function: NamedFunction


class TextFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Whatever the model says."""


class JsonFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """A JSON object."""


class SchemaOf(Struct, forbid_unknown_fields=True):
    """`strict` changes nothing: the output always fits."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class SchemaFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """JSON that fits a schema."""

    json_schema: SchemaOf


def grammar_of(wanted: TextFormat | JsonFormat | SchemaFormat | None) -> Grammar | None:
    if isinstance(wanted, JsonFormat):
        return Grammar("json_object")
    if isinstance(wanted, SchemaFormat):
        return Grammar("json_schema", msgspec.json.encode(wanted.json_schema.schema).decode())
    return None


def tools_of(tools: list[ToolField] | None, choice: str | NamedChoice | None, parallel: bool | None) -> Tools:
    """Their names and schemas are checked by the gateway, as for everybody."""
    found = tuple(_tool(tool.function) for tool in tools or ())
    word = f"function:{choice.function.name}" if isinstance(choice, NamedChoice) else choice or "auto"
    if not found and word not in ("auto", "none"):
        raise HttpError(400, "tool_choice needs tools", param="tool_choice", code="invalid_value")
    is_forced = word not in ("auto", "none")
    for place, tool in enumerate(tools or ()):
        if tool.function.strict and not is_forced:
            why = "that arguments fit is certain only if the call is: tool_choice required, or the function"
            raise unsupported(f"tools[{place}].function.strict", why)
    return Tools(found, word, parallel is not False) if found else Tools()


def _tool(function: FunctionField) -> Tool:
    parameters = "" if function.parameters is None else msgspec.json.encode(function.parameters).decode()
    return Tool(function.name, function.description, parameters)


def chat_messages(messages: list[Message]) -> tuple[ChatMessage, ...]:
    """As the gateway has them; raises 400 for what no chat template can be told."""
    names: dict[str, str] = {}
    found = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if message.role not in ROLES:
            text = f"{where}.role: {message.role!r:.40} is none of {', '.join(ROLES)}"
            raise HttpError(400, text, param=f"{where}.role", code="invalid_value")
        _check_fields(message, where)
        calls = tuple(
            ToolCall(call.function.name, call.function.arguments, call.id) for call in message.tool_calls or ()
        )
        names |= {call.id: call.name for call in calls if call.id is not None}
        name = names.get(message.tool_call_id or "")
        found.append(ChatMessage(message.role, _text(message, where), calls, message.tool_call_id, name))
    return tuple(found)


def _check_fields(message: Message, where: str) -> None:
    if message.name:
        raise unsupported(f"{where}.name", "the chat templates are told roles only")
    if message.tool_calls and message.role != "assistant":
        text = f"{where}.tool_calls: only an assistant calls tools"
        raise HttpError(400, text, param=f"{where}.tool_calls", code="invalid_value")
    if (message.tool_call_id is not None) != (message.role == "tool"):
        text = f"{where}.tool_call_id belongs to messages of role tool, and they need it"
        raise HttpError(400, text, param=f"{where}.tool_call_id", code="invalid_value")


def _text(message: Message, where: str) -> str:
    content = message.content
    if content is None:
        if message.tool_calls:
            return ""
        raise HttpError(400, f"{where}.content is missing", param=f"{where}.content", code="invalid_value")
    return content if isinstance(content, str) else "".join(part.text for part in content)
