"""Routes between clients, tokenizer and microkernel: finds the request a message belongs to, lets it handle the
event, sends what comes out.

Pure but for the sends it is given; `service.py` connects it to sockets and calls `tick`. A request is known by its
number (everywhere), by its rid (from the microkernel) and by the client's own number (from the client).

Invariant: whatever can not be sent to a service fails the requests that it was for, at once.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from llmos.errors import InvalidRequest, LlmosError, Overloaded, Unavailable, from_code
from llmos.ports.core import error_message
from llmos.protocol.codec import unpack_i64
from llmos.protocol.messages import (
    Ack,
    Cancel,
    Decoded,
    DecodeStep,
    Done,
    Encode,
    Encoded,
    Error,
    Message,
    ModelInfo,
    ModelInfoList,
    SeqAccepted,
    SeqAppend,
    SeqAppended,
    SeqAttach,
    SeqAttached,
    SeqContinue,
    SeqReplaced,
    SeqSpawn,
    SeqSubmit,
    SeqTokens,
    TokenEntry,
)
from llmos.services.gateway.clients import ClientState, ClientTable
from llmos.services.gateway.intake import INTAKE, Entry
from llmos.services.gateway.owners import Asker, is_administrator, owner_name
from llmos.services.gateway.readers import Readers
from llmos.services.gateway.requests import Outbox, Request, RequestState
from llmos.services.gateway.streams import Stream

log = logging.getLogger(__name__)
ANSWER_TIMEOUT_S = 20.0  # for Encode and for each question to the microkernel
Send = Callable[[Message], bool]
_QUESTIONS = (SeqSubmit, SeqSpawn, SeqAppend, SeqContinue, SeqAttach)
_UNANSWERED = (RequestState.SUBMITTED, RequestState.ORPHANED)


class Router:
    """`send_text` and `send_kernel` return False if the service is not there."""

    def __init__(self, send_text: Send, send_kernel: Send, max_in_flight: int) -> None:
        self.models: dict[str, ModelInfo] = {}
        self.clients: ClientTable[int] | None = None  # request numbers; set once the socket is bound
        self._send_text = send_text
        self._send_kernel = send_kernel
        self._max_in_flight = max_in_flight
        self._numbers = itertools.count(1)
        self._requests: dict[int, Request] = {}
        self._readers = Readers()
        self._deadlines: deque[tuple[float, int, RequestState]] = deque()

    def __len__(self) -> int:
        return len(self._requests)

    def next_number(self) -> int:
        return next(self._numbers)

    # ------------------------------------------------------------ from clients

    def on_client(self, client: ClientState[int], message: Any, now: float) -> None:
        out = Outbox()
        if type(message) in INTAKE:
            try:
                self._enter(client, message, now, out)
            except LlmosError as refusal:
                out.client.append((client.peer.routing_id, error_message(refusal, message.req)))
        elif isinstance(message, (Ack, Cancel)):
            request = self._requests.get(client.requests.get(message.req, 0))
            if isinstance(request, Stream):  # others have just ended, or are answered at once
                if isinstance(message, Ack):
                    request.acknowledge(message.upto, out)
                else:
                    request.cancel(out)
                    self._settle(request)
        else:
            error = InvalidRequest(f"{type(message).__name__} belongs on the client-control socket", field="message")
            out.client.append((client.peer.routing_id, error_message(error, message.req)))
        self._flush(out)

    def on_client_gone(self, client: ClientState[int]) -> None:
        """The client left: nobody waits for its requests."""
        out = Outbox()
        numbers, client.requests = list(client.requests.values()), {}
        if numbers:
            log.info("client %r (pid %d) left %d requests", client.peer.name, client.peer.pid, len(numbers))
        for number in numbers:
            request = self._requests.get(number)
            if request is not None:
                request.abandon(out)
                self._settle(request)
        self._flush(out)

    def _enter(self, client: ClientState[int], message: Any, now: float, out: Outbox) -> None:
        """Begin a request; raises the typed refusal."""
        if message.req <= 0 or message.req in client.requests:
            raise InvalidRequest(f"req: {message.req} is in use or not positive", field="req")
        if len(client.requests) >= self._max_in_flight:
            raise Overloaded(f"{len(client.requests)} requests of this client are in flight, the limit")
        peer = client.peer
        asker = Asker(peer.routing_id, owner_name(peer.uid), is_administrator(peer.uid))
        request = INTAKE[type(message)](message, Entry(asker, next(self._numbers), now, self.models, out))
        self._requests[request.number] = request
        client.requests[message.req] = request.number
        if request.rid:
            self._readers.asks(request.rid)
        self._expect(request, now)

    # ------------------------------------------------------------ from the tokenizer

    def on_text(self, message: Any, now: float) -> None:
        out = Outbox()
        if isinstance(message, Decoded):
            for item in message.items:
                request = self._requests.get(item.stream)
                if isinstance(request, Stream):
                    request.decoded(item, out)
                    self._settle(request)
        elif isinstance(message, Encoded):
            self._encoded(message, now, out)
        elif isinstance(message, ModelInfoList):
            self.models = {info.model: info for info in message.models}
        elif isinstance(message, Error):
            self._text_error(message, out)
        else:
            log.error("the tokenizer sent a %s", type(message).__name__)
        self._flush(out)

    def on_text_down(self) -> None:
        """Encodings are lost, and so is the decoding state of all streams."""
        out = Outbox()
        for request in list(self._requests.values()):
            self._text_lost(request, Unavailable("the tokenizer went away"), out)
        self._flush(out)

    def _encoded(self, message: Encoded, now: float, out: Outbox) -> None:
        request = self._requests.get(message.req)
        if request is None or request.state is not RequestState.ENCODING:
            return
        try:
            request.encoded(message, self.models[request.model], now, out)
        except LlmosError as error:
            request.fail(error, out)
        else:
            self._expect(request, now)
        self._settle(request)

    def _text_error(self, message: Error, out: Outbox) -> None:
        request = self._requests.get(message.req)
        if request is None:
            log.error("tokenizer: %s", message.message)
        elif request.state is RequestState.ENCODING:
            self._text_lost(request, _typed(message), out)
        else:
            error = Unavailable(f"the tokenizer can not go on with the text: {message.message}")
            self._text_lost(request, error, out)

    def _text_lost(self, request: Request, error: LlmosError, out: Outbox) -> None:
        """The tokenizer will not give the text of this request, if it has any of it."""
        if request.state is RequestState.ENCODING:
            request.fail(error, out)
        elif isinstance(request, Stream):
            request.text_lost(error, out)
        self._settle(request)

    # ------------------------------------------------------------ from the microkernel

    def on_kernel(self, message: Any) -> None:
        out = Outbox()
        if isinstance(message, SeqTokens):
            self._tokens(message, out)
        elif isinstance(message, (SeqAccepted, SeqAppended, SeqAttached)):
            self._answered(message, out)
        elif isinstance(message, SeqReplaced):
            if (stream := self._readers.stops(message.rid)) is not None:
                stream.replaced(out)
                self._settle(stream)
        elif isinstance(message, Error):
            self._kernel_error(message, out)
        elif not isinstance(message, Done):  # an open sequence is closed that nobody waited for
            log.error("the microkernel sent a %s", type(message).__name__)
        self._flush(out)

    def on_kernel_down(self) -> None:
        """Every sequence is lost with the microkernel."""
        out = Outbox()
        self._readers.clear()
        for request in list(self._requests.values()):
            if request.state is not RequestState.ENCODING:
                request.refused(Unavailable("the microkernel went away"), out)
                self._settle(request)
        self._flush(out)

    def _tokens(self, message: SeqTokens, out: Outbox) -> None:
        for entry in (*message.entries, *_entries(message.columns)):
            if (stream := self._readers.get(entry.rid)) is not None:
                stream.tokens(entry, out)
                self._settle(stream)
        for end in message.ends:
            if (stream := self._readers.stops(end.rid)) is not None:
                stream.end(end, out)
                self._settle(stream)

    def _answered(self, message: SeqAccepted | SeqAppended | SeqAttached, out: Outbox) -> None:
        request = self._requests.get(message.req)
        if request is None or request.state not in _UNANSWERED:
            log.error("the microkernel sent a %s that nobody asked for", type(message).__name__)
            return
        if isinstance(message, SeqAttached):
            self._readers.answered(message.rid, out.kernel, is_granted=True)
        request.answered(message, out)
        if request.state is RequestState.SUBMITTED:
            self._readers.asks(request.rid)  # it was known already, and asks to read it
        is_going_on = not isinstance(message, SeqAttached) or message.end is None
        if isinstance(request, Stream) and request.state is RequestState.STREAMING and is_going_on:
            older = self._readers.begins(request)
            if older is not None:  # the microkernel only tells other gateways
                older.replaced(out)
                self._settle(older)
        self._settle(request)

    def _kernel_error(self, message: Error, out: Outbox) -> None:
        request = self._requests.get(message.req) or self._readers.get(message.rid or 0)
        if request is None:
            log.warning("microkernel: %s", message.message)
        elif request.state in _UNANSWERED:
            self._refused(request, _typed(message), out)
        else:
            request.fail(_typed(message), out)
            self._settle(request)

    def _refused(self, request: Request, error: LlmosError, out: Outbox) -> None:
        """The microkernel did not do what it was asked for."""
        if request.rid:
            self._readers.answered(request.rid, out.kernel, is_granted=False)
        request.refused(error, out)
        self._settle(request)

    # ------------------------------------------------------------ time, end, sending

    def tick(self, now: float) -> None:
        """Fail what a service did not answer in time."""
        out = Outbox()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number, state = self._deadlines.popleft()
            service = "tokenizer" if state is RequestState.ENCODING else "microkernel"
            request = self._requests.get(number)
            if request is not None and request.state is state:
                request.fail(Unavailable(f"the {service} is silent for {ANSWER_TIMEOUT_S:g} s"), out)
                self._settle(request)
        self._flush(out)

    def fail_all(self, error: LlmosError) -> None:
        out = Outbox()
        for request in list(self._requests.values()):
            request.fail(error, out)
            self._settle(request)
        self._flush(out)

    def _expect(self, request: Request, now: float) -> None:
        """An answer to what was just asked."""
        self._deadlines.append((now + ANSWER_TIMEOUT_S, request.number, request.state))

    def _settle(self, request: Request) -> None:
        """Take a request that is over out of the tables."""
        if not request.is_over:
            return
        client = self.clients.find(request.client) if self.clients is not None else None
        if client is not None and client.requests.get(request.req) == request.number:
            del client.requests[request.req]
        if request.state is RequestState.ENDED:
            self._requests.pop(request.number, None)
            if isinstance(request, Stream):
                self._readers.forget(request)

    def _flush(self, out: Outbox) -> None:
        """Send everything; what a service can not take fails, which may give more to send."""
        failed = Outbox()
        for message in out.text:
            if not self._send_text(message) and isinstance(message, Encode):
                self._text_lost(self._requests[message.req], Unavailable("the tokenizer is not running"), failed)
        if out.decode and not self._send_text(DecodeStep(tuple(out.decode))):
            for item in out.decode:
                if (request := self._requests.get(item.stream)) is not None:
                    self._text_lost(request, Unavailable("the tokenizer is not running"), failed)
        for leave in out.leave:
            self._readers.leaves(leave, out.kernel)
        for message in out.kernel:
            if not self._send_kernel(message) and isinstance(message, _QUESTIONS):
                self._refused(self._requests[message.req], Unavailable("the microkernel is not running"), failed)
        for routing_id, message in out.client:
            client = self.clients.find(routing_id) if self.clients is not None else None
            if client is not None:
                assert self.clients is not None
                self.clients.send(client, message)
        if failed:
            self._flush(failed)


def _entries(columns: bytes) -> Iterable[TokenEntry]:
    """The (rid, offset, token) columns of a `SeqTokens`, one by one."""
    values = unpack_i64(columns)
    return (TokenEntry(rid, offset, (token,)) for rid, offset, token in zip(values[0::3], values[1::3], values[2::3]))


def _typed(message: Error) -> LlmosError:
    """A service's error in the caller's words: however the prompt was given, its name is `prompt`."""
    field = "prompt" if message.field in ("text", "messages", "tokens") else message.field
    return from_code(message.code, message.message, field=field, rid=message.rid)
