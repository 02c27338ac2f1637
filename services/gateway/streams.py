"""Requests whose answer is a stream: Generate, Continue, Attach. State table: requests.py.

    Generate   (Encode -> Encoded) -> SeqSubmit -> SeqAccepted -> Accepted, Tokens ..., Finished
    Continue   SeqContinue -> SeqAttached -> Accepted, Tokens ..., Finished
    Attach     SeqAttach -> SeqAttached (with the output so far) -> Accepted, Tokens ..., Finished

A Generate that was asked before under the same `client_request_id` (SeqAccepted says so) goes on like an Attach from the beginning.
The sequence of a Generate belongs to its client and ends with it; that of the others lives on: whoever leaves only detaches.

Invariants, beside those of requests.py: output offsets at the client have no gap and every token is sent once, none below the
offset it asked for; nothing from a stop string on is sent.
"""

from __future__ import annotations

import msgspec

from llmos.codes import FinishReason
from llmos.errors import LlmosError, ProtocolError, WrongState
from llmos.protocol.codec import unpack_i32
from llmos.protocol.messages import (
    Accepted,
    DecodeClose,
    DecodedItem,
    DecodeOpen,
    Encoded,
    Finished,
    Message,
    ModelInfo,
    SeqAccepted,
    SeqAck,
    SeqAttach,
    SeqAttached,
    SeqCancel,
    SeqContinue,
    SeqDetach,
    SeqEnd,
    SeqFinish,
    SeqSubmit,
    TokenEntry,
    Tokens,
    Usage,
)
from llmos.services.gateway.feed import Feed
from llmos.services.gateway.requests import Outbox, Request, RequestState
from llmos.services.gateway.validate import check_tokens

_LEAST_DEADLINE_MS = 0.001


class Stream(Request):
    """`question` is what the microkernel will be asked; a SeqSubmit still lacks its prompt. `received`: when the request came, by
    the gateway's clock, from where its deadline counts. `offset`: the client has all output below.
    """

    def __init__(
        self,
        number: int,
        client: bytes,
        req: int,
        model: str,
        question: SeqSubmit | SeqContinue | SeqAttach,
        *,
        received: float = 0.0,
        offset: int = 0,
    ) -> None:
        super().__init__(number, client, req, model)
        self.question = question
        self.rid = 0 if isinstance(question, SeqSubmit) else question.rid
        self._received = received
        self._feed = Feed(number, offset)
        self._prompt_tokens = 0
        self._cancel: FinishReason | None = None  # asked for; sent as soon as the microkernel has answered
        self._stop: str | None = None
        self._text_lost = False
        self._end: SeqEnd | None = None

    @property
    def is_owner(self) -> bool:
        """The sequence ends with this request."""
        return isinstance(self.question, SeqSubmit)

    # ------------------------------------------------------------ to the microkernel

    def submit(self, out: Outbox) -> None:
        """A question that is complete."""
        self._ask(self.question, out)

    def encoded(self, message: Encoded, info: ModelInfo, now: float, out: Outbox) -> None:
        question = self.question
        assert isinstance(question, SeqSubmit), "only a Generate has a prompt"
        params = check_tokens(message.token_ids, question.params, info)
        self._prompt_tokens = len(message.token_ids) // 4
        left = deadline_left(question.deadline_ms, now - self._received)
        self.question = msgspec.structs.replace(question, prompt=message.token_ids, params=params, deadline_ms=left)
        self._ask(self.question, out)

    def answered(self, message: Message, out: Outbox) -> None:
        assert isinstance(message, SeqAccepted | SeqAttached)
        is_known = isinstance(message, SeqAccepted) and message.existing
        has_ended = isinstance(message, SeqAttached) and message.end is not None
        self.rid = message.rid
        if self.state is RequestState.ORPHANED:
            if not has_ended and not is_known:  # one that was made for an earlier request is not ours
                self._leave(out)
            self._move(RequestState.ENDED)
            return
        if is_known:
            assert isinstance(self.question, SeqSubmit)
            out.kernel.append(SeqAttach(self.number, self.rid, self.question.owner))
            return
        self._move(RequestState.STREAMING)
        if isinstance(message, SeqAccepted):
            assert isinstance(self.question, SeqSubmit)
            self._open(self.question.params.stop, out)
        else:
            self.model, self._prompt_tokens = message.model, message.prompt_tokens
            self._open(message.params.stop if message.params is not None else (), out)
            self._feed.push(0, tuple(unpack_i32(message.output)), None, out.decode)
            if message.end is not None:
                self.end(message.end, out)
        if self._cancel is not None and not has_ended:
            out.kernel.append(SeqCancel(self.rid, self._cancel))

    def _open(self, stops: tuple[str, ...], out: Outbox) -> None:
        self._reply(Accepted(self.req, self.rid, self.model, self._prompt_tokens), out)
        out.text.append(DecodeOpen(self.number, self.model, stops))

    # ------------------------------------------------------------ output

    @property
    def _reads(self) -> bool:
        """More text is expected."""
        return self.state is RequestState.STREAMING and self._stop is None and not self._text_lost

    def tokens(self, entry: TokenEntry, out: Outbox) -> None:
        """New output of the sequence."""
        if self._reads:
            try:
                self._feed.push(entry.offset, entry.ids, entry.logprobs, out.decode)
            except ProtocolError as error:
                self.fail(ProtocolError(f"sequence {self.rid}: {error.message}", rid=self.rid), out)

    def decoded(self, item: DecodedItem, out: Outbox) -> None:
        """The tokenizer's answer to the oldest tokens it has of this request, or to the flush after the last ones."""
        if not self._reads:
            return
        try:
            piece = self._feed.decoded(item, out.decode)
        except ProtocolError as error:
            self.fail(ProtocolError(f"sequence {self.rid}: {error.message}", rid=self.rid), out)
            return
        text = item.text
        if piece is not None:
            text = ""
            if self._feed.is_shown(piece):
                self._reply(Tokens(self.req, piece.offset, piece.ids, item.text, piece.logprobs), out)
            elif self._end is None:  # the client has read these long ago
                out.kernel.append(SeqAck(self.rid, self._feed.delivered))
        if item.stop is not None:
            self._stopped(item.stop, text, out)
        elif item.final:
            self._finish(text, out)

    def end(self, end: SeqEnd, out: Outbox) -> None:
        """The microkernel's last word; the tokenizer may still hold text back."""
        if self.state is not RequestState.STREAMING or self._end is not None:
            return
        self._end = end
        if self._reads:
            self._feed.complete(out.decode)
        else:
            self._finish("", out)

    def acknowledge(self, upto: int, out: Outbox) -> None:
        """The client has read below `upto`; more than it was sent it can not have read."""
        if self.state is RequestState.STREAMING and self._end is None:
            out.kernel.append(SeqAck(self.rid, min(upto, self._feed.delivered)))

    # ------------------------------------------------------------ endings

    def replaced(self, out: Outbox) -> None:
        """Another reader took the sequence over. Whoever has its end already needs no more of it."""
        if self.state is not RequestState.STREAMING or self._end is not None:
            return
        self._reply_error(WrongState("another reader took over", field="rid", rid=self.rid), out)
        self._close(out)
        self._move(RequestState.ENDED)

    def cancel(self, out: Outbox) -> None:
        """The client does not want more. Idempotent."""
        if self.state is RequestState.ENCODING:
            usage = Usage(0, 0, 0, 0, 0.0, 0.0)
            self._reply(Finished(self.req, 0, FinishReason.CANCELLED, "", usage), out)
            self._move(RequestState.ENDED)
        elif not self.is_over:
            self._ask_cancel(FinishReason.CANCELLED, out)

    def text_lost(self, error: LlmosError, out: Outbox) -> None:
        """The tokenizer lost this stream. Only its owner ends the sequence for that; to others it can be told anew."""
        if not self._reads:
            return
        if not self.is_owner:
            self.fail(error, out)
            return
        self._text_lost = True
        if self._end is not None:
            self._finish("", out)
        else:
            self._ask_cancel(FinishReason.TOKENIZER_FAILED, out)

    def refused(self, error: LlmosError, out: Outbox) -> None:
        self._close(out)
        super().refused(error, out)

    def abandon(self, out: Outbox) -> None:
        if self.state is RequestState.STREAMING and self._end is None:
            self._leave(out)
        self._close(out)
        super().abandon(out)

    def _leave(self, out: Outbox) -> None:
        """The microkernel sends output that nobody reads."""
        if self._cancel is not None:
            if self.state is RequestState.ORPHANED:  # while streaming it was sent when it was asked for
                out.kernel.append(SeqCancel(self.rid, self._cancel))
        elif self.is_owner:
            out.leave.append(SeqCancel(self.rid, FinishReason.CANCELLED))
        else:
            out.leave.append(SeqDetach(self.rid))

    def _close(self, out: Outbox) -> None:
        if self._reads:
            out.text.append(DecodeClose(self.number))

    def _ask_cancel(self, reason: FinishReason, out: Outbox) -> None:
        if self._cancel is None:
            self._cancel = reason
            if self.state is RequestState.STREAMING and self._end is None:
                out.kernel.append(SeqCancel(self.rid, reason))

    def _stopped(self, stop: str, text: str, out: Outbox) -> None:
        """A stop string ends the text; tokens after it, already here or still to come, do not count."""
        self._stop = stop
        if self._end is None or self._feed.received > self._feed.delivered:
            out.kernel.append(
                SeqFinish(self.rid, self._feed.delivered)
            )  # after its end, for an open sequence to drop them
        if self._end is not None:
            self._finish(text, out)

    def _finish(self, text: str, out: Outbox) -> None:
        assert self._end is not None
        reason, usage = self._end.reason, self._end.usage
        if self._stop is not None:
            reason = FinishReason.STOP
            usage = msgspec.structs.replace(usage, output_tokens=self._feed.delivered)
        elif self._text_lost:
            reason = FinishReason.TOKENIZER_FAILED
        self._reply(Finished(self.req, self.rid, reason, text, usage, self._stop), out)
        self._move(RequestState.ENDED)


def deadline_left(deadline_ms: float | None, elapsed_s: float) -> float | None:
    """What is left of a deadline once the prompt is encoded; never 0, so that the microkernel refuses in its own words."""
    return None if deadline_ms is None else max(_LEAST_DEADLINE_MS, deadline_ms - elapsed_s * 1000)
