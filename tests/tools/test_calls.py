"""Calls come out of a text the same way wherever it is cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos.tools import CallArguments, CallBegin, CallEnd, CallParser, TextPiece

WEATHER = '{"name": "weather", "arguments": {"city": "Pa\\"}{ris", "days": [1, 2]}}'
CITY = '{"city": "Pa\\"}{ris", "days": [1, 2]}'
LLAMA = WEATHER.replace("arguments", "parameters")


def run(family, text, cuts=(), names=None):
    """(text, [(name, arguments, complete)]) and the events, of `text` cut at `cuts`."""
    parser = CallParser(family, names)
    bounds = [0, *sorted(cuts), len(text)]
    events = [event for a, b in itertools.pairwise(bounds) for event in parser.push(text[a:b])] + parser.finish()
    said, calls = "", {}
    for event in events:
        if isinstance(event, TextPiece):
            said += event.text
        elif isinstance(event, CallBegin):
            assert event.index == len(calls)
            calls[event.index] = [event.name, "", None]
        elif isinstance(event, CallArguments):
            assert calls[event.index][2] is None
            calls[event.index][1] += event.text
        else:
            assert isinstance(event, CallEnd)
            assert calls[event.index][2] is None
            calls[event.index][2] = event.is_complete
    assert parser.num_calls == len(calls)
    return said, [tuple(call) for call in calls.values()]


DONE = ("weather", CITY, True)
CASES = {
    "hermes": ("hermes", f"<tool_call>\n{WEATHER}\n</tool_call>", ("", [DONE])),
    "hermes with text": ("hermes", f"Let me see.\n<tool_call>{WEATHER}</tool_call>", ("Let me see.\n", [DONE])),
    "hermes twice": (
        "hermes",
        f"\n<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>\n{WEATHER}\n</tool_call>\n",
        ("", [DONE, DONE]),
    ),
    "hermes then text": ("hermes", f"<tool_call>{WEATHER}</tool_call>\n Done.", ("Done.", [DONE])),
    "hermes without its end": ("hermes", f"<tool_call>\n{WEATHER}", ("", [DONE])),
    "cut in the arguments": (
        "hermes",
        '<tool_call>\n{"name": "f", "arguments": {"a": 1',
        ("", [("f", '{"a": 1', False)]),
    ),
    "cut in the name": ("hermes", '<tool_call>\n{"name": "f', ('<tool_call>\n{"name": "f', [])),
    "no arguments": ("hermes", '<tool_call>{"name": "f"}</tool_call>', ("", [("f", "{}", True)])),
    "arguments first": (
        "hermes",
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
        ("", [("f", '{"a": 1}', True)]),
    ),
    "other keys": (
        "hermes",
        '<tool_call>{"id": 3, "name": "f", "x": {"y": []}}</tool_call>',
        ("", [("f", "{}", True)]),
    ),
    "no object": ("hermes", "<tool_call>f(1)</tool_call> x", ("<tool_call>f(1)</tool_call> x", [])),
    "arguments are no object": ("hermes", '<tool_call>{"name": "f", "arguments": 3}', ("}", [("f", "", False)])),
    "no name": ("hermes", '<tool_call>{"arguments": {}} ok', ('<tool_call>{"arguments": {}} ok', [])),
    "almost a mark": ("hermes", "a < b <tool <tool_cal", ("a < b <tool <tool_cal", [])),
    "only space": ("hermes", " \n", (" \n", [])),
    "llama": ("llama3", LLAMA, ("", [DONE])),
    "llama with its tag": ("llama3", f"<|python_tag|>{LLAMA}", ("", [DONE])),
    "llama twice": ("llama3", f"{LLAMA}; {LLAMA}", ("", [DONE, DONE])),
    "llama says an object": ("llama3", '{"name": "Bob", "age": 3}', ('{"name": "Bob", "age": 3}', [])),
    "llama text": ("llama3", 'It is {"name": 3}.', ('It is {"name": 3}.', [])),
    "mistral": ("mistral", f"[TOOL_CALLS] [{WEATHER}]", ("", [DONE])),
    "mistral twice": ("mistral", f"[TOOL_CALLS][{WEATHER}, {WEATHER}] ", ("", [DONE, DONE])),
    "mistral text": ("mistral", "[TOOL] [1, 2]", ("[TOOL] [1, 2]", [])),
    "no family": (None, f"<tool_call>{WEATHER}", (f"<tool_call>{WEATHER}", [])),
}


@pytest.mark.parametrize(("family", "text", "expected"), CASES.values(), ids=CASES)
def test_calls_wherever_the_text_is_cut(family, text, expected):
    names = {"weather", "f"}
    assert run(family, text, names=names) == expected
    assert run(family, text, range(1, len(text)), names) == expected
    for cut in range(1, len(text)):
        assert run(family, text, [cut], names) == expected


def test_arguments_come_as_they_are_written():
    parser = CallParser("hermes")
    parser.push('<tool_call>{"name": "f", "argum')
    assert parser.push('ents": {"a": "b') == [CallArguments(0, '{"a": "b')]
    assert parser.push('c"') == [CallArguments(0, 'c"')]
    assert parser.push("}}") == [CallArguments(0, "}"), CallEnd(0, True)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    family=st.sampled_from(["hermes", "llama3", "mistral"]),
    arguments=st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), min_size=1, max_size=3),
    ascii_only=st.booleans(),
    data=st.data(),
)
def test_any_arguments_come_back(family, arguments, ascii_only, data):
    bodies = [json.dumps({"name": "f", "arguments": value}, ensure_ascii=ascii_only) for value in arguments]
    if family == "hermes":
        text = "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)
    elif family == "llama3":
        text = "; ".join(bodies)
    else:
        text = f"[TOOL_CALLS] [{', '.join(bodies)}]"
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    said, calls = run(family, text, cuts)
    assert said == ""
    assert [(name, json.loads(written), done) for name, written, done in calls] == [("f", v, True) for v in arguments]


@given(family=st.sampled_from(["hermes", "llama3", "mistral"]), data=st.data())
def test_any_text_gives_the_same_wherever_it_is_cut(family, data):
    parts = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "{", "}", "[", "]", ",", ":", ";", " ", "x",
             '"name"', '"arguments"', '"f"', "<", "\\", '"', "1"]  # fmt: skip
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=20)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    assert run(family, text, cuts) == run(family, text)
