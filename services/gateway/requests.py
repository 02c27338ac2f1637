"""What every request of a client has in common, pure: events in, messages out through an `Outbox`.

There are streams (streams.py: Generate, Continue, Attach; encodings.py: Embed) and exchanges of one question and one answer
(exchanges.py: Tokenize, Spawn, Append). Tokenizer and microkernel may die at any moment and come back; whatever a request asked of one
that died, it asks again of the next. States:

    ENCODING    its prompt is to be encoded. Left out where there is nothing to encode.
    SUBMITTED   the microkernel is to be asked, or has been.
    STREAMING   only streams: the microkernel said yes, output goes to the client.
    RESUMING    only streams: the microkernel is to be asked for the output again, because it died, or because tokens were lost;
                or it is asked whether it cut the output. Text goes on meanwhile.
    ORPHANED    nobody waits any more, but a microkernel was asked: what it then gives is given back.
    ENDED

    event         encoding       submitted            streaming                   resuming                       orphaned
    ------------  -------------  -------------------  --------------------------  -----------------------------  -------------------
    its turn at   Encode         -                    DecodeOpen, all output to   as streaming                   -
     the tokenizer                                    the tokenizer
    encoded       asks the       -                    -                           -                              -
                  microkernel
                  (Tokenize:
                  Tokenized:
                  ended)
    answered      -              Stats: asks          -                           SeqAttached: the output that   given back: Generate:
                                 stream: Accepted,                                was missed to the tokenizer;   SeqCancel. Spawn:
                                 then its turn:                                   SeqAck, SeqFinish, SeqCancel   Close. others:
                                 streaming (known                                 as they were: streaming        SeqDetach, or
                                 already: SeqAttach)                              (the output has ended and      SeqCancel if asked
                                 exchange: its answer:                            must be cut: SeqFinish,        for: ended
                                 ended                                            SeqAttach: resuming)
    tokens        -              -                    to the tokenizer            -                              -
                                                      (a gap: resuming)
    decoded       -              -                    Tokens; a stop string:      Tokens; a stop string is       -
                                                      SeqFinish (after the end:   remembered
                                                      resuming)
    end           -              -                    flush at the tokenizer,     -                              -
                                                      then Finished: ended
    replaced      -              -                    Error WRONG_STATE,          -                              -
                                                      DecodeClose: ended
    cancel        Finished:      remembered           SeqCancel                   remembered                     -
     (streams)    ended
    kernel_lost   -              -                    resuming, unless its end    -                              -
                                                      is known
    kernel_back   -              asks again           -                           SeqAttach                      asks again
    text_lost     waits for its  -                    waits for its turn          waits for its turn             -
                  turn
    text_failed   Error: ended   -                    Generate: SeqCancel, its    Generate: remembered. others:  -
                                                      end is tokenizer_failed.    as fail
                                                      others: as fail
    refused       -              Error: ended         Error, DecodeClose: ended   Error, DecodeClose: ended      ended
    fail          Error: ended   Error, as abandon    Error, as abandon           Error, as abandon              -
    abandon       ended          orphaned; never      DecodeClose; Generate:      DecodeClose: orphaned          -
     (client                     asked: ended         SeqCancel, others:
     left)                                            SeqDetach: ended

"Generate" there is one without the client's own `client_request_id`; with one it can be found again, and is like the others.

Invariants: the client gets exactly one last message (Finished, its answer, or Error), and nothing after it; an orphan sends it
nothing; what the microkernel was asked for is either used or given back, and asking twice does not do it twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum

from msgspec import structs

from llmos.errors import LlmosError
from llmos.protocol.failures import error_message
from llmos.protocol.messages import (
    DecodeItem,
    Encode,
    Encoded,
    Message,
    ModelInfo,
    Render,
    SeqAccepted,
    SeqAppended,
    SeqAttached,
    SeqCancel,
    SeqDetach,
    SeqSpawn,
    SeqSubmit,
    Stats,
)
from llmos.services.gateway.questions import Question

Granted = SeqAccepted | SeqAppended | SeqAttached
_WEIGHT = 1024  # bytes of a request that waits, beside its prompt


class RequestState(Enum):
    ENCODING = "encoding"
    SUBMITTED = "submitted"
    STREAMING = "streaming"
    RESUMING = "resuming"
    ORPHANED = "orphaned"
    ENDED = "ended"


TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.ENCODING: frozenset({RequestState.SUBMITTED, RequestState.ENDED}),
    RequestState.SUBMITTED: frozenset({RequestState.STREAMING, RequestState.ORPHANED, RequestState.ENDED}),
    RequestState.STREAMING: frozenset({RequestState.RESUMING, RequestState.ENDED}),
    RequestState.RESUMING: frozenset({RequestState.STREAMING, RequestState.ORPHANED, RequestState.ENDED}),
    RequestState.ORPHANED: frozenset({RequestState.ENDED}),
    RequestState.ENDED: frozenset(),
}
READING = frozenset({RequestState.STREAMING, RequestState.RESUMING})
ASKING = frozenset({RequestState.SUBMITTED, RequestState.RESUMING, RequestState.ORPHANED})


@dataclass(slots=True)
class Outbox:
    """Messages that handling one event gave, by destination.

    `client` pairs each with the routing id of its client. `leave` is for the microkernel too, unless somebody else here is about to
    read the same sequence (readers.py).
    """

    client: list[tuple[bytes, Message]] = field(default_factory=list)
    kernel: list[Message] = field(default_factory=list)
    leave: list[SeqDetach | SeqCancel] = field(default_factory=list)
    text: list[Message] = field(default_factory=list)
    decode: list[DecodeItem] = field(default_factory=list)


class Request(ABC):
    """`number` is the gateway's own: `req` at the tokenizer and at the microkernel, and the decode stream. `req` is the client's.
    `question` is for the microkernel, if it has to do with it.

    `weight`: bytes of what it holds to ask with. `has_turn`: the tokenizer that is there now was told of it. `strikes`: how many
    tokenizers in a row died while they owed it an answer.
    """

    def __init__(self, number: int, client: bytes, req: int, model: str, question: Question | None) -> None:
        self.number = number
        self.client = client
        self.req = req
        self.model = model
        self.rid = 0  # 0 = not known yet
        self.state = RequestState.ENCODING
        self.weight = _WEIGHT
        self.has_turn = False
        self.strikes = 0
        self._text: Encode | Render | None = None
        self._question = question

    @property
    def has_output(self) -> bool:
        """Some of its output was there already."""
        return False

    @property
    def owner(self) -> str | None:
        """Whose a sequence is that it is to make; None: it makes none."""
        wanted = self._question.wanted if self._question is not None else None
        return wanted.owner if isinstance(wanted, (SeqSubmit, SeqSpawn)) else None

    @property
    def is_over(self) -> bool:
        """The client gets nothing more."""
        return self.state in (RequestState.ORPHANED, RequestState.ENDED)

    # ------------------------------------------------------------ the tokenizer

    def encode(self, text: Encode | Render, size: int) -> None:
        """Its prompt is a text, or it has tokens that are to be one."""
        self._text = text
        self.weight = _WEIGHT + size

    @abstractmethod
    def encoded(self, message: Encoded, info: ModelInfo, now: float, out: Outbox) -> None:
        """Its text is token ids now; raises a typed error, changing nothing, if they are not acceptable."""

    @property
    def wants_text(self) -> bool:
        """It has business with the tokenizer."""
        return self.state is RequestState.ENCODING

    @property
    def is_behind(self) -> bool:
        """A tokenizer that is new has not brought it to where the one before it had."""
        return self.has_turn and self.state is RequestState.ENCODING

    def take_turn(self, out: Outbox) -> None:
        """Talk to a tokenizer that knows nothing of this request."""
        assert self._text is not None
        self.has_turn = True
        out.text.append(self._text)

    def text_lost(self) -> None:
        """The tokenizer died, and with it what it had of this request."""
        self.strikes += self.is_behind
        self.has_turn = False

    def text_failed(self, error: LlmosError, out: Outbox) -> None:
        """No tokenizer will give the text of this request."""
        self.fail(error, out)

    # ------------------------------------------------------------ the microkernel

    def _submit(self, size: int, now: float, out: Outbox) -> None:
        """Its tokens, so many bytes, are known."""
        self._text, self.has_turn, self.strikes = None, False, 0
        self.weight = _WEIGHT + size
        self._move(RequestState.SUBMITTED)
        self.ask(now, out)

    def ask(self, now: float, out: Outbox) -> None:
        assert self._question is not None
        out.kernel.append(self._question.message(now))

    def sent(self, message: Message) -> None:
        """A question is on its way to a microkernel."""
        assert self._question is not None
        self._question.sent(message)

    def answered(self, message: Granted | Stats, now: float, out: Outbox) -> None:
        """The microkernel did what it was asked for."""
        assert self._question is not None
        if not isinstance(message, Stats):
            self._granted(message, now, out)
        elif self.state is RequestState.ORPHANED:
            self._move(RequestState.ENDED)
        else:
            self._question.measured(message)
            self.ask(now, out)

    @abstractmethod
    def _granted(self, message: Granted, now: float, out: Outbox) -> None:
        """It is done."""

    def kernel_lost(self) -> None:  # noqa: B027 - most requests wait for its successor as they waited for it
        """The microkernel died, and with it whatever was on its way there and back."""

    def kernel_back(self, now: float, out: Outbox) -> None:
        """Another one is there. It knows all that was answered, and may know what was not."""
        if self.state in ASKING:
            self.ask(now, out)

    # ------------------------------------------------------------ the end

    def fail(self, error: LlmosError, out: Outbox) -> None:
        """The gateway gives up."""
        if not self.is_over:
            self._reply_error(error, out)
            self.abandon(out)

    def refused(self, error: LlmosError, out: Outbox) -> None:
        """The microkernel holds nothing of this request: it refused, or is gone for good."""
        if not self.is_over:
            self._reply_error(error, out)
        if self.state is not RequestState.ENDED:
            self._move(RequestState.ENDED)

    def abandon(self, out: Outbox) -> None:
        """Nobody waits for this request any more."""
        if self.is_over:
            return
        was_asked = self._question is not None and self._question.was_asked
        if self.state is RequestState.RESUMING or (self.state is RequestState.SUBMITTED and was_asked):
            self._move(RequestState.ORPHANED)
        else:
            self._move(RequestState.ENDED)

    def _reply(self, message: Message, out: Outbox) -> None:
        out.client.append((self.client, message))

    def _reply_error(self, error: LlmosError, out: Outbox) -> None:
        message = error_message(error, self.req)
        self._reply(message if error.rid is not None else structs.replace(message, rid=self.rid or None), out)

    def _move(self, state: RequestState) -> None:
        assert state in TRANSITIONS[self.state], f"request {self.number}: {self.state} -> {state}"
        self.state = state
