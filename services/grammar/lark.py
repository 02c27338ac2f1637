"""Grammars in llguidance's dialect of Lark: JSON schemas inside are held to the same rules as those that come alone, settings of the
library are nobody's business, and terminals are kept from growing without bound. Everything else the compiler says. Pure.
"""

from __future__ import annotations

import json
import re

from llmos.errors import InvalidRequest
from llmos.protocol import limits
from llmos.services.grammar.compiled import JSON_FORM
from llmos.services.grammar.repeats import most_repeats
from llmos.services.grammar.schema import normal_schema

_JSON = re.compile(r"%json\s*(?=\{)")
_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|\#[^\n]*)
      | (?P<string>"(?:[^"\\\n]|\\.)*"i?)
      | (?P<regex>/(?:[^/\\\n]|\\.)+/[a-z]*)
      | (?P<special><[^<>\s]*>)
      | (?P<define>[?!]?[A-Za-z_][A-Za-z0-9_]*(?:\.-?\d+)?(?P<settings>\[[^\]\n]*\])?\s*:)
      | (?P<name>[A-Za-z_][A-Za-z0-9_-]*)
      | (?P<count>\{\s*(?P<low>\d*)\s*(?:,\s*(?P<high>\d*)\s*)?\}|~\s*(?P<from>\d+)(?:\s*\.\.\s*(?P<to>\d+))?)
      | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)


def check_lark(text: str, field: str) -> str:
    """The grammar, with its schemas made normal. Raises `InvalidRequest`."""
    text, plain = _normal_schemas(text, field)
    _check_settings(plain, field)
    repeats = _Terminals(plain).most_repeats()
    if repeats > limits.MAX_GRAMMAR_REPEATS:
        problem = f"repetitions of terminals come to {repeats}, the limit is {limits.MAX_GRAMMAR_REPEATS}"
        raise InvalidRequest(f"{field}: {problem}", field=field)
    return text


def _normal_schemas(text: str, field: str) -> tuple[str, str]:
    """The grammar with schemas made normal, and without any."""
    parts, plain = [], []
    at = 0
    while found := _JSON.search(text, at):
        try:
            _, end = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{field}: what follows %json is not JSON: {error}", field=field) from None
        schema = json.loads(normal_schema(text[found.end() : end], field))
        form = json.dumps({"x-guidance": JSON_FORM, **schema}, ensure_ascii=False)
        parts += [text[at : found.end()], form]
        plain += [text[at : found.start()], " json_schema "]
        at = end
    return "".join([*parts, text[at:]]), "".join([*plain, text[at:]])


def _check_settings(text: str, field: str) -> None:
    if "%llguidance" in text:
        raise InvalidRequest(f"{field}: %llguidance is not supported", field=field)
    for found in _TOKEN.finditer(text):
        if "temperature" in (found["settings"] or ""):
            raise InvalidRequest(f"{field}: temperature is set for the whole output, not in a grammar", field=field)


class _Terminals:
    """What terminals consist of. Rules may repeat as they like: a parser keeps count of them, an automaton would have to grow."""

    def __init__(self, text: str) -> None:
        self._bodies: dict[str, list[re.Match[str]]] = {}
        self._bounds: dict[str, int] = {}
        body: list[re.Match[str]] = []
        for token in _TOKEN.finditer(text):
            if token["define"]:
                name = re.split(r"[.\[:\s]", token["define"].lstrip("?!"))[0]
                body = self._bodies.setdefault(name, [])
            elif not token["space"]:
                body.append(token)

    def most_repeats(self) -> int:
        return max([self._regexes(), *(self._bound(name) for name in self._bodies if name.isupper())])

    def _regexes(self) -> int:
        return max((_own(token) for body in self._bodies.values() for token in body), default=1)

    def _bound(self, name: str) -> int:
        if name not in self._bounds:
            self._bounds[name] = 1  # one that refers to itself is refused by the compiler
            self._bounds[name] = self._most(self._bodies.get(name, []))
        return self._bounds[name]

    def _most(self, body: list[re.Match[str]]) -> int:
        groups, last = [1], 1
        for token in body:
            if token["count"]:
                numbers = [token[key] for key in ("low", "high", "from", "to")]
                last *= max(1, *(int(number[:9]) for number in numbers if number))
            elif token["other"] == "(":
                groups.append(1)
            elif token["other"] == ")" and len(groups) > 1:
                last = groups.pop()
            elif token["other"] not in ("*", "+", "?"):
                last = self._bound(token["name"]) if token["name"] else _own(token)
            groups[-1] = max(groups[-1], last)
        return max(groups)


def _own(token: re.Match[str]) -> int:
    return most_repeats(token["regex"]) if token["regex"] else 1
