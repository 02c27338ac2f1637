"""Output between microkernel, tokenizer and client: offsets, the cut at the client's offset, pacing."""

from __future__ import annotations

import pytest

from llmos.errors import ProtocolError
from llmos.protocol import messages as m
from llmos.services.gateway import feed as feed_module
from llmos.services.gateway.feed import Feed, Piece


def opened(first: int = 0) -> Feed:
    """At a tokenizer."""
    feed = Feed(9, first)
    feed.open([])
    return feed


def push(feed: Feed, offset: int, *ids: int) -> list[m.DecodeItem]:
    out: list[m.DecodeItem] = []
    feed.push(offset, ids, None, out)
    return out


def decoded(feed: Feed, used: int = 0, stop: str | None = None) -> tuple[Piece | None, list[m.DecodeItem]]:
    out: list[m.DecodeItem] = []
    return feed.decoded(m.DecodedItem(9, "", used, stop), out), out


def item(*ids: int, final: bool = False) -> m.DecodeItem:
    return m.DecodeItem(9, ids, final)


def test_what_was_seen_before_is_dropped() -> None:
    feed = opened()
    assert push(feed, 0, 10, 11) == [item(10, 11)]
    assert push(feed, 0, 10, 11) == []
    assert push(feed, 1, 11, 12) == [item(12)]
    assert (feed.received, feed.delivered) == (3, 0)


def test_a_gap_is_refused_and_changes_nothing() -> None:
    feed = opened()
    push(feed, 0, 10)
    with pytest.raises(ProtocolError, match="got tokens at 2, expected 1"):
        push(feed, 2, 12)
    assert push(feed, 1, 11) == [item(11)]


def test_pieces_come_back_in_order_with_their_log_probabilities() -> None:
    feed, out = opened(), []
    logprobs = (m.TokenLogprobs(-0.1), m.TokenLogprobs(-0.2), m.TokenLogprobs(-0.3))
    feed.push(0, (1, 2, 3), logprobs, out)
    push(feed, 3, 4)
    assert decoded(feed)[0] == Piece(0, (1, 2, 3), logprobs)
    assert decoded(feed)[0] == Piece(3, (4,), None)
    assert feed.delivered == 4


def test_a_stop_string_cuts_its_piece() -> None:
    feed, out = opened(), []
    feed.push(0, (1, 2, 3), (m.TokenLogprobs(-0.1), m.TokenLogprobs(-0.2), m.TokenLogprobs(-0.3)), out)
    push(feed, 3, 4)
    assert decoded(feed, 2, "END")[0] == Piece(0, (1, 2), (m.TokenLogprobs(-0.1), m.TokenLogprobs(-0.2)))
    assert (feed.received, feed.delivered) == (4, 2)


@pytest.mark.parametrize("first", range(7))
def test_no_piece_crosses_the_offset_of_the_client(first: int) -> None:
    feed = opened(first)
    items = push(feed, 0, 1, 2, 3) + push(feed, 2, 3, 4, 5)
    assert [token for each in items for token in each.ids] == [1, 2, 3, 4, 5]
    for _ in items:
        piece, _ = decoded(feed)
        assert piece is not None
        assert feed.show(piece) is (piece.offset >= first)
        assert piece.offset >= first or piece.offset + len(piece.ids) <= first


def test_a_long_replay_goes_to_the_tokenizer_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "AT_ONCE", 3)
    feed = opened()
    assert push(feed, 0, 1, 2, 3, 4, 5, 6, 7) == [item(1, 2, 3)]
    assert push(feed, 7, 8) == []  # live output waits its turn
    out: list[m.DecodeItem] = []
    feed.complete(out)
    assert out == []
    assert decoded(feed) == (Piece(0, (1, 2, 3), None), [item(4, 5, 6)])
    assert decoded(feed) == (Piece(3, (4, 5, 6), None), [item(7, 8), item(final=True)])
    assert decoded(feed) == (Piece(6, (7, 8), None), [])
    assert decoded(feed) == (None, [])  # the flush


def test_after_a_stop_string_the_tokenizer_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "AT_ONCE", 2)
    feed = opened()
    push(feed, 0, 1, 2, 3, 4)
    assert decoded(feed, 1, "END") == (Piece(0, (1,), None), [])


def test_the_flush_comes_once_and_text_without_tokens_is_refused() -> None:
    feed, out = opened(), []
    with pytest.raises(ProtocolError, match="text without tokens"):
        decoded(feed)
    feed.complete(out)
    feed.complete(out)
    assert out == [item(final=True)]


# ---------------------------------------------------------------- tokenizers that come and go


def test_without_a_tokenizer_output_waits() -> None:
    feed, out = Feed(9), []
    assert push(feed, 0, 1, 2) == []
    feed.complete(out)
    assert (out, feed.is_unanswered, feed.is_behind) == ([], False, False)
    feed.open(out)
    assert out == [item(1, 2), item(final=True)]
    assert (feed.is_unanswered, feed.is_behind) == (True, True)
    decoded(feed)
    assert not feed.is_behind


def test_a_new_tokenizer_gets_everything_cut_at_what_the_client_has() -> None:
    feed, out = opened(), []
    push(feed, 0, 1)
    push(feed, 1, 2, 3)
    piece, _ = decoded(feed)
    assert piece is not None
    assert feed.show(piece)
    feed.close()
    assert not feed.is_unanswered
    assert push(feed, 3, 4) == []
    assert feed.sent == 1
    feed.open(out)
    assert out == [item(1), item(2, 3, 4)]
    assert feed.delivered == 0
    shown = []
    for _ in out:
        piece, _ = decoded(feed)
        assert piece is not None
        if feed.show(piece):
            shown.append(piece)
    assert shown == [Piece(1, (2, 3, 4), None)]
    assert (feed.sent, feed.delivered, feed.is_behind) == (4, 4, False)


def test_log_probabilities_survive_the_tokenizer_and_pieces_have_them_all_or_none() -> None:
    feed, out = Feed(9), []
    push(feed, 0, 1, 2)  # from SeqAttached, without
    feed.push(2, (3, 4), (m.TokenLogprobs(-0.3), m.TokenLogprobs(-0.4)), out)
    feed.push(3, (4, 5), (m.TokenLogprobs(-9.0), m.TokenLogprobs(-0.5)), out)  # 4 comes twice
    feed.open(out)
    assert out == [item(1, 2), item(3, 4, 5)]
    feed.close()
    feed.open(out)
    assert decoded(feed)[0] == Piece(0, (1, 2), None)
    logprobs = tuple(m.TokenLogprobs(value) for value in (-0.3, -0.4, -0.5))
    assert decoded(feed)[0] == Piece(2, (3, 4, 5), logprobs)


def test_a_flush_that_was_lost_comes_again() -> None:
    feed, out = opened(), []
    push(feed, 0, 1)
    feed.complete(out)
    decoded(feed)
    assert feed.is_unanswered  # the flush
    feed.close()
    out.clear()
    feed.open(out)
    assert out == [item(1), item(final=True)]


def test_output_that_differs_from_what_was_known_is_refused_and_changes_nothing() -> None:
    feed = opened()
    push(feed, 0, 1, 2, 3)
    for offset, ids in ((0, (1, 9)), (1, (2, 9, 4)), (2, (9,))):
        with pytest.raises(ProtocolError, match=f"tokens from {offset} on are not what they were before"):
            push(feed, offset, *ids)
    assert push(feed, 3, 4) == [item(4)]


def test_output_that_is_shorter_than_what_was_known_is_waited_for() -> None:
    feed = opened()
    push(feed, 0, 1, 2, 3)
    assert push(feed, 0, 1) == []
    assert push(feed, 1, 2) == []
    assert push(feed, 2, 3, 4) == [item(4)]


@pytest.mark.parametrize("first", [0, 2, 5])
def test_what_the_client_has_counts_from_what_it_brought(first: int) -> None:
    feed = opened(first)
    assert feed.sent == 0
    push(feed, 0, 1, 2, 3)
    assert feed.sent == min(first, 3)
    while (piece := decoded(feed)[0] if feed.is_unanswered else None) is not None:
        feed.show(piece)
    assert feed.sent == 3
