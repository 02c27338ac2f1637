"""The output of one sequence on its way from the microkernel through the tokenizer to the client, pure.

    microkernel -> received        waiting here -> at the tokenizer -> delivered -> client
                   (no gap, once)  (pieces, in order; at most AT_ONCE tokens are at the tokenizer)

A client that attached at offset `first` has everything below it. Text is a fold over all tokens, so those below go through the
tokenizer too; but no piece crosses `first`, so what comes back belongs to one side of it.

Invariants: offsets have no gap and every token passes once; pieces come back in the order in which they were given.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from llmos.errors import ProtocolError
from llmos.protocol.messages import DecodedItem, DecodeItem, TokenLogprobs

AT_ONCE = 1024  # a long replay must not hold up the text of everybody else


@dataclass(frozen=True, slots=True)
class Piece:
    """Output tokens from `offset` on."""

    offset: int
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None

    def cut(self, length: int) -> Piece:
        """Its first tokens."""
        if length >= len(self.ids):
            return self
        return Piece(self.offset, self.ids[:length], None if self.logprobs is None else self.logprobs[:length])


class Feed:
    """`stream` is the number at the tokenizer."""

    def __init__(self, stream: int, first: int = 0) -> None:
        self.received = 0
        self.delivered = 0
        self._stream = stream
        self._first = first
        self._waiting: deque[Piece] = deque()
        self._decoding: deque[Piece] = deque()
        self._num_decoding = 0
        self._is_complete = False
        self._is_flushed = False

    def push(
        self, offset: int, ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...] | None, out: list[DecodeItem]
    ) -> None:
        """New output. What was seen before is dropped; raises `ProtocolError` at a gap."""
        if offset > self.received:
            raise ProtocolError(f"got tokens at {offset}, expected {self.received}")
        end = offset + len(ids)
        while self.received < end:
            upto = min(end, self.received + AT_ONCE)
            if self.received < self._first < upto:
                upto = self._first
            part = slice(self.received - offset, upto - offset)
            self._waiting.append(Piece(self.received, ids[part], None if logprobs is None else logprobs[part]))
            self.received = upto
        self._pull(out)

    def complete(self, out: list[DecodeItem]) -> None:
        """No more tokens will come: after the last ones the tokenizer gives what it still holds back."""
        self._is_complete = True
        self._pull(out)

    def decoded(self, item: DecodedItem, out: list[DecodeItem]) -> Piece | None:
        """The tokens whose text `item` has, up to its stop string; None if it answers the flush. Raises `ProtocolError` if it
        answers nothing.
        """
        if not self._decoding:
            if not self._is_flushed:
                raise ProtocolError("text without tokens")
            return None
        piece = self._decoding.popleft()
        self._num_decoding -= len(piece.ids)
        if item.stop is None:
            self._pull(out)
        else:
            piece = piece.cut(item.used)
        self.delivered += len(piece.ids)
        return piece

    def is_shown(self, piece: Piece) -> bool:
        """Does the client lack it?"""
        return piece.offset >= self._first

    def _pull(self, out: list[DecodeItem]) -> None:
        """Give the tokenizer what it may have now."""
        while self._waiting and self._num_decoding < AT_ONCE:
            piece = self._waiting.popleft()
            self._decoding.append(piece)
            self._num_decoding += len(piece.ids)
            out.append(DecodeItem(self._stream, piece.ids, False))
        if self._is_complete and not self._waiting and not self._is_flushed:
            self._is_flushed = True
            out.append(DecodeItem(self._stream, (), True))
