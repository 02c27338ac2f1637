"""Bytes of a terminal become keys, however they are cut into pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.ctl.top import keys
from llmos.ctl.top.keys import Decoder


def decode(*pieces: bytes) -> list[str]:
    decoder = Decoder()
    return [key for piece in pieces for key in decoder.feed(piece)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"q", ["q"]),
        (b"K+-/ ?", ["K", "+", "-", "/", " ", "?"]),
        (b"\r", [keys.ENTER]),
        (b"\n", [keys.ENTER]),
        (b"\x7f\x08", [keys.BACKSPACE, keys.BACKSPACE]),
        (b"\x15\x0c\x03\t", [keys.ERASE, keys.REDRAW, keys.INTERRUPT, keys.TAB]),
        (b"\x01\x02\x1f", []),
        (b"\x1b[A\x1b[B\x1b[C\x1b[D", [keys.UP, keys.DOWN, keys.RIGHT, keys.LEFT]),
        (b"\x1bOA\x1bOB\x1bOH\x1bOF", [keys.UP, keys.DOWN, keys.HOME, keys.END]),
        (b"\x1b[5~\x1b[6~", [keys.PAGE_UP, keys.PAGE_DOWN]),
        (b"\x1b[H\x1b[F\x1b[1~\x1b[4~\x1b[7~\x1b[8~", [keys.HOME, keys.END] * 3),
        (b"\x1b[1;5A\x1b[6;2~", [keys.UP, keys.PAGE_DOWN]),
        (b"\x1b[3~\x1b[Z\x1b[I", []),
        (b"\x1b[[Ax", ["x"]),
        (b"\x1b[200~hi\x1b[201~", ["h", "i"]),
        (b"\x1bj", [keys.ESC, "j"]),
        (b"\x1b\r", [keys.ESC, keys.ENTER]),
        (b"\x1b\x1b[A", [keys.ESC, keys.UP]),
        (b"\x1b[1\x1b[B", [keys.DOWN]),
        ("é漢".encode(), ["é", "漢"]),
        (b"\xff\xfea\xc3(", ["a", "("]),
        ("\u202e\u200b".encode(), []),
    ],
)
def test_keys(data: bytes, expected: list[str]) -> None:
    assert decode(data) == expected
    assert decode(*(bytes([byte]) for byte in data)) == expected


def test_every_cut_of_a_sequence_gives_the_same_key() -> None:
    data = b"\x1b[1;5B" + "é".encode() + b"\x1bOA"
    for cuts in itertools.combinations(range(1, len(data)), 2):
        pieces = [data[i:j] for i, j in zip((0, *cuts), (*cuts, len(data)))]
        assert decode(*pieces) == [keys.DOWN, "é", keys.UP]


def test_a_lone_escape_waits_for_its_rest() -> None:
    decoder = Decoder()
    assert decoder.feed(b"\x1b") == []
    assert decoder.waiting
    assert decoder.flush() == [keys.ESC]
    assert not decoder.waiting
    assert decoder.flush() == []
    assert decoder.feed(b"\x1b") + decoder.feed(b"[") + decoder.feed(b"A") == [keys.UP]
    assert not decoder.waiting


def test_a_broken_sequence_is_no_key() -> None:
    decoder = Decoder()
    assert decoder.feed(b"\x1b[12") == []
    assert decoder.flush() == []
    assert decoder.feed(b"j") == ["j"]


def test_an_endless_sequence_is_dropped() -> None:
    decoder = Decoder()
    assert decoder.feed(b"\x1b[" + b"1" * 31) == []
    assert not decoder.waiting
    assert decoder.feed(b"j") == ["j"]


@given(
    st.lists(
        st.one_of(st.binary(max_size=6), st.sampled_from([b"\x1b", b"[", b"O", b"\x1b[A", b"5~", b"\xc3"])), max_size=20
    )
)
@settings(max_examples=200, deadline=None)
def test_pieces_make_no_difference(pieces: list[bytes]) -> None:
    found = decode(*pieces)
    assert found == decode(b"".join(pieces))
    assert all((len(key) == 1 and key.isprintable()) or key in vars(keys).values() for key in found)
