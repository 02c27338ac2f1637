from __future__ import annotations

import pytest
import tiny_tokenizers as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.services.tokenizer.incremental import DecodePlan

STREAMING = [name for name in tiny.ALL if name not in ("ctc", "late_replace")]


def decode_in_pieces(plan: DecodePlan, ids: list[int], sizes: list[int]) -> list[str]:
    decoder = plan.open()
    pieces, at = [], 0
    for size in [*sizes, len(ids)]:
        pieces.append(decoder.push(ids[at : at + size]))
        at += size
    return [*pieces, decoder.flush()]


@pytest.mark.parametrize("kind", tiny.ALL)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_joined_equal_the_full_decode_for_any_ids_and_any_cut(kind: str, data: st.DataObject) -> None:
    tokenizer = tiny.ALL[kind]()
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 20), max_size=40))
    sizes = data.draw(st.lists(st.integers(0, 5), max_size=40))
    pieces = decode_in_pieces(DecodePlan(tokenizer), ids, sizes)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text_encoded_comes_back_token_by_token(kind: str, text: str) -> None:
    tokenizer = tiny.ALL[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = decode_in_pieces(DecodePlan(tokenizer), ids, [1] * len(ids))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", STREAMING)
@pytest.mark.parametrize("text", tiny.SAMPLES)
def test_samples_and_their_every_prefix(kind: str, text: str) -> None:
    tokenizer = tiny.ALL[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    plan = DecodePlan(tokenizer)
    for end in range(len(ids) + 1):
        assert "".join(decode_in_pieces(plan, ids[:end], [1] * end)) == tokenizer.decode(ids[:end])


def test_no_half_character_is_ever_shown() -> None:
    tokenizer = tiny.byte_level()
    ids = tokenizer.encode("🎉你", add_special_tokens=False).ids
    assert len(ids) > 2
    pieces = decode_in_pieces(DecodePlan(tokenizer), ids, [1] * len(ids))
    assert [piece for piece in pieces if piece] == ["🎉", "你"]


def test_an_unfinished_character_is_shown_as_replacement_at_the_end_only() -> None:
    tokenizer = tiny.byte_level()
    ids = tokenizer.encode("🎉", add_special_tokens=False).ids[:-1]
    pieces = decode_in_pieces(DecodePlan(tokenizer), ids, [1] * len(ids))
    assert "".join(pieces[:-1]) == ""
    assert pieces[-1] == "\ufffd"


def test_leading_space_of_the_first_token_only_is_dropped() -> None:
    tokenizer = tiny.byte_fallback()
    ids = tokenizer.encode("The fox The fox", add_special_tokens=False).ids
    assert "".join(decode_in_pieces(DecodePlan(tokenizer), ids, [1] * len(ids))) == "The fox The fox"


def test_a_run_of_bytes_is_kept_until_it_ends() -> None:
    tokenizer = tiny.byte_fallback()
    byte = tokenizer.token_to_id
    decoder = DecodePlan(tokenizer).open()
    assert decoder.push([byte("<0xF0>"), byte("<0x9F>"), byte("<0x8E>"), byte("<0x89>")]) == ""
    assert decoder.push([byte("▁")]) == "🎉 "
    assert decoder.push([byte("<0xFF>"), byte("<0xE4>")]) == ""
    assert decoder.flush() == "\ufffd\ufffd"


def test_special_and_unknown_tokens_leave_no_text() -> None:
    tokenizer = tiny.byte_level()
    ids = [
        tokenizer.token_to_id("<s>"),
        *tokenizer.encode("fox").ids,
        tokenizer.token_to_id("<|im_end|>"),
        10**9,
        -5,
        2**40,
    ]
    plan = DecodePlan(tokenizer)
    assert "".join(decode_in_pieces(plan, ids, [1, 1])) == "fox"
    assert len(plan._tokens) <= len(ids)  # unknown ids must not fill the table


@pytest.mark.parametrize(
    ("kind", "streams"), [("byte_level", True), ("byte_fallback", True), ("ctc", False), ("late_replace", False)]
)
def test_which_decoders_stream(kind: str, streams: bool) -> None:
    assert DecodePlan(tiny.ALL[kind]()).streams is streams
