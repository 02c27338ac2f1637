"""Masks against a definition that knows no grammars, and the state as a pure function of the tokens."""

from __future__ import annotations

import json
import random

import jsonschema
import numpy as np
import pytest
from demo_grammars import DEMO, compiled, vocabulary
from tokenizers import Tokenizer

from llmos.services.grammar.follow import Follower, num_words

TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
VOCAB = 2048
STOPS = (0, 3)


def allowed(follower: Follower) -> tuple[bool, set[int]]:
    mask = np.zeros(num_words(VOCAB), dtype=np.int32)
    possible = follower.fill(mask)
    return possible, set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def walk(kind: str, text: str, seed: int, limit: int = 200) -> list[int]:
    """A random output, without what ended it."""
    rng = random.Random(seed)
    follower, output = Follower(vocabulary(), compiled(kind, text), STOPS), []
    while len(output) < limit:
        possible, tokens = allowed(follower)
        assert possible
        token = rng.choice(sorted(tokens))
        if token in STOPS:
            break
        output.append(token)
        follower.follow(output)
    return output


def decoded(output: list[int]) -> str:
    return TOKENIZER.decode(output, skip_special_tokens=False)


@pytest.mark.parametrize("seed", range(3))
def test_a_choice_allows_exactly_what_goes_on_to_one(seed):
    """The reference: a token may come if the text with it begins one of the choices."""
    choices = ["yes", "yesterday", "no", "nothing at all", "12"]
    texts = {i: vocabulary().decode_str([i]) for i in range(VOCAB) if not vocabulary().is_special_token(i)}
    output = walk("choice", json.dumps(choices), seed)
    assert decoded(output) in choices
    follower = Follower(vocabulary(), compiled("choice", json.dumps(choices)), STOPS)
    for length in range(len(output) + 1):
        follower.follow(output[:length])
        so_far = decoded(output[:length])
        wanted = {i for i, text in texts.items() if text and any(c.startswith(so_far + text) for c in choices)}
        found = allowed(follower)[1]
        if sum(choice.startswith(so_far) for choice in choices) > 1 or so_far in choices:
            assert found == wanted | (set(STOPS) if so_far in choices else set())
        else:  # what follows is certain: the tokenizer's own way to write it is enough
            assert found
            assert found <= wanted


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": -5, "maximum": 90}, "b": {"enum": ["x", None]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_the_state_is_a_fold_over_the_tokens(seed):
    """Followed token by token, in jumps, or from nothing: the same masks."""
    output = walk("json_schema", json.dumps(SCHEMA), seed)
    jsonschema.validate(json.loads(decoded(output)), SCHEMA)
    grammar = compiled("json_schema", json.dumps(SCHEMA))
    steady, jumping = (Follower(vocabulary(), grammar, STOPS) for _ in range(2))
    for length in range(len(output) + 1):
        steady.follow(output[:length])
        anew = Follower(vocabulary(), grammar, STOPS)
        anew.follow(output[:length])
        assert allowed(anew) == allowed(steady)
        if length % 3 == 0:
            jumping.follow(output[:length])
            assert allowed(jumping) == allowed(steady)


@pytest.mark.parametrize("kind", ["date", "date-time"])
def test_there_is_no_year_0(kind):
    for text, possible in (('"0001-02-28', True), ('"2026-02-28', True), ('"0000-', False)):
        follower = Follower(
            vocabulary(), compiled("json_schema", json.dumps({"format": kind, "type": "string"})), STOPS
        )
        follower.follow(TOKENIZER.encode(text, add_special_tokens=False).ids)
        assert allowed(follower)[0] == possible


def test_only_a_stop_token_follows_a_complete_output_and_then_nothing_is_asked():
    follower = Follower(vocabulary(), compiled("regex", "[0-9]{2}"), STOPS)
    assert allowed(follower)[1].isdisjoint(STOPS)
    digits = TOKENIZER.encode("42", add_special_tokens=False).ids
    follower.follow(digits)
    assert allowed(follower) == (True, set(STOPS))
    follower.follow([*digits, STOPS[1]])
    assert follower.has_ended
    assert len(allowed(follower)[1]) == VOCAB


def test_a_token_that_the_grammar_does_not_allow_is_a_problem():
    follower = Follower(vocabulary(), compiled("regex", "[0-9]{2}"), STOPS)
    follower.follow(TOKENIZER.encode("x", add_special_tokens=False).ids)
    assert allowed(follower) == (False, set())
    assert follower.problem


def test_a_vocabulary_wider_than_the_tokenizer_has_nothing_there():
    follower = Follower(vocabulary(), compiled("regex", ".*"), STOPS)
    mask = np.full(num_words(4096), -1, dtype=np.int32)
    assert follower.fill(mask)
    assert not mask[num_words(VOCAB) :].any()
