"""The half of a stream that makes text of tokens: what it has of the output goes through the tokenizer, and what comes back to the
client. It goes on while the microkernel is away, and begins again with every new tokenizer. State table: requests.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from llmos.errors import ProtocolError
from llmos.protocol.messages import DecodeClose, DecodedItem, DecodeOpen, TokenLogprobs, Tokens
from llmos.services.gateway.feed import Feed
from llmos.services.gateway.questions import Question
from llmos.services.gateway.requests import READING, Outbox, Request


class Reading(Request):
    """`offset`: the client has all output below."""

    def __init__(self, number: int, client: bytes, req: int, model: str, question: Question, offset: int) -> None:
        super().__init__(number, client, req, model, question)
        self._feed = Feed(number, offset)
        self._stops: tuple[str, ...] = ()
        self._stop: str | None = None  # this stop string was found: the text is over
        self._text_failed = False  # and so it is then

    @property
    def has_output(self) -> bool:
        return self._feed.received > 0

    @property
    def _reads(self) -> bool:
        """More text is expected."""
        return self.state in READING and self._stop is None and not self._text_failed

    # ------------------------------------------------------------ the tokenizer comes and goes

    @property
    def wants_text(self) -> bool:
        return self._reads or super().wants_text

    @property
    def is_behind(self) -> bool:
        return self.has_turn and self._feed.is_behind if self._reads else super().is_behind

    def take_turn(self, out: Outbox) -> None:
        if not self._reads:
            super().take_turn(out)
            return
        self.has_turn = True
        out.text.append(DecodeOpen(self.number, self.model, self._stops))
        self._feed.open(out.decode)

    def text_lost(self) -> None:
        if not self._reads:
            super().text_lost()
            return
        self.strikes += self._feed.is_unanswered
        self.has_turn = False
        self._feed.close()

    def _close(self, out: Outbox) -> None:
        """The text is not wanted any more."""
        if self._reads and self.has_turn:
            self.has_turn = False
            out.text.append(DecodeClose(self.number))

    # ------------------------------------------------------------ from tokens to text

    def _push(self, offset: int, ids: Sequence[int], logprobs: tuple[TokenLogprobs, ...] | None, out: Outbox) -> None:
        if self._reads:
            try:
                self._feed.push(offset, ids, logprobs, out.decode)
            except ProtocolError as error:
                self._break(error, out)

    def decoded(self, item: DecodedItem, out: Outbox) -> None:
        """The tokenizer's answer to the oldest tokens it has of this request, or to the flush after the last ones."""
        if not self._reads or not self.has_turn:
            return
        try:
            piece = self._feed.decoded(item, out.decode)
        except ProtocolError as error:
            self._break(error, out)
            return
        self.strikes = 0
        text = item.text
        if piece is not None:
            text = ""
            if self._feed.show(piece):
                self._reply(Tokens(self.req, piece.offset, piece.ids, item.text, piece.logprobs), out)
            else:  # what it had when it came the client has read long ago
                self._acknowledge(min(self._feed.delivered, self._feed.first), out)
        if item.stop is not None:
            self._stop = item.stop
            self._stopped(text, out)
        elif item.final:
            self._finish(text, out)

    def _break(self, error: ProtocolError, out: Outbox) -> None:
        self.fail(ProtocolError(f"sequence {self.rid}: {error.message}", rid=self.rid), out)

    @abstractmethod
    def _acknowledge(self, upto: int, out: Outbox) -> None:
        """The client has read below `upto`."""

    @abstractmethod
    def _stopped(self, text: str, out: Outbox) -> None:
        """The stop string was found. `text`: what the client lacks before it."""

    @abstractmethod
    def _finish(self, text: str, out: Outbox) -> None:
        """All text is there. `text`: what the client lacks of it."""
