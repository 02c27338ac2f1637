"""From a normal grammar to llguidance's own form: cheap, and the same wherever it is done."""

from __future__ import annotations

from llguidance import LLMatcher

from llmos.protocol.params import NORMAL_KINDS, Grammar

# One line, as `json.dumps` writes it. Free white space would let a model that is lost write blanks to the end of its context.
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def compiled(grammar: Grammar) -> str:
    assert grammar.kind in NORMAL_KINDS, f"{grammar.kind} is not normal"
    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_FORM)  # type: ignore[arg-type]
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    return LLMatcher.grammar_from_lark(grammar.text)
