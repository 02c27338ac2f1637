"""Checks of tools, and the grammar that makes a call certain. Pure.

The grammar is Lark with JSON schemas in it, as llguidance reads it: what a family writes around a call, and the call's object with the
name of a tool and arguments that fit its schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from llmos.errors import InvalidRequest
from llmos.protocol import limits
from llmos.protocol.messages import Tool, ToolFormat
from llmos.protocol.params import Grammar
from llmos.tools.formats import FAMILIES, Family

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_ONE = "function:"
_CHOICES = ("auto", "none", "required")


def check_tools(tools: Sequence[Tool], choice: str) -> None:
    """Raise `InvalidRequest` for tools that no model should see, or a choice that is none."""
    if len(tools) > limits.MAX_TOOLS:
        raise InvalidRequest(f"tools: {len(tools)}, the limit is {limits.MAX_TOOLS}", field="tools")
    size = sum(len(f"{tool.name}{tool.description or ''}{tool.parameters}".encode()) for tool in tools)
    if size > limits.MAX_TOOLS_BYTES:
        raise InvalidRequest(f"tools: {size} bytes, the limit is {limits.MAX_TOOLS_BYTES}", field="tools")
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if len(tool.name) > limits.MAX_TOOL_NAME_CHARS or not _NAME.fullmatch(tool.name):
            text = f"{where}: a name has 1 to {limits.MAX_TOOL_NAME_CHARS} letters, digits, _ and -"
            raise InvalidRequest(text, field="tools")
        if tool.name in seen:
            raise InvalidRequest(f"{where}: {tool.name!r} is there twice", field="tools")
        seen.add(tool.name)
        parameters_of(tool, where)
    _check_choice(choice, seen)


def parameters_of(tool: Tool, where: str = "tools") -> dict[str, Any]:
    """The JSON schema of a tool's arguments."""
    if not tool.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    try:
        schema = json.loads(tool.parameters)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where}: parameters are not JSON: {error}", field="tools") from None
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise InvalidRequest(f"{where}: parameters are not the schema of an object", field="tools")
    return schema


def is_forced(choice: str) -> bool:
    """Does the choice make a call certain?"""
    return choice == "required" or choice.startswith(_ONE)


def forced_grammar(form: ToolFormat, tools: Sequence[Tool], choice: str, *, parallel: bool = True) -> Grammar:
    """The outputs that call one of the tools, or several if `parallel`; tools and choice passed `check_tools`."""
    assert is_forced(choice)
    family = FAMILIES[form.family]
    wanted = [tool for tool in tools if choice in ("required", _ONE + tool.name)]
    calls = [_object(family, tool, index) for index, tool in enumerate(wanted)]
    rules = [f"call: {' | '.join(name for name, _ in calls)}", *(rule for _, rule in calls)]
    return Grammar("lark", "\n".join([_frame(family, form.marker, parallel), *rules]) + "\n")


def _frame(family: Family, marker: int | None, parallel: bool) -> str:
    """The start rule: what stands around calls."""
    begin = f"<[{marker}]>" if marker is not None else json.dumps(family.begin)
    if family.is_list:
        more = ' (", " call)*' if parallel else ""
        return f'start: {begin} "[" call{more} "]"'
    if family.end:
        more = ' ("\\n" block)*' if parallel else ""
        return f'start: block{more}\nblock: {begin} "\\n" call "\\n" {json.dumps(family.end)}'
    more = f" ({json.dumps(family.separator + ' ')} call)*" if parallel else ""
    return f"start: call{more}"


def _object(family: Family, tool: Tool, index: int) -> tuple[str, str]:
    """(rule name, rule) of the object that calls `tool`."""
    name = f"call{index}"
    head = json.dumps(f'{{"name": "{tool.name}", "{family.arguments}": ')
    return name, f'{name}: {head} arguments{index} "}}"\narguments{index}: %json {json.dumps(parameters_of(tool))}'


def _check_choice(choice: str, names: set[str]) -> None:
    if choice in _CHOICES:
        if choice == "required" and not names:
            raise InvalidRequest("tool_choice: required, but there are no tools", field="tool_choice")
        return
    if not choice.startswith(_ONE):
        known = ", ".join(_CHOICES)
        raise InvalidRequest(f"tool_choice: {choice[:80]!r} is not one of {known}, {_ONE}NAME", field="tool_choice")
    if choice.removeprefix(_ONE) not in names:
        raise InvalidRequest(f"tool_choice: no tool is called {choice.removeprefix(_ONE)[:80]!r}", field="tool_choice")
