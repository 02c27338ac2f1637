"""Output between microkernel, tokenizer and client: offsets, the cut at the client's offset, pacing."""

from __future__ import annotations

import pytest

from llmos.errors import ProtocolError
from llmos.protocol import messages as m
from llmos.services.gateway import feed as feed_module
from llmos.services.gateway.feed import Feed, Piece


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
    feed = Feed(9)
    assert push(feed, 0, 10, 11) == [item(10, 11)]
    assert push(feed, 0, 10, 11) == []
    assert push(feed, 1, 11, 12) == [item(12)]
    assert (feed.received, feed.delivered) == (3, 0)


def test_a_gap_is_refused_and_changes_nothing() -> None:
    feed = Feed(9)
    push(feed, 0, 10)
    with pytest.raises(ProtocolError, match="got tokens at 2, expected 1"):
        push(feed, 2, 12)
    assert push(feed, 1, 11) == [item(11)]


def test_pieces_come_back_in_order_with_their_log_probabilities() -> None:
    feed, out = Feed(9), []
    logprobs = (m.TokenLogprobs(-0.1), m.TokenLogprobs(-0.2), m.TokenLogprobs(-0.3))
    feed.push(0, (1, 2, 3), logprobs, out)
    push(feed, 3, 4)
    assert decoded(feed)[0] == Piece(0, (1, 2, 3), logprobs)
    assert decoded(feed)[0] == Piece(3, (4,), None)
    assert feed.delivered == 4


def test_a_stop_string_cuts_its_piece() -> None:
    feed, out = Feed(9), []
    feed.push(0, (1, 2, 3), (m.TokenLogprobs(-0.1), m.TokenLogprobs(-0.2), m.TokenLogprobs(-0.3)), out)
    push(feed, 3, 4)
    assert decoded(feed, 2, "END")[0] == Piece(0, (1, 2), (m.TokenLogprobs(-0.1), m.TokenLogprobs(-0.2)))
    assert (feed.received, feed.delivered) == (4, 2)


@pytest.mark.parametrize("first", range(7))
def test_no_piece_crosses_the_offset_of_the_client(first: int) -> None:
    feed = Feed(9, first)
    items = push(feed, 0, 1, 2, 3) + push(feed, 2, 3, 4, 5)
    assert [token for each in items for token in each.ids] == [1, 2, 3, 4, 5]
    for _ in items:
        piece, _ = decoded(feed)
        assert piece is not None
        assert feed.is_shown(piece) is (piece.offset >= first)
        assert piece.offset >= first or piece.offset + len(piece.ids) <= first


def test_a_long_replay_goes_to_the_tokenizer_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "AT_ONCE", 3)
    feed = Feed(9)
    assert push(feed, 0, 1, 2, 3, 4, 5, 6, 7) == [item(1, 2, 3)]
    assert push(feed, 7, 8) == []  # live output waits its turn
    out: list[m.DecodeItem] = []
    feed.complete(out)
    assert out == []
    assert decoded(feed) == (Piece(0, (1, 2, 3), None), [item(4, 5, 6)])
    assert decoded(feed) == (Piece(3, (4, 5, 6), None), [item(7), item(8), item(final=True)])
    assert decoded(feed) == (Piece(6, (7,), None), [])
    assert decoded(feed) == (Piece(7, (8,), None), [])
    assert decoded(feed) == (None, [])  # the flush


def test_after_a_stop_string_the_tokenizer_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "AT_ONCE", 2)
    feed = Feed(9)
    push(feed, 0, 1, 2, 3, 4)
    assert decoded(feed, 1, "END") == (Piece(0, (1,), None), [])


def test_the_flush_comes_once_and_text_without_tokens_is_refused() -> None:
    feed, out = Feed(9), []
    with pytest.raises(ProtocolError, match="text without tokens"):
        decoded(feed)
    feed.complete(out)
    feed.complete(out)
    assert out == [item(final=True)]
