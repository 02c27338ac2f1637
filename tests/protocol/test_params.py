from __future__ import annotations

import math
from typing import Any

import pytest

from llmos.errors import InvalidRequest
from llmos.protocol import limits
from llmos.protocol.params import Grammar, SamplingParams

TINY = math.ulp(0.0)
BIG = 2**31 - 1

# field, values at and just inside the limits, values just outside
NUMBERS: list[tuple[str, list[Any], list[Any]]] = [
    ("temperature", [0, 0.0, TINY, 1, 100.0, None], [-TINY, -1, math.nextafter(100, 101), 101]),
    ("top_k", [0, 1, BIG, None], [-1, BIG + 1, 10**18]),
    ("top_p", [TINY, 0.5, 1.0, 1, None], [0.0, 0, -TINY, math.nextafter(1, 2), 2]),
    ("min_p", [0.0, TINY, 1.0, None], [-TINY, math.nextafter(1, 2)]),
    ("repetition_penalty", [TINY, 1.0, 10.0, None], [0.0, -1.0, math.nextafter(10, 11)]),
    ("presence_penalty", [-10.0, 0, 10.0], [math.nextafter(-10, -11), math.nextafter(10, 11)]),
    ("frequency_penalty", [-10.0, 0, 10.0], [math.nextafter(-10, -11), math.nextafter(10, 11)]),
    ("seed", [0, 1, 2**63 - 1, None], [-1, 2**63, 2**64 - 1]),
    ("max_tokens", [1, 2, limits.MAX_TOKENS, None], [0, -1, limits.MAX_TOKENS + 1, 10**12]),
    ("min_tokens", [0, 1, limits.MAX_TOKENS], [-1, limits.MAX_TOKENS + 1]),
    ("logprobs", [0, 1, limits.MAX_LOGPROBS, None], [-1, limits.MAX_LOGPROBS + 1]),
    ("prompt_logprobs", [0, 1, limits.MAX_LOGPROBS, None], [-1, limits.MAX_LOGPROBS + 1]),
]
GOOD = [(field, value) for field, good, _ in NUMBERS for value in good]
BAD = [(field, value) for field, _, bad in NUMBERS for value in bad]
FLOATS = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]

LISTS: list[tuple[str, list[Any], list[Any]]] = [
    (
        "stop",
        [(), ("x",), ("x" * 128,), ("é" * 128,), ("x",) * 16],
        [("",), ("x" * 129,), ("x",) * 17, ("x", "")],
    ),
    ("stop_token_ids", [(), (0,), (BIG,), (1,) * 1024], [(-1,), (BIG + 1,), (1,) * 1025]),
    (
        "logit_bias",
        [(), ((0, 0.0),), ((BIG, 1e4),), ((5, -1e4),), ((1, 1.0),) * 1024],
        [
            ((-1, 0.0),),
            ((BIG + 1, 0.0),),
            ((1, math.nextafter(1e4, 2e4)),),
            ((1, -10001),),
            ((1, 1.0),) * 1025,
            ((1, math.nan),),
        ],
    ),
    (
        "grammar",
        [None, Grammar("json_object"), Grammar("regex", "é" * 2048), Grammar("lark", "a" * 65536)],
        [Grammar("xml"), Grammar("regex", "é" * 2048 + "a"), Grammar("lark", "a" * 65537)],
    ),
]
GOOD += [(field, value) for field, good, _ in LISTS for value in good]
BAD += [(field, value) for field, _, bad in LISTS for value in bad]


@pytest.mark.parametrize(("field", "value"), GOOD, ids=lambda value: str(value)[:24])
def test_values_inside_pass(field: str, value: Any) -> None:
    SamplingParams(**{field: value}).check()


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda value: str(value)[:24])
def test_values_outside_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value}).check()
    assert caught.value.field == field
    assert caught.value.message.startswith(field)


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_finite(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value}).check()
    assert caught.value.field == field


def test_no_output_is_wanted_only_with_scores_of_the_prompt() -> None:
    SamplingParams(max_tokens=0, prompt_logprobs=0).check()
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(max_tokens=0, logprobs=1).check()
    assert caught.value.field == "max_tokens"


def test_min_tokens_may_not_be_above_max_tokens() -> None:
    SamplingParams(min_tokens=5, max_tokens=5).check()
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(min_tokens=6, max_tokens=5).check()
    assert caught.value.field == "min_tokens"


def test_the_first_bad_field_is_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(temperature=-1, top_p=2.0, stop=("",)).check()
    assert caught.value.field == "temperature"


def test_every_field_has_a_case_here() -> None:
    covered = {field for field, *_ in [*NUMBERS, *LISTS]}
    assert covered == set(SamplingParams.__struct_fields__) - {"ignore_eos"}


def test_an_output_with_a_grammar_has_to_be_able_to_end() -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(grammar=Grammar("json_object"), ignore_eos=True).check()
    assert caught.value.field == "ignore_eos"
    assert SamplingParams(grammar=Grammar("json_object"), min_tokens=5).least_output == 0
    assert SamplingParams(min_tokens=5).least_output == 5
