from __future__ import annotations

import functools

import pytest
import tiny_tokenizers as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.services.tokenizer.incremental import DecodePlan
from llmos.services.tokenizer.stop import StopFinder
from llmos.services.tokenizer.stream import TextStream

small_text = st.text(alphabet="ab", max_size=12)
stop_strings = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple)


@functools.cache
def plan_of(kind: str) -> DecodePlan:
    return DecodePlan(tiny.ALL[kind]())


def naive(text: str, stops: tuple[str, ...]) -> tuple[str, str | None, int]:
    """Text shown, stop string found, end of the match: the first end at which any stop string is complete, the longest of those."""
    for end in range(len(text) + 1):
        found = max((stop for stop in stops if text[:end].endswith(stop)), key=len, default=None)
        if found is not None:
            return text[: end - len(found)], found, end
    return text, None, len(text)


@settings(max_examples=1000, deadline=None)
@given(text=small_text, stops=stop_strings, cuts=st.lists(st.integers(1, 4), max_size=12))
def test_any_cut_gives_what_a_search_over_the_whole_text_gives(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    finder = StopFinder(stops)
    shown, at = "", 0
    for size in [*cuts, len(text) + 1]:
        if at >= len(text) or finder.found:
            break
        shown += finder.push(text[at : at + size])
        at += size
    shown += finder.flush()
    assert (shown, finder.found) == naive(text, stops)[:2]


@settings(max_examples=500, deadline=None)
@given(text=small_text, stops=stop_strings)
def test_no_more_is_held_back_than_could_begin_a_stop_string(text: str, stops: tuple[str, ...]) -> None:
    finder = StopFinder(stops)
    shown = finder.push(text)
    if finder.found is None:
        held = text[len(shown) :]
        longest = max(
            (n for n in range(len(text) + 1) if any(s.startswith(text[len(text) - n :]) for s in stops)), default=0
        )
        assert len(held) == longest


def test_examples() -> None:
    finder = StopFinder(("END", "Enough"))
    assert [finder.push(part) for part in ("the E", "nd", " E", "N")] == ["the ", "End", " ", ""]
    assert finder.push("D after") == ""
    assert finder.found == "END"


def test_the_longest_of_those_that_end_together_wins() -> None:
    finder = StopFinder(("b", "ab"))
    assert finder.push("xab") == "x"
    assert finder.found == "ab"


def test_a_complete_stop_string_does_not_wait_for_a_longer_one() -> None:
    finder = StopFinder(("ab", "abc"))
    assert finder.push("xab") == "x"
    assert finder.found == "ab"


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "byte_fallback"])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_stream_is_a_fold_of_the_tokens_whatever_the_batches(kind: str, data: st.DataObject) -> None:
    tokenizer, plan = tiny.ALL[kind](), plan_of(kind)
    ids = tuple(data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=25)))
    text = tokenizer.decode(ids)
    parts = [text[a : a + n] for a in range(len(text)) for n in (1, 3)] or ["x"]
    stops = tuple(data.draw(st.lists(st.one_of(st.sampled_from(parts), st.just("zz")), max_size=3)))
    whole = TextStream(plan, stops).step(ids, True)
    shown, found, end = naive(text, stops)
    assert (whole.text, whole.stop) == (shown, found)
    # `used`: the shortest prefix of tokens whose streamed text holds the match
    stream, pieces, used, at = TextStream(plan, stops), "", 0, 0
    while True:
        size = data.draw(st.integers(0, 4))
        step = stream.step(ids[at : at + size], at + size >= len(ids))
        pieces, used = pieces + step.text, used + step.used
        at += size
        if step.stop is not None or at >= len(ids):
            break
    assert (pieces, used, step.stop) == (whole.text, whole.used, whole.stop)
    if found is None:
        assert used == len(ids)
    elif kind == "byte_level":
        decoder = plan.open()
        lengths = [len(decoder.push((i,))) for i in ids]
        assert sum(lengths[: used - 1]) < end
        assert sum(lengths[:used]) >= end or used == len(ids)


def test_used_counts_tokens_through_the_one_that_completes_the_stop_string() -> None:
    tokenizer = tiny.byte_level()
    ids = [tokenizer.token_to_id(char) for char in "abXYcd"]
    stream = TextStream(DecodePlan(tokenizer), ("XY",))
    first = stream.step(tuple(ids[:3]), False)
    assert (first.text, first.used, first.stop) == ("ab", 3, None)
    second = stream.step(tuple(ids[3:]), False)
    assert (second.text, second.used, second.stop) == ("", 1, "XY")


def test_final_gives_what_was_held_back() -> None:
    tokenizer = tiny.byte_level()
    ids = tuple(tokenizer.token_to_id(char) for char in "abX")
    stream = TextStream(DecodePlan(tokenizer), ("XY",))
    assert stream.step(ids, False).text == "ab"
    last = stream.step((), True)
    assert (last.text, last.used, last.stop) == ("X", 0, None)


def test_a_model_without_tokenizer_gives_empty_text() -> None:
    step = TextStream(None, ("x",)).step((1, 2, 3), True)
    assert (step.text, step.used, step.stop) == ("", 3, None)
