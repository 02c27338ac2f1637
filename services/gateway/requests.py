"""What every request of a client has in common, pure: events in, messages out through an `Outbox`.

There are streams (streams.py: Generate, Continue, Attach) and exchanges of one question and one answer (exchanges.py: Tokenize,
Spawn, Append). Their states, and what each event does in them:

    ENCODING    the tokenizer has the prompt. Left out where there is nothing to encode.
    SUBMITTED   the microkernel has been asked.
    STREAMING   only streams: the microkernel said yes, output goes to the client.
    ORPHANED    nobody waits any more, but the microkernel's answer is still to come: what it then gives is given back.
    ENDED

    event                 encoding              submitted              streaming                            orphaned
    --------------------  --------------------  ---------------------  -----------------------------------  ----------------
    encoded               stream, Spawn,        -                      -                                    -
                          Append: asks the
                          microkernel
                          Tokenize: Tokenized:
                          ended
    answered              -                     stream: Accepted,      -                                    Generate:
      SeqAccepted,                              DecodeOpen, what was                                        SeqCancel.
      SeqAppended,                              output so far to the                                        Spawn: Close.
      SeqAttached                               tokenizer: streaming                                        others: SeqDetach,
                                                (known already: SeqAttach:                                  or SeqCancel if
                                                submitted)                                                  asked for.
                                                exchange: Spawned,                                          known already, or
                                                Appended: ended                                             to be found again:
                                                                                                            nothing. ended
    tokens                -                     -                      to the tokenizer                     -
    decoded               -                     -                      Tokens; a stop string: SeqFinish     -
    end                   -                     -                      flush at the tokenizer, then         -
                                                                       Finished: ended
    replaced              -                     -                      Error WRONG_STATE, DecodeClose:      -
                                                                       ended
    cancel (streams)      Finished: ended       remembered             SeqCancel                            -
    text_lost (streams)   Error: ended          -                      Generate: SeqCancel, its end is      -
                                                                       tokenizer_failed. others: as fail
    refused               -                     Error: ended           Error, DecodeClose: ended            ended
    fail                  Error: ended          Error: orphaned        Error, then as abandon               -
    abandon               ended                 orphaned               DecodeClose; Generate: SeqCancel,    -
      (client left)                                                    others: SeqDetach: ended

Invariants: the client gets exactly one last message (Finished, its answer, or Error), and nothing after it; an orphan sends it
nothing; what the microkernel was asked for is either used or given back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum

from llmos.errors import LlmosError
from llmos.protocol.messages import DecodeItem, Encoded, Error, Message, ModelInfo, SeqCancel, SeqDetach


class RequestState(Enum):
    ENCODING = "encoding"
    SUBMITTED = "submitted"
    STREAMING = "streaming"
    ORPHANED = "orphaned"
    ENDED = "ended"


TRANSITIONS: dict[RequestState, frozenset[RequestState]] = {
    RequestState.ENCODING: frozenset({RequestState.SUBMITTED, RequestState.ENDED}),
    RequestState.SUBMITTED: frozenset({RequestState.STREAMING, RequestState.ORPHANED, RequestState.ENDED}),
    RequestState.STREAMING: frozenset({RequestState.ENDED}),
    RequestState.ORPHANED: frozenset({RequestState.ENDED}),
    RequestState.ENDED: frozenset(),
}


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

    def __bool__(self) -> bool:
        return bool(self.client or self.kernel or self.leave or self.text or self.decode)


class Request(ABC):
    """`number` is the gateway's own: `req` at the tokenizer and at the microkernel, and the decode stream. `req` is the client's."""

    def __init__(self, number: int, client: bytes, req: int, model: str) -> None:
        self.number = number
        self.client = client
        self.req = req
        self.model = model
        self.rid = 0  # 0 = not known yet
        self.state = RequestState.ENCODING

    @property
    def is_over(self) -> bool:
        """The client gets nothing more."""
        return self.state in (RequestState.ORPHANED, RequestState.ENDED)

    @abstractmethod
    def encoded(self, message: Encoded, info: ModelInfo, now: float, out: Outbox) -> None:
        """Its text is token ids now; raises a typed error, changing nothing, if they are not acceptable."""

    @abstractmethod
    def answered(self, message: Message, out: Outbox) -> None:
        """The microkernel did what it was asked for."""

    def fail(self, error: LlmosError, out: Outbox) -> None:
        """The gateway gives up."""
        if not self.is_over:
            self._reply_error(error, out)
            self.abandon(out)

    def refused(self, error: LlmosError, out: Outbox) -> None:
        """The microkernel holds nothing of this request: it refused, was not reached, or is gone."""
        if not self.is_over:
            self._reply_error(error, out)
        if self.state is not RequestState.ENDED:
            self._move(RequestState.ENDED)

    def abandon(self, out: Outbox) -> None:
        """Nobody waits for this request any more."""
        if self.state is RequestState.SUBMITTED:
            self._move(RequestState.ORPHANED)
        elif not self.is_over:
            self._move(RequestState.ENDED)

    def _ask(self, message: Message, out: Outbox) -> None:
        self._move(RequestState.SUBMITTED)
        out.kernel.append(message)

    def _reply(self, message: Message, out: Outbox) -> None:
        out.client.append((self.client, message))

    def _reply_error(self, error: LlmosError, out: Outbox) -> None:
        rid = error.rid if error.rid is not None else self.rid or None
        self._reply(Error(self.req, int(error.code), error.message, error.field, rid), out)

    def _move(self, state: RequestState) -> None:
        assert state in TRANSITIONS[self.state], f"request {self.number}: {self.state} -> {state}"
        self.state = state
