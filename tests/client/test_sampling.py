"""Keyword arguments become `SamplingParams`; what is refused names itself."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from llmos.client.options import GenerateOptions, OutputOptions, SampleOptions, Sampling, SpawnOptions
from llmos.client.sampling import OPTIONS, merge_params, refuse_unknown
from llmos.errors import InvalidRequest
from llmos.protocol.params import Grammar, SamplingParams


def test_keyword_arguments_win_over_params() -> None:
    base = SamplingParams(temperature=0.5, top_k=7)
    merged = merge_params(base, {"temperature": 0, "stop": "END", "logit_bias": {5: 1}, "stop_token_ids": [3]})
    assert merged == SamplingParams(
        temperature=0.0, top_k=7, stop=("END",), logit_bias=((5, 1.0),), stop_token_ids=(3,)
    )
    assert merge_params(None, {}) == SamplingParams()


def test_the_typed_options_are_the_fields() -> None:
    assert Sampling.__optional_keys__ == {"params", *OPTIONS}
    placement = {"model", "nice", "parent", "after"}
    assert SpawnOptions.__optional_keys__ == placement | {"client_request_id"}
    assert OutputOptions.__optional_keys__ == Sampling.__optional_keys__ | {"deadline_s", "timeout_s"}
    assert SampleOptions.__optional_keys__ == OutputOptions.__optional_keys__ | placement
    assert GenerateOptions.__optional_keys__ == SampleOptions.__optional_keys__ | {
        "client_request_id",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
    }


BAD_PARAMS: list[tuple[dict[str, Any], str, str]] = [
    ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"max_new_tokens": 1}, "max_new_tokens", "did you mean 'max_tokens'"),
    ({"zzzz": 1}, "zzzz", "did you mean"),
    ({"temperature": math.nan}, "temperature", "nan"),
    ({"temperature": "hot"}, "temperature", "got `str`"),
    ({"top_p": 2}, "top_p", "outside"),
    ({"max_tokens": 0}, "max_tokens", "outside"),
    ({"max_tokens": 10**12}, "max_tokens", "outside"),
    ({"max_tokens": 10**30}, "max_tokens", "outside"),
    ({"max_tokens": 1.5}, "max_tokens", "float"),
    ({"max_tokens": True}, "max_tokens", "bool"),
    ({"stop": ["a", 5]}, "stop", "int"),
    ({"stop": ["\ud800"]}, "stop", "surrogate"),
    ({"stop": [""]}, "stop", "1 to 128"),
    ({"seed": -1}, "seed", "outside"),
    ({"logprobs": object()}, "logprobs", "object"),
]


@pytest.mark.parametrize(("sampling", "field", "words"), BAD_PARAMS, ids=[f"{row[1]}: {row[2]}" for row in BAD_PARAMS])
def test_bad_parameters_name_themselves(sampling: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        merge_params(None, sampling)
    assert caught.value.field == field


def test_params_have_to_be_params() -> None:
    with pytest.raises(InvalidRequest, match="expected SamplingParams, got dict"):
        merge_params({}, {})  # type: ignore[arg-type]


def test_a_misspelt_option_names_its_neighbour() -> None:
    refuse_unknown({"nice": 1}, SpawnOptions.__optional_keys__)
    with pytest.raises(InvalidRequest, match="unknown option 'deadline'; did you mean 'deadline_s'") as caught:
        refuse_unknown({"deadline": 1}, GenerateOptions.__optional_keys__)
    assert caught.value.field == "deadline"


class Person:
    @staticmethod
    def model_json_schema() -> dict[str, Any]:
        return {"type": "object"}


@pytest.mark.parametrize(
    ("options", "grammar"),
    [
        ({"json_schema": {"type": "null"}}, Grammar("json_schema", '{"type": "null"}')),
        ({"json_schema": '{"type":"null"}'}, Grammar("json_schema", '{"type":"null"}')),
        ({"json_schema": True}, Grammar("json_object")),
        ({"json_schema": Person}, Grammar("json_schema", '{"type": "object"}')),
        ({"regex": "a+"}, Grammar("regex", "a+")),
        ({"regex": re.compile("a+")}, Grammar("regex", "a+")),
        ({"choice": ["é", "b"]}, Grammar("choice", '["é", "b"]')),
        ({"choice": {"a": 1}.keys()}, Grammar("choice", '["a"]')),
        ({"grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
        ({"grammar": Grammar("gbnf", "root ::= [a-z]")}, Grammar("gbnf", "root ::= [a-z]")),
        ({"grammar": None, "regex": None}, None),
    ],
    ids=str,
)
def test_ways_to_say_what_an_output_looks_like(options: dict[str, Any], grammar: Grammar | None) -> None:
    assert merge_params(None, options).grammar == grammar
    assert merge_params(SamplingParams(grammar=Grammar("json_object")), {"regex": "x"}).grammar == Grammar("regex", "x")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"json_schema": [1]}, "json_schema"),
        ({"json_schema": {"a": {1, 2}}}, "json_schema"),
        ({"regex": 7}, "regex"),
        ({"choice": "yes"}, "choice"),
        ({"choice": 7}, "choice"),
        ({"grammar": 7}, "grammar"),
        ({"grammar": Grammar("regex", "\ud800")}, "grammar"),
        ({"grammar": Grammar("xml", "")}, "grammar"),
        ({"regex": "a", "choice": ["a"]}, "choice"),
        ({"regex": "a", "grammar": "start:"}, "grammar"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
    ids=str,
)
def test_other_ways_are_refused_by_name(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        merge_params(None, options)
    assert caught.value.field == field
