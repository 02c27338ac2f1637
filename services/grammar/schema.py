"""JSON schemas: what of them can be kept is kept, everything else is refused by name. Pure.

What comes out is small, not deep, has no keyword that would be ignored, and no `oneOf`: one whose branches exclude each other is an
`anyOf`, any other could not be kept.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

from llmos.errors import InvalidRequest
from llmos.protocol import limits
from llmos.services.grammar.repeats import most_repeats

_ONE = frozenset({"additionalProperties", "items", "additionalItems"})  # a schema
_LISTS = frozenset({"anyOf", "allOf", "oneOf", "prefixItems"})
_TABLES = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_VALUES = frozenset(
    [
        *("type", "enum", "const", "required", "format", "pattern", "minLength", "maxLength", "minItems", "maxItems"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "$ref"),
    ]
)
# They say something to people, nothing about what is valid. `discriminator` (OpenAPI) only names a key that a oneOf has anyway.
_REMARKS = frozenset(
    [
        *("$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly"),
        *("writeOnly", "discriminator"),
    ]
)
# RFC 3339 has a year 0000, which Python and many others that read dates do not.
_YEAR = "^(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})-"
_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})


def normal_schema(text: str, field: str) -> str:
    """The schema as compact JSON text. Raises `InvalidRequest`."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field}: not JSON: {error}", field=field) from None
    walk = _Walk(field)
    return json.dumps(walk.schema(schema, "#", 0), ensure_ascii=False, separators=(",", ":"))


class _Walk:
    def __init__(self, field: str) -> None:
        self._field = field
        self._items = 0

    def schema(self, schema: Any, where: str, depth: int) -> Any:
        """A copy, with what is not needed left out."""
        self._count(1, where)
        if depth > limits.MAX_GRAMMAR_DEPTH:
            raise self._error(f"{where[:80]}...: deeper than {limits.MAX_GRAMMAR_DEPTH} schemas")
        if isinstance(schema, bool):
            if depth == 0:
                if not schema:
                    raise self._error("the schema `false` allows no output")
                return {}
            return schema
        if not isinstance(schema, dict):
            raise self._error(f"{where}: a schema is an object, not {json.dumps(schema)[:40]}")
        kept = {key: self._keyword(key, value, where, depth) for key, value in schema.items() if key not in _REMARKS}
        for key in ("$schema", "$id"):
            if key in schema:
                kept[key] = schema[key]
        if "oneOf" in kept:
            self._replace_one_of(kept, where)
        if kept.get("format") in ("date", "date-time"):
            kept.setdefault("pattern", _YEAR)
        return kept

    def _keyword(self, key: str, value: Any, where: str, depth: int) -> Any:
        here = f"{where}/{key}"
        if key in _ONE and not isinstance(value, list):
            return self.schema(value, here, depth + 1)
        if key in _LISTS or key in _ONE:
            if not isinstance(value, list) or not value:
                raise self._error(f"{here}: not a list of schemas")
            return [self.schema(entry, f"{here}/{at}", depth + 1) for at, entry in enumerate(value)]
        if key in _TABLES:
            if not isinstance(value, dict):
                raise self._error(f"{here}: not an object")
            if key == "patternProperties":
                for pattern in value:
                    self._check_pattern(pattern, here)
            return {name: self.schema(entry, f"{here}/{name}", depth + 1) for name, entry in value.items()}
        if key not in _VALUES:
            raise self._error(f"keyword {key[:64]!r} at {where} is not supported")
        self._check_value(key, value, here)
        return value

    def _check_value(self, key: str, value: Any, here: str) -> None:
        if key == "type":
            names = value if isinstance(value, list) else [value]
            if not names or not all(isinstance(name, str) and name in _TYPES for name in names):
                raise self._error(f"{here}: {json.dumps(value)[:60]} is not a type of JSON")
        elif key in ("enum", "required"):
            if not isinstance(value, list) or (key == "enum" and not value):
                raise self._error(f"{here}: not a list with entries")
            self._count(len(value), here)
        elif key == "pattern":
            self._check_pattern(value, here)
        elif key == "$ref" and (not isinstance(value, str) or not value.startswith("#")):
            raise self._error(f"{here}: only references into the same schema are followed")

    def _check_pattern(self, pattern: Any, here: str) -> None:
        if not isinstance(pattern, str):
            raise self._error(f"{here}: not a text")
        check_regex(pattern, f"{self._field}: {here}", self._field)

    def _replace_one_of(self, schema: dict[str, Any], where: str) -> None:
        branches = schema.pop("oneOf")
        if not all(_exclude(one, other) for one, other in itertools.combinations(branches, 2)):
            problem = (
                "is supported only if its branches differ in `type`, or in a required property with `const` or `enum`"
            )
            raise self._error(f"keyword 'oneOf' at {where} {problem}")
        if "anyOf" in schema:
            schema["allOf"] = [*schema.get("allOf", ()), {"anyOf": schema.pop("anyOf")}]
        schema["anyOf"] = branches

    def _count(self, number: int, where: str) -> None:
        self._items += number
        if self._items > limits.MAX_GRAMMAR_ITEMS:
            what = "schemas, properties and enum entries"
            raise self._error(f"more than {limits.MAX_GRAMMAR_ITEMS} {what} (at {where[:80]})")

    def _error(self, problem: str) -> InvalidRequest:
        return InvalidRequest(f"{self._field}: {problem}", field=self._field)


def check_regex(pattern: str, what: str, field: str) -> None:
    """Raise `InvalidRequest` for one whose automaton would be too large. `what` names it."""
    if len(pattern.encode("utf-8", "surrogatepass")) > limits.MAX_REGEX_BYTES:
        raise InvalidRequest(f"{what}: a pattern of more than {limits.MAX_REGEX_BYTES} bytes", field=field)
    if (repeats := most_repeats(pattern)) > limits.MAX_GRAMMAR_REPEATS:
        text = f"{what}: nested repetitions come to {repeats}, the limit is {limits.MAX_GRAMMAR_REPEATS}"
        raise InvalidRequest(text, field=field)


def _exclude(one: Any, other: Any) -> bool:
    """Can no value fit both? Only what is plain to see counts."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one is False or other is False
    first, second = _possible(one), _possible(other)
    if first is not None and second is not None:
        return not first & second
    if _types(one).isdisjoint(_types(other)):
        return True
    if _types(one) != {"object"} or _types(other) != {"object"}:
        return False
    for name in set(one.get("required", ())) & set(other.get("required", ())):
        mine, theirs = (branch.get("properties", {}).get(name) for branch in (one, other))
        if mine is not None and theirs is not None and _exclude(mine, theirs):
            return True
    return False


def _possible(schema: dict[str, Any]) -> set[str] | None:
    """The values that it lists, as JSON; None if it lists none."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return None if values is None else {json.dumps(value, sort_keys=True) for value in values}


def _types(schema: dict[str, Any]) -> set[str]:
    """Types that a value may have; an integer is a number, too."""
    listed = schema.get("type", sorted(_TYPES))
    types = {listed} if isinstance(listed, str) else set(listed)
    return types | {"integer"} if "number" in types else types
