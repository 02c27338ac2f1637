"""From what a client asks for to a normal grammar (json_schema, regex or lark), or to an `InvalidRequest` that says why not.

A grammar that comes out of here was compiled for the model's vocabulary and followed for some tokens, within the processor time that
an executor can spare for one. What a compiler can not promise to end in time is refused before it sees it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
from llguidance import LLTokenizer

from llmos.errors import InvalidRequest
from llmos.protocol import limits
from llmos.protocol.params import Grammar
from llmos.services.grammar.follow import Follower, num_words
from llmos.services.grammar.lark import check_lark
from llmos.services.grammar.schema import check_regex, normal_schema

_WALK = 16  # tokens of one possible output that are tried


def normal(grammar: Grammar, vocabulary: LLTokenizer, field: str = "grammar") -> Grammar:
    """Check, simplify, compile and try. Thread-safe; takes a second at most, but for what only a bug could let through."""
    grammar.check(field)
    made = _MAKERS[grammar.kind](grammar.text, field)
    _try(made, vocabulary, field)
    return made


def _json_schema(text: str, field: str) -> Grammar:
    return Grammar("json_schema", normal_schema(text, field))


def _json_object(text: str, field: str) -> Grammar:
    if text:
        raise InvalidRequest(f"{field}: json_object takes no text", field=field)
    return Grammar("json_schema", '{"type":"object"}')


def _regex(text: str, field: str) -> Grammar:
    if not text:
        raise InvalidRequest(f"{field}: an empty regular expression allows no output", field=field)
    check_regex(text, field, field)
    return Grammar("regex", text)


def _choice(text: str, field: str) -> Grammar:
    try:
        choices = json.loads(text)
    except (ValueError, RecursionError):
        choices = None
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise InvalidRequest(f"{field}: choice takes a JSON array of texts that are not empty", field=field)
    if len(choices) > limits.MAX_GRAMMAR_ITEMS:
        text = f"{field}: {len(choices)} choices, the limit is {limits.MAX_GRAMMAR_ITEMS}"
        raise InvalidRequest(text, field=field)
    return Grammar("lark", f"start: {' | '.join(json.dumps(c, ensure_ascii=False) for c in dict.fromkeys(choices))}\n")


def _lark(text: str, field: str) -> Grammar:
    return Grammar("lark", check_lark(text, field))


def _gbnf(text: str, field: str) -> Grammar:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return _lark(gbnf_to_lark(text).removeprefix("%llguidance {}"), field)
    except InvalidRequest:
        raise
    except Exception as error:  # noqa: BLE001  (a converter that raises what it likes for text that it does not understand)
        raise InvalidRequest(f"{field}: not GBNF: {_first_line(str(error))}", field=field) from None


_MAKERS: dict[str, Callable[[str, str], Grammar]] = {
    "json_schema": _json_schema,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "lark": _lark,
    "gbnf": _gbnf,
}


def _try(grammar: Grammar, vocabulary: LLTokenizer, field: str) -> None:
    """Follow one possible output for a while."""
    started = time.thread_time()
    try:
        follower = Follower(vocabulary, grammar, vocabulary.eos_tokens)
    except ValueError as error:
        raise InvalidRequest(f"{field}: {_first_line(str(error))}", field=field) from None
    mask = np.zeros(num_words(vocabulary.vocab_size), dtype=np.int32)
    output: list[int] = []
    for place in range(_WALK):
        possible = follower.fill(mask)
        if follower.problem:
            raise InvalidRequest(f"{field}: {_first_line(follower.problem)}", field=field)
        if not possible:
            raise InvalidRequest(f"{field}: no output is possible", field=field)
        if (took := time.thread_time() - started) > limits.MAX_GRAMMAR_CPU_S:
            text = f"{field}: it takes {took:.1f} s to compile, the limit is {limits.MAX_GRAMMAR_CPU_S:g} s"
            raise InvalidRequest(text, field=field)
        tokens = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        output.append(int(tokens[(place * 7919) % len(tokens)]))
        follower.follow(output)
        if follower.has_ended:
            return


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0][:300]
