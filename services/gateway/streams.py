"""Requests whose answer is a stream: Generate, Continue, Attach. State table: requests.py.

    Generate   (Encode -> Encoded) -> SeqSubmit -> SeqAccepted -> Accepted, Tokens ..., Finished
    Continue   Stat -> Stats -> SeqContinue -> SeqAttached -> Accepted, Tokens ..., Finished
    Attach     SeqAttach -> SeqAttached (with the output so far) -> Accepted, Tokens ..., Finished

A Generate that was asked before under its `client_request_id` (SeqAccepted says so) goes on like an Attach from the beginning. The
sequence of a Generate without the client's own id belongs to its client and ends with it; that of the others lives on: whoever
leaves only detaches. Every stream goes on with a SeqAttach when the microkernel is back.

Invariants, beside those of requests.py: output offsets at the client have no gap and every token is sent once, none below the
offset it asked for; nothing from a stop string on is sent; the text is what one microkernel and one tokenizer would have given.
"""

from __future__ import annotations

import msgspec

from llmos.codes import FinishReason
from llmos.errors import InvalidRequest, LlmosError, NotFound, Unavailable, WrongState
from llmos.protocol.codec import unpack_i32
from llmos.protocol.messages import (
    Accepted,
    Encoded,
    Finished,
    ModelInfo,
    PromptLogprobs,
    ResultEntry,
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
    Usage,
)
from llmos.protocol.prompt_logprobs import record_bytes
from llmos.services.gateway.questions import Question
from llmos.services.gateway.reading import Reading
from llmos.services.gateway.requests import READING, Granted, Outbox, RequestState
from llmos.services.gateway.validate import check_tokens

_CUTS = 2  # a microkernel that is new listens to the second: only then is this the last reader that it knows


class Stream(Reading):
    """`wanted`: of the microkernel; a SeqSubmit still lacks its prompt. `received`: when the request came, by the gateway's clock.
    `offset`: the client has all output below. `is_durable`: the client gave a Generate an id of its own.
    """

    def __init__(
        self,
        number: int,
        client: bytes,
        req: int,
        model: str,
        wanted: SeqSubmit | SeqContinue | SeqAttach,
        *,
        received: float = 0.0,
        offset: int = 0,
        is_durable: bool = False,
        tool_family: str | None = None,
    ) -> None:
        self._question: Question = Question(wanted, received)
        self._tool_family = tool_family
        super().__init__(number, client, req, model, self._question, offset)
        self.rid = 0 if isinstance(wanted, SeqSubmit) else wanted.rid
        self.is_owner = self._question.is_submit and not is_durable  # the sequence ends with this request
        self._prompt_tokens = 0
        self._acked = 0
        self._cancel: FinishReason | None = None  # asked for; said as soon as the microkernel listens
        self._cuts = 0  # how often the microkernel that is there now was asked to drop what is after the stop string
        self._end: SeqEnd | None = None
        self._top = wanted.params.prompt_logprobs if isinstance(wanted, SeqSubmit) else None  # asked for of the prompt
        self._scored = 0  # tokens of the prompt whose log-probabilities the client has
        self._asked_for_scores = False

    # ------------------------------------------------------------ the microkernel

    def submit(self, now: float, out: Outbox) -> None:
        """There is no prompt."""
        self._submit(0, now, out)

    def encoded(self, message: Encoded, info: ModelInfo, now: float, out: Outbox) -> None:
        wanted = self._question.wanted
        assert isinstance(wanted, SeqSubmit | SeqContinue), "nobody else has a prompt or a grammar"
        params = wanted.params
        if params.grammar is not None:
            assert message.grammar is not None, "the tokenizer was asked for it"
            params = msgspec.structs.replace(params, grammar=message.grammar)
        if isinstance(wanted, SeqContinue):
            self._question.complete(params=params)
            self._submit(0, now, out)
            return
        prompt = message.token_ids or wanted.prompt  # it may have come as token ids
        params = check_tokens(prompt, params, info)
        self._prompt_tokens = len(prompt) // 4
        self._stops = params.stop
        self._question.complete(prompt=prompt, params=params)
        self._submit(len(prompt), now, out)

    def _granted(self, message: Granted, now: float, out: Outbox) -> None:
        assert isinstance(message, SeqAccepted | SeqAttached)
        self.rid = self._question.found = message.rid
        if isinstance(message, SeqAccepted) and message.existing:
            if self.state is RequestState.ORPHANED and not self.is_owner:
                self._move(RequestState.ENDED)  # it can be found again
            else:
                self.ask(now, out)
        elif self.state is RequestState.ORPHANED:
            self._give_back(message, out)
        elif self.state is RequestState.RESUMING:
            assert isinstance(message, SeqAttached)
            self._resume(message, out)
        else:
            self._begin(message, out)

    def _begin(self, message: SeqAccepted | SeqAttached, out: Outbox) -> None:
        self._move(RequestState.STREAMING)
        self.weight = 0
        if self._question.is_submit:
            self._question.complete(prompt=b"")  # from now on it is found
        if isinstance(message, SeqAttached):
            self.model, self._prompt_tokens = message.model, message.prompt_tokens
            self._stops = message.params.stop if message.params is not None else ()
        self._accept(out)
        end = None
        if isinstance(message, SeqAttached):
            self._top = None if message.params is None else message.params.prompt_logprobs
            self._take_result(0, message.result, out)
            self._push(0, unpack_i32(message.output), None, out)
            end = message.end
        if end is not None:
            self._ends(end, out)
        elif self._cancel is not None:
            out.kernel.append(SeqCancel(self.rid, self._cancel))

    def _accept(self, out: Outbox) -> None:
        self._reply(Accepted(self.req, self.rid, self.model, self._prompt_tokens, self._tool_family), out)

    def kernel_lost(self) -> None:
        if self.state is RequestState.STREAMING and self._end is None:
            self._move(RequestState.RESUMING)

    def kernel_back(self, now: float, out: Outbox) -> None:
        self._cuts = 0
        super().kernel_back(now, out)

    def _resume(self, message: SeqAttached, out: Outbox) -> None:
        """The microkernel says how far the output is. What was said to its predecessor is said again."""
        self._move(RequestState.STREAMING)
        if message.prompt_tokens != self._prompt_tokens:
            self._be_late(message, out)
            return
        self._take_result(0, message.result, out)
        self._push(0, unpack_i32(message.output), None, out)
        if self.is_over:
            return
        if message.end is None:
            if self._acked:
                out.kernel.append(SeqAck(self.rid, self._acked))
            if self._stop is not None:
                out.kernel.append(SeqFinish(self.rid, self._feed.delivered))
            elif self._cancel is not None:
                out.kernel.append(SeqCancel(self.rid, self._cancel))
        else:
            self._ends(message.end, out)

    def _be_late(self, message: SeqAttached, out: Outbox) -> None:
        """Meanwhile the sequence has begun another output."""
        if self._end is None:
            self._cancel, self._end = None, message.end
            error = WrongState(f"sequence {self.rid} has gone on without this reader", field="rid", rid=self.rid)
            self.fail(error, out)
            return
        if message.end is None:
            out.leave.append(SeqDetach(self.rid))
        self._finish("", out)

    def _give_back(self, message: SeqAccepted | SeqAttached, out: Outbox) -> None:
        end = message.end if isinstance(message, SeqAttached) else None
        if self._stop is not None and (end is None or self._is_too_long(end)):
            out.kernel.append(SeqFinish(self.rid, self._feed.delivered))
        elif end is None:
            self._leave(out)
        self._move(RequestState.ENDED)

    def text_failed(self, error: LlmosError, out: Outbox) -> None:
        if self.state is RequestState.ENCODING and self._tool_family is not None and error.field == "grammar":
            error = InvalidRequest(error.message.replace("grammar:", "tools:", 1), field="tools")  # it was made of them
        if not (self._reads and self._question.is_submit):
            self.fail(error, out)
            return
        self._close(out)
        self._text_failed = True
        if self._end is not None:
            self._finish("", out)
        else:
            self._ask_cancel(FinishReason.TOKENIZER_FAILED, out)

    # ------------------------------------------------------------ output

    def result(self, entry: ResultEntry, out: Outbox) -> None:
        """What was computed beside tokens; it comes before them."""
        if self.state is RequestState.STREAMING:
            self._take_result(entry.start, entry.values, out)

    def _take_result(self, start: int, values: bytes, out: Outbox) -> None:
        """Log-probabilities of the prompt from token `start` on: the client gets each once."""
        if self._top is None or not values:
            return
        if start > self._scored:
            self._miss(out)
            return
        size = record_bytes(self._top)
        fresh = values[(self._scored - start) * size :]
        if fresh:
            self._reply(PromptLogprobs(self.req, self._scored, self._top, fresh), out)
            self._scored += len(fresh) // size

    @property
    def _lacks_scores(self) -> bool:
        """It has ended without all that was asked for: maybe the microkernel could not send it."""
        return self._top is not None and self._scored < self._prompt_tokens and not self._asked_for_scores

    def tokens(self, entry: TokenEntry, out: Outbox) -> None:
        """New output of the sequence."""
        if self.state is not RequestState.STREAMING or not self._reads:
            return
        if entry.offset > self._feed.received:
            self._miss(out)
        else:
            self._push(entry.offset, entry.ids, entry.logprobs, out)

    def end(self, end: SeqEnd, out: Outbox) -> None:
        """The microkernel's last word; the tokenizer may still hold text back."""
        if self.state is not RequestState.STREAMING:
            return
        is_whole = end.reason in (FinishReason.STOP, FinishReason.LENGTH)
        if (self._reads and end.usage.output_tokens > self._feed.received) or (is_whole and self._lacks_scores):
            self._asked_for_scores = True
            self._miss(out)
        else:
            self._ends(end, out)

    def _ends(self, end: SeqEnd, out: Outbox) -> None:
        is_news, self._end = self._end is None, end
        if self._is_too_long(end) and self._cuts < _CUTS:
            self._cut(out)
        elif not self._reads:
            self._finish("", out)
        elif is_news:
            self._feed.complete(out.decode)

    def _miss(self, out: Outbox) -> None:
        """The microkernel could not send everything: it knows the rest."""
        self._move(RequestState.RESUMING)
        self._attach(out)

    def acknowledge(self, upto: int, out: Outbox) -> None:
        """The client has read below `upto`; more than it was sent it can not have read."""
        if self.state in READING:
            self._acknowledge(min(upto, self._feed.sent), out)

    def _acknowledge(self, upto: int, out: Outbox) -> None:
        if upto > self._acked:
            self._acked = upto
            if self.state is RequestState.STREAMING and self._end is None:
                out.kernel.append(SeqAck(self.rid, upto))

    # ------------------------------------------------------------ how it ends

    def cancel(self, out: Outbox) -> None:
        """The client wants the end of it; the answer is its Finished."""
        if self.state is RequestState.ENCODING:
            self._reply_end(SeqEnd(self.rid, FinishReason.CANCELLED, Usage(0, 0, 0, 0, 0.0, 0.0)), "", out)
            self._move(RequestState.ENDED)
        elif not self.is_over:
            self._ask_cancel(FinishReason.CANCELLED, out)

    def replaced(self, out: Outbox) -> None:
        """Another reader took the sequence over. One that has its end goes on to it."""
        if self.state is RequestState.STREAMING and self._end is None:
            self.refused(WrongState("another reader took over", field="rid", rid=self.rid), out)

    def refused(self, error: LlmosError, out: Outbox) -> None:
        if self.state is RequestState.RESUMING:
            if self._end is not None:  # it asked just to be sure
                self._finish("", out)
                return
            if isinstance(error, NotFound):
                error = Unavailable(f"sequence {self.rid} was lost with the microkernel", rid=self.rid)
        self._close(out)
        super().refused(error, out)

    def fail(self, error: LlmosError, out: Outbox) -> None:
        if self.state is RequestState.RESUMING and self._end is not None:
            self._finish("", out)
        else:
            super().fail(error, out)

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

    def _ask_cancel(self, reason: FinishReason, out: Outbox) -> None:
        if self._cancel is None:
            self._cancel = reason
            if self.state is RequestState.STREAMING and self._end is None:
                out.kernel.append(SeqCancel(self.rid, reason))

    def _stopped(self, text: str, out: Outbox) -> None:
        """Tokens after the stop string, already here or still to come, do not count."""
        if self._end is None:
            if self.state is RequestState.STREAMING:
                out.kernel.append(SeqFinish(self.rid, self._feed.delivered))
        elif self._is_too_long(self._end):
            self._cut(out)
        else:
            self._finish(text, out)

    def _is_too_long(self, end: SeqEnd) -> bool:
        """Has the output ended with tokens after the stop string, which another output would go on from?"""
        if self._stop is None or self._question.is_submit:
            return False
        return end.usage.output_tokens > self._feed.delivered

    def _cut(self, out: Outbox) -> None:
        """The client must not hear of the end before the sequence has dropped what is too much."""
        self._cuts += 1
        self._move(RequestState.RESUMING)
        out.kernel.append(SeqFinish(self.rid, self._feed.delivered))
        self._attach(out)

    def _attach(self, out: Outbox) -> None:
        out.kernel.append(SeqAttach(self.number, self.rid, self._question.wanted.owner))

    def _finish(self, text: str, out: Outbox) -> None:
        assert self._end is not None
        self._reply_end(self._end, text, out)
        self._move(RequestState.ENDED)

    def _reply_end(self, end: SeqEnd, text: str, out: Outbox) -> None:
        reason, usage = end.reason, end.usage
        if self._stop is not None:
            reason = FinishReason.STOP
            usage = msgspec.structs.replace(usage, output_tokens=self._feed.delivered)
        elif self._text_failed:
            reason = FinishReason.TOKENIZER_FAILED
        self._reply(Finished(self.req, end.rid, reason, text, usage, self._stop), out)
