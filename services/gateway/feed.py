"""The output of one sequence on its way from the microkernel through the tokenizer to the client, pure.

    microkernel -> received        waiting here -> at the tokenizer -> delivered -> client
                   (no gap, once)  (pieces, in order; at most AT_ONCE tokens are at the tokenizer)

States: closed (no tokenizer has anything of it) -> open -> closed (that tokenizer is gone) -> open ... Text is a fold over all
tokens, so every tokenizer gets all of them from the first on; what the client has already goes through unseen. No piece crosses
the offset up to which it has them, so what comes back belongs to one side of it.

Invariants: offsets have no gap, every token is shown once, and a token that comes twice is the same one; pieces come back in the
order in which they were given. All ids are kept: a sequence's output is bounded, and somebody has to know them.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
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
    """`stream` is the number at the tokenizer, `first`: the client has everything below from elsewhere."""

    def __init__(self, stream: int, first: int = 0) -> None:
        self.first = first
        self.delivered = 0  # what the tokenizer that is there now has answered
        self._shown = first  # the client has everything below
        self._stream = stream
        self._ids = array("i")
        self._logprobs: dict[int, TokenLogprobs] = {}  # of tokens that were not shown yet, by offset
        self._is_open = False
        self._given = 0  # what the tokenizer that is there now was given
        self._target = 0  # what was known when it was opened
        self._decoding: deque[Piece] = deque()
        self._num_decoding = 0
        self._is_complete = False
        self._is_flushed = False

    @property
    def received(self) -> int:
        return len(self._ids)

    @property
    def sent(self) -> int:
        """The client has these, from here or from elsewhere."""
        return min(self._shown, len(self._ids))

    @property
    def is_behind(self) -> bool:
        """The tokenizer has not come yet to where it should have been when it was opened."""
        return self._is_open and self.delivered < self._target

    @property
    def is_unanswered(self) -> bool:
        """The tokenizer owes an answer."""
        return self._is_open and bool(self._decoding or self._is_flushed)

    # ------------------------------------------------------------ from the microkernel

    def push(
        self, offset: int, ids: Sequence[int], logprobs: tuple[TokenLogprobs, ...] | None, out: list[DecodeItem]
    ) -> None:
        """New output. What was seen before is dropped; raises `ProtocolError` at a gap, or if it is not what was seen before."""
        known = len(self._ids) - offset
        if known < 0:
            raise ProtocolError(f"got tokens at {offset}, expected {len(self._ids)}")
        pushed = array("i", ids)
        if self._ids[offset : offset + len(pushed)] != pushed[:known]:
            raise ProtocolError(f"tokens from {offset} on are not what they were before")
        self._ids.extend(pushed[known:])
        if logprobs is not None:
            self._logprobs.update((offset + at, logprobs[at]) for at in range(known, len(pushed)))
        self._pull(out)

    def complete(self, out: list[DecodeItem]) -> None:
        """No more tokens will come: after the last ones the tokenizer gives what it still holds back."""
        self._is_complete = True
        self._pull(out)

    # ------------------------------------------------------------ the tokenizer

    def open(self, out: list[DecodeItem]) -> None:
        """There is a tokenizer that has nothing of this stream."""
        self.delivered = self._given = self._num_decoding = 0
        self._decoding.clear()
        self._is_flushed = False
        self._is_open, self._target = True, len(self._ids)
        self._pull(out)

    def close(self) -> None:
        """It is gone."""
        self._is_open = False

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

    def show(self, piece: Piece) -> bool:
        """Does the client lack it? Then it gets it now."""
        if piece.offset < self._shown:
            return False
        self._shown = piece.offset + len(piece.ids)
        for offset in range(piece.offset, self._shown):
            self._logprobs.pop(offset, None)
        return True

    def _pull(self, out: list[DecodeItem]) -> None:
        """Give the tokenizer what it may have now."""
        if not self._is_open:
            return
        while self._given < len(self._ids) and self._num_decoding < AT_ONCE:
            piece = self._next_piece()
            self._decoding.append(piece)
            self._num_decoding += len(piece.ids)
            self._given += len(piece.ids)
            out.append(DecodeItem(self._stream, piece.ids, False))
        if self._is_complete and self._given == len(self._ids) and not self._is_flushed:
            self._is_flushed = True
            out.append(DecodeItem(self._stream, (), True))

    def _next_piece(self) -> Piece:
        """As much as possible: up to what the client has, and either all or none of its tokens with log-probabilities."""
        start = self._given
        end = min(len(self._ids), start + AT_ONCE)
        if start < self._shown < end:
            end = self._shown
        ids = tuple(self._ids[start:end])
        if not self._logprobs:
            return Piece(start, ids, None)
        has_some = start in self._logprobs
        end = next((at for at in range(start, end) if (at in self._logprobs) is not has_some), end)
        logprobs = tuple(self._logprobs[at] for at in range(start, end)) if has_some else None
        return Piece(start, ids[: end - start], logprobs)
