"""A call that a grammar makes certain is one that the parser of the same family reads, with arguments that fit the schema."""

from __future__ import annotations

import json
import random

import jsonschema
import numpy as np
import pytest
from demo_grammars import DEMO, vocabulary
from tokenizers import Tokenizer

from llmos.protocol.messages import Tool, ToolFormat
from llmos.services.grammar.compile import normal
from llmos.services.grammar.follow import Follower, num_words
from llmos.tools import CallArguments, CallBegin, CallEnd, CallParser, call_id, find_family, forced_grammar

TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "why": {"type": "string", "maxLength": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
COLOUR = {
    "type": "object",
    "properties": {"c": {"enum": ["red", 'bl"ue']}},
    "required": ["c"],
    "additionalProperties": False,
}
TOOLS = (Tool("add", "adds", json.dumps(ADD)), Tool("pick-colour", None, json.dumps(COLOUR)), Tool("now"))
SCHEMAS = {"add": ADD, "pick-colour": COLOUR, "now": {"type": "object", "maxProperties": 0}}


def random_output(grammar, seed: int) -> str:
    rng = random.Random(seed)
    follower, output = Follower(vocabulary(), normal(grammar, vocabulary()), (1,)), []
    mask = np.zeros(num_words(2048), dtype=np.int32)
    while True:
        assert follower.fill(mask), follower.problem
        tokens = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        if 1 in tokens and len(output) > 40:
            tokens = [1]
        token = rng.choice(tokens)
        if token == 1:
            return TOKENIZER.decode(output, skip_special_tokens=False)
        output.append(token)
        follower.follow(output)


def calls_in(family: str, text: str) -> list[tuple[str, dict]]:
    found: list[list[str]] = []
    parser = CallParser(family, SCHEMAS)
    for event in parser.push(text) + parser.finish():
        if isinstance(event, CallBegin):
            found.append([event.name, ""])
        elif isinstance(event, CallArguments):
            found[-1][1] += event.text
        else:
            assert isinstance(event, CallEnd), event
            assert event.is_complete
    return [(name, json.loads(arguments)) for name, arguments in found]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("family", "marker"), [("hermes", None), ("llama3", None), ("mistral", None)])
@pytest.mark.parametrize("choice", ["required", "function:pick-colour"])
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_are_read_back_and_fit(family, marker, choice, parallel, seed):
    text = random_output(forced_grammar(ToolFormat(family, marker), TOOLS, choice, parallel=parallel), seed)
    calls = calls_in(family, text)
    assert calls
    assert parallel or len(calls) == 1
    for name, arguments in calls:
        assert choice in ("required", f"function:{name}")
        jsonschema.validate(arguments, SCHEMAS[name])


def test_a_mark_that_is_a_special_token_is_that_token():
    grammar = normal(forced_grammar(ToolFormat("mistral", 3), TOOLS, "required"), vocabulary())
    follower = Follower(vocabulary(), grammar, (1,))
    mask = np.zeros(num_words(2048), dtype=np.int32)
    follower.fill(mask)
    assert np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist() == [3]


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{{ messages }}", None),
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("{% if tools %}<tool_call><function=f>{% endif %}", None),
        ("{{ tools }}[TOOL_CALLS]", "mistral"),
        ('{{ tools }}<|python_tag|> {"name": f, "parameters": g}', "llama3"),
        ("{{ tools }}", None),
        ("{{ mytools }}<tool_call>", None),
    ],
)
def test_the_family_shows_in_the_template(template, family):
    assert find_family(template) == family


def test_ids_are_what_every_template_accepts():
    ids = {call_id(rid, index) for rid in range(50) for index in range(4)}
    assert len(ids) == 200
    assert all(len(found) == 9 and found.isalnum() for found in ids)
