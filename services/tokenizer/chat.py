"""Chat templates: messages -> the prompt that the model was trained on, equal to transformers' `apply_chat_template`.

Templates come from model directories and are not trusted: they run in Jinja's immutable sandbox, see only plain
strings, and their output is limited. As in transformers, text of users is not changed: a special token that is spelled
out in it is read as that special token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmos.errors import InvalidRequest, ModelError
from llmos.protocol import limits
from llmos.protocol.messages import ChatMessage, Tool, ToolCall
from llmos.tools import parameters_of

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
# A template adds a header to each message; more than this many times the input is a template that loops.
_MAX_OUTPUT_CHARS = 2 * limits.MAX_PROMPT_BYTES


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks text for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template with the model's special tokens."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """`ModelError` if the template is not valid Jinja."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"chat template: {_explain(error)}", field="chat_template") from None
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> str:
        """The prompt, ending where the assistant's answer begins."""
        check_messages(messages)
        variables = {
            **self._special_tokens,
            "messages": [_message(message, f"messages[{index}]") for index, message in enumerate(messages)],
            "tools": [_tool(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": True,
        }
        try:
            return _limited(self._template.generate(variables))
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"messages: the model's chat template refuses them: {_explain(error)}", field="messages"
            ) from None
        except (TypeError, ValueError, KeyError, IndexError, ArithmeticError, AttributeError, RecursionError) as error:
            # the template is code of the model's: whatever it raises is about these messages, not about us
            problem = f"{type(error).__name__}: {error}"
            raise InvalidRequest(f"messages: the model's chat template failed: {problem}", field="messages") from None


def check_messages(messages: Sequence[ChatMessage]) -> None:
    """Raise `InvalidRequest` for a conversation that no template should see."""
    if not messages:
        raise InvalidRequest("messages: at least one is needed", field="messages")
    if len(messages) > limits.MAX_CHAT_MESSAGES:
        raise InvalidRequest(f"messages: {len(messages)}, the limit is {limits.MAX_CHAT_MESSAGES}", field="messages")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            known = ", ".join(sorted(ROLES))
            raise InvalidRequest(
                f"messages[{index}]: role {message.role[:32]!r} is not one of {known}", field="messages"
            )


def _message(message: ChatMessage, where: str) -> dict[str, Any]:
    """As transformers' templates expect it: keys that do not apply are not there."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        found["tool_calls"] = [_call(call, where) for call in message.tool_calls]
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        found["name"] = message.name
    return found


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where}: arguments of {call.name!r} are not JSON: {error}", field="messages") from None
    found: dict[str, Any] = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return found if call.id is None else {"id": call.id, **found}


def _tool(tool: Tool) -> dict[str, Any]:
    """As clients of OpenAI's interface write it, which is what templates know."""
    function: dict[str, Any] = {"name": tool.name, "description": tool.description or ""}
    return {"type": "function", "function": {**function, "parameters": parameters_of(tool)}}


def find_template(path: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The directory's default template: chat_template.jinja, else `chat_template` of tokenizer_config.json."""
    file = path / "chat_template.jinja"
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: {error}", field="chat_template") from None
    found = tokenizer_config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise ModelError(f"{path / 'tokenizer_config.json'}: chat_template is not a text", field="chat_template")
    return found


def _limited(pieces: Iterable[str]) -> str:
    parts, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > _MAX_OUTPUT_CHARS:
            raise InvalidRequest(
                f"messages: the prompt made of them is over {_MAX_OUTPUT_CHARS} characters", field="messages"
            )
        parts.append(piece)
    return "".join(parts)


def _explain(error: jinja2.TemplateError) -> str:
    line = getattr(error, "lineno", None)
    return f"line {line}: {error.message}" if line else str(error.message)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; prompts want plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
