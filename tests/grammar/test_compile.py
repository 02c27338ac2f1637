"""Which grammars come through, and how the others are refused: by name, and before they can cost anybody anything."""

from __future__ import annotations

import json

import pytest
from demo_grammars import compiled

from llmos.errors import InvalidRequest
from llmos.protocol import limits
from llmos.services.grammar.repeats import most_repeats


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + '{"type":"null"}' + "}" * depth


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        {"type": ["string", "null"]},
        {"type": "object"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}},
        {"enum": [1, "a", None, {"b": []}]},
        {"type": "string", "pattern": "^(a+)+$"},
        {"type": "string", "format": "date-time"},
        {"type": "array", "items": {"type": "integer"}, "minItems": 100_000},
        {"type": "string", "maxLength": 10**9},
        {"type": "object", "title": "t", "description": "d", "default": {}, "examples": [1], "$comment": "c"},
    ],
    ids=str,
)
def test_schemas_that_can_be_kept(schema):
    assert compiled("json_schema", json.dumps(schema)).kind == "json_schema"


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {"type": "string"}}, "keyword 'not' at #"),
        ({"if": {}, "then": {}}, "keyword 'if' at #"),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "keyword 'uniqueItems' at #/properties/a"),
        ({"type": "object", "minProperties": 2}, "keyword 'minProperties'"),
        ({"anyOf": [{"type": "array", "contains": {}}]}, "keyword 'contains' at #/anyOf/0"),
        ({"type": "string", "nonsense": 1}, "keyword 'nonsense'"),
        ({"type": "string", "format": "colour"}, "colour"),
        ({"x-guidance": {"lenient": True}}, "keyword 'x-guidance'"),
        ({"$ref": "http://example.com/schema"}, "#/$ref: only references into the same schema"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 5}]}, "keyword 'oneOf' at #"),
        ({"type": "text"}, '"text" is not a type'),
        (False, "`false` allows no output"),
        ({"$ref": "#"}, "grammar: "),
        ({"type": "object", "required": ["x"], "properties": {}, "additionalProperties": False}, "'x'"),
        ({"type": "string", "pattern": "(?=a)b"}, "grammar: "),
        (3, "a schema is an object"),
        ({"anyOf": []}, "not a list of schemas"),
        ({"enum": []}, "not a list with entries"),
        ({"properties": []}, "not an object"),
    ],
    ids=str,
)
def test_what_a_schema_can_not_be_kept_for_is_named(schema, named):
    with pytest.raises(InvalidRequest) as caught:
        compiled("json_schema", json.dumps(schema))
    assert named in caught.value.message
    assert caught.value.field == "grammar"


BOMBS = {
    "nested schema": ("json_schema", nested(2000)),
    "deep schema": ("json_schema", nested(limits.MAX_GRAMMAR_DEPTH + 1)),
    "huge enum": ("json_schema", json.dumps({"enum": list(range(limits.MAX_GRAMMAR_ITEMS))})),
    "many bytes": ("json_schema", json.dumps({"const": "x" * limits.MAX_GRAMMAR_BYTES})),
    "all of any of": ("json_schema", json.dumps({"allOf": [
        {"anyOf": [{"properties": {f"p{i}": {"minLength": j}}} for j in range(4)]} for i in range(12)]})),
    "circle": ("json_schema", '{"$ref":"#/$defs/a","$defs":{"a":{"allOf":[{"$ref":"#/$defs/a"},{"type":"object"}]}}}'),
    "multiple of a large one": ("json_schema", '{"type":"integer","multipleOf":987654321}'),
    "nested repetitions": ("regex", "(a{1000}){1000}"),
    "nested optional repetitions": ("regex", "((a{0,100}){0,100}){0,100}b"),
    "nested repetitions in a schema": ("json_schema", '{"type":"string","pattern":"(a{1000}){1000}"}'),
    "deep groups": ("regex", "(" * 2000 + ")" * 2000),
    "empty regex": ("regex", ""),
    "empty schema text": ("json_schema", ""),
    "empty lark": ("lark", ""),
    "long regex": ("regex", "a" * (limits.MAX_REGEX_BYTES + 1)),
    "terminals of terminals": ("lark", "start: B\nA: /a/{1000}\nB: A{1000}"),
    "terminal of a repeated regex": ("lark", "start: B\nB: /a{1000}/~1..1000"),
    "schema in lark": ("lark", 'start: %json {"type": "string", "pattern": "(a{1000}){1000}"}'),
    "two to the fortieth": ("lark", "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(40)) + '\nr40: "a"'),
    "deep lark": ("lark", "start: " + "(" * 3000 + '"a"' + ")" * 3000),
    "and of automata": ("lark", "start: A\nA: /(.*a.{30})/ & /(.*b.{30})/ & /.*c.{30}/"),
    "no choice": ("choice", "[]"),
    "empty choice": ("choice", '["a", ""]'),
    "choice of numbers": ("choice", "[1]"),
    "settings": ("lark", '%llguidance {"test_trace": true}\nstart: "a"'),
    "temperature": ("lark", "start: a\na[temperature=0.5]: /.*/"),
    "gbnf": ("gbnf", "root ::= ((("),
    "kind": ("xml", "<a/>"),
    "text of json_object": ("json_object", "{}"),
    "half a character": ("choice", '["\\ud800"]'),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused(kind, text):
    with pytest.raises(InvalidRequest) as caught:
        compiled(kind, text)
    assert caught.value.field == "grammar"
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(a+)+$"),
        ("regex", "(x+x+)+y"),
        ("regex", r"\p{L}{1,500}"),
        ("regex", "(a|b)*a(a|b){60}"),
        ("lark", 'start: s\ns: s s | "a" |'),
        ("lark", "%import common.INT\nstart: INT"),
        ("lark", 'start: b{30}\nb: A{30}\nA: "a"'),
        ("gbnf", 'root ::= "yes" | "no" [a-z]+'),
        ("choice", '["a", "b\\n\\"", "末", "a"]'),
        ("json_object", ""),
    ],
)
def test_what_only_looks_bad(kind, text):
    compiled(kind, text)


def test_one_of_that_excludes_is_any_of():
    cat = {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]}
    dog = {"type": "object", "properties": {"kind": {"enum": ["dog", "wolf"]}}, "required": ["kind"]}
    for branches in (
        [cat, dog],
        [cat, {"type": "null"}],
        [{"const": 1}, {"enum": [2, 3]}],
        [{"type": "string"}, False],
    ):
        made = json.loads(compiled("json_schema", json.dumps({"oneOf": branches})).text)
        assert made == {"anyOf": branches}
    both = compiled("json_schema", json.dumps({"oneOf": [cat, dog], "anyOf": [{"type": "object"}]}))
    assert json.loads(both.text) == {"allOf": [{"anyOf": [{"type": "object"}]}], "anyOf": [cat, dog]}
    for branches in ([cat, cat], [{"type": "number"}, {"type": "integer"}], [{"properties": {}}, {"type": "null"}]):
        with pytest.raises(InvalidRequest, match="oneOf"):
            compiled("json_schema", json.dumps({"oneOf": branches}))


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        ("abc", 1),
        ("a{3}", 3),
        ("(a{10}b){20}", 200),
        ("(a{10}|b{2,30}){,4}c{99}", 120),
        ("a{2}{3}", 6),
        ("((a){2}){3}{4}", 24),
        (r"\(a{5}\){7}", 7),
        ("[(a{9}]{2}", 2),
        ("[]{9}]{2}", 2),
        ("[a[b]{9}]{3}", 3),
        (r"[\]{9}]{4}", 4),
        ("a{x}", 1),
        (")a{2}", 2),
        ("a{99999999999999}", 999999999),
    ],
)
def test_repetitions_multiply(pattern, most):
    assert most_repeats(pattern) == most
