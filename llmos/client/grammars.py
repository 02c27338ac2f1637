"""From the ways in which a caller says what an output has to look like to one `Grammar`, pure.

json_schema=   a dict, JSON text, a pydantic model (anything with `model_json_schema`), or True: any JSON object
regex=         the whole output matches it
choice=        the output is one of these texts
grammar=       a `Grammar`, or a text in Lark (llguidance's dialect)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from llmos.client.checked import utf8_size
from llmos.errors import InvalidRequest
from llmos.protocol.params import Grammar


def take_grammar(options: dict[str, Any]) -> None:
    """Replace what `options` say by one `grammar`."""
    given = [name for name in (*_MAKERS, "grammar") if options.get(name) is not None]
    if len(given) > 1:
        raise InvalidRequest(f"{given[0]} and {given[1]}: an output has one grammar", field=given[1])
    for name, make in _MAKERS.items():
        value = options.pop(name, None)
        if value is not None:
            options["grammar"] = make(value)
    if isinstance(options.get("grammar"), str):
        options["grammar"] = Grammar("lark", options["grammar"])
    if isinstance(grammar := options.get("grammar"), Grammar) and isinstance(grammar.text, str):
        utf8_size("grammar", grammar.text)


def _json_schema(value: Any) -> Grammar:
    if value is True:
        return Grammar("json_object")
    if hasattr(value, "model_json_schema"):
        value = value.model_json_schema()
    if isinstance(value, str):
        return Grammar("json_schema", value)
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        raise InvalidRequest(
            f"json_schema: expected a dict, JSON text, a model or True, got {kind}", field="json_schema"
        )
    return Grammar("json_schema", _dumps("json_schema", value))


def _regex(value: Any) -> Grammar:
    pattern = getattr(value, "pattern", value)  # of a compiled one
    if not isinstance(pattern, str):
        raise InvalidRequest(f"regex: expected a str, got {type(value).__name__}", field="regex")
    return Grammar("regex", pattern)


def _choice(value: Any) -> Grammar:
    if isinstance(value, str | Mapping):
        raise InvalidRequest(f"choice: expected texts to choose from, got {type(value).__name__}", field="choice")
    try:
        return Grammar("choice", _dumps("choice", list(value)))
    except TypeError:
        raise InvalidRequest(f"choice: expected texts, got {type(value).__name__}", field="choice") from None


def _dumps(field: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field}: not JSON: {error}", field=field) from None


_MAKERS: dict[str, Callable[[Any], Grammar]] = {"json_schema": _json_schema, "regex": _regex, "choice": _choice}
GRAMMAR_OPTIONS = tuple(_MAKERS)
