"""Routes between clients, tokenizer and microkernel: finds the request a message belongs to, lets it handle the
event, sends what comes out.

Pure but for the sends it is given; `service.py` connects it to sockets and calls `tick`. A request is known by its
number (everywhere), by its rid (from the microkernel) and by the client's own number (from the client).

A service that is lost is a pause: what was asked of it is asked again when it is back (requests.py, desk.py). Limits: a question
must be answered within `ANSWER_TIMEOUT_S`, a service must come back within `PATIENCE_S`, and what waits to be asked may weigh
`MAX_WAITING_BYTES`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

from msgspec import structs

from llmos.errors import InvalidRequest, LlmosError, Overloaded, Unavailable
from llmos.protocol.codec import unpack_i64
from llmos.protocol.failures import error_message, typed
from llmos.protocol.messages import (
    Ack,
    Cancel,
    Decoded,
    DecodeStep,
    Done,
    Encoded,
    Error,
    Generate,
    Message,
    ModelInfo,
    ModelInfoList,
    Rendered,
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
    Stat,
    Stats,
    TokenEntry,
)
from llmos.services.gateway.clients import Client, Clients
from llmos.services.gateway.deadlines import Deadlines
from llmos.services.gateway.desk import Desk
from llmos.services.gateway.exchanges import Exchange
from llmos.services.gateway.intake import INTAKE, Entry
from llmos.services.gateway.overload import Overload
from llmos.services.gateway.owners import Asker, identify
from llmos.services.gateway.readers import Readers
from llmos.services.gateway.reasking import Reasking
from llmos.services.gateway.requests import ASKING, Granted, Outbox, Request, RequestState
from llmos.services.gateway.rights import check_right
from llmos.services.gateway.streams import Stream
from llmos.services.gateway.validate import check_req

log = logging.getLogger(__name__)
ANSWER_TIMEOUT_S = 30.0  # for Encode and for each question to the microkernel, with their restarts
PATIENCE_S = 300.0  # for a service to come back, while streams wait
MAX_WAITING_BYTES = 128 * 1024 * 1024
MAX_STRIKES = 3  # tokenizers that die of a text
Send = Callable[[Message], bool]
_QUESTIONS = (SeqSubmit, SeqSpawn, SeqAppend, SeqContinue, SeqAttach, Stat)
_WAITING = (RequestState.ENCODING, RequestState.SUBMITTED, RequestState.RESUMING)


def _local(client: Client) -> Asker:
    return identify(client.id, client.peer, None)


class Router:
    """`send_text` and `send_kernel` return False if the service is not there. `key_prefix`: different in every gateway process that
    there ever was. `identify` raises `Unauthorized` for a client whose key is not live any more.
    """

    def __init__(
        self,
        send_text: Send,
        send_kernel: Send,
        max_in_flight: int,
        key_prefix: str,
        identify: Callable[[Client], Asker] = _local,
    ) -> None:
        self.models: dict[str, ModelInfo] = {}
        self.clients: Clients | None = None  # set once they can come
        self.waiting_bytes = 0
        self._send_text = send_text
        self._send_kernel = send_kernel
        self._max_in_flight = max_in_flight
        self._key_prefix = key_prefix
        self._identify = identify
        self._numbers = itertools.count(1)
        self._requests: dict[int, Request] = {}
        self._weights: dict[int, int] = {}
        self._readers = Readers()
        self._desk = Desk()
        self._reasking = Reasking()
        self._overload = Overload()
        self._deadlines = Deadlines(ANSWER_TIMEOUT_S)
        self._kernel_down_since = self._text_down_since = math.inf  # inf: it is there

    def __len__(self) -> int:
        return len(self._requests)

    def next_number(self) -> int:
        return next(self._numbers)

    # ------------------------------------------------------------ from clients

    def on_client(self, client: Client, message: Any, now: float) -> None:
        out = Outbox()
        if type(message) in INTAKE:
            try:
                self._enter(client, message, now, out)
            except LlmosError as refusal:
                out.client.append((client.id, error_message(refusal, message.req)))
        elif isinstance(message, (Ack, Cancel)):
            request = self._requests.get(client.requests.get(message.req, 0))
            if isinstance(request, Stream):  # others have just ended, or are answered at once
                if isinstance(message, Ack):
                    request.acknowledge(message.upto, out)
                else:
                    request.cancel(out)
                    self._settle(request, now, out)
        else:
            error = InvalidRequest(f"{type(message).__name__} belongs on the client-control socket", field="message")
            out.client.append((client.id, error_message(error, message.req)))
        self._flush(out, now)

    def dismiss(self, client: Client, error: LlmosError, now: float) -> None:
        """It may not be here any more: everything it reads or waits for ends with the error."""
        out = Outbox()
        for number in list(client.requests.values()):
            request = self._requests.get(number)
            if request is not None:
                request.fail(error, out)
                self._settle(request, now, out)
        self._flush(out, now)

    def on_client_gone(self, client: Client, now: float) -> None:
        """The client left: nobody waits for its requests."""
        out = Outbox()
        numbers, client.requests = list(client.requests.values()), {}
        if numbers:
            log.info("client %r (pid %d) left %d requests", client.peer.name, client.peer.pid, len(numbers))
        for number in numbers:
            request = self._requests.get(number)
            if request is not None:
                request.abandon(out)
                self._settle(request, now, out)
        self._flush(out, now)

    def leave(self, client: Client, req: int, now: float) -> None:
        """The client does not want this answer any more, nor an end of it."""
        request = self._requests.get(client.requests.pop(req, 0))
        if request is not None:
            out = Outbox()
            request.abandon(out)
            self._settle(request, now, out)
            self._flush(out, now)

    def _enter(self, client: Client, message: Any, now: float, out: Outbox) -> None:
        """Begin a request; raises the typed refusal."""
        asker = self._identify(client)
        check_right(asker.role, message)
        check_req(message.req)
        if message.req in client.requests:
            raise InvalidRequest(f"req: {message.req} is in use", field="req")
        if isinstance(message, Generate) and not message.again:
            self._overload.check(message.model or "", asker.owner, now)
        if len(client.requests) >= self._max_in_flight:
            raise Overloaded(f"{len(client.requests)} requests of this client are in flight, the limit")
        if self.waiting_bytes > MAX_WAITING_BYTES:
            raise Overloaded(f"prompts of {self.waiting_bytes} bytes wait for a service, more than the limit")
        number = next(self._numbers)
        entry = Entry(asker, number, f"{self._key_prefix}{number}", now, self.models, out)
        request = INTAKE[type(message)](message, entry)
        self._requests[number] = request
        client.requests[message.req] = number
        self._settle(request, now, out)

    # ------------------------------------------------------------ from the tokenizer

    def on_text(self, message: Any, now: float) -> None:
        out = Outbox()
        if isinstance(message, Decoded):
            for item in message.items:
                request = self._requests.get(item.stream)
                if isinstance(request, Stream):
                    request.decoded(item, out)
                    self._settle(request, now, out)
        elif isinstance(message, Encoded):
            self._encoded(message, now, out)
        elif isinstance(message, Rendered):
            request = self._requests.get(message.req)
            if isinstance(request, Exchange) and request.state is RequestState.ENCODING:
                out.client.append((request.client, request.rendered(message)))
                self._settle(request, now, out)
        elif isinstance(message, ModelInfoList):
            self.models = {info.model: info for info in message.models}
        elif isinstance(message, Error):
            self._text_error(message, now, out)
        else:
            log.error("the tokenizer sent a %s", type(message).__name__)
        self._flush(out, now)

    def on_text_down(self, now: float) -> None:
        """Encodings are lost, and so is the decoding state of all streams."""
        out = Outbox()
        self._text_down_since = now
        self._desk.close()
        for request in list(self._requests.values()):
            if request.has_turn:
                request.text_lost()
            if request.wants_text and request.strikes >= MAX_STRIKES:
                text = f"{request.strikes} tokenizers died while they had the text of this request"
                request.text_failed(LlmosError(text, field="prompt" if not request.rid else None), out)
            self._settle(request, now, out)
        self._flush(out, now)

    def on_text_up(self, now: float) -> None:
        """A tokenizer is there, and knows nothing."""
        self._text_down_since = math.inf
        self._desk.open()
        self._flush(Outbox(), now)

    def _encoded(self, message: Encoded, now: float, out: Outbox) -> None:
        request = self._requests.get(message.req)
        if request is None or request.state is not RequestState.ENCODING:
            return
        try:
            request.encoded(message, self.models[request.model], now, out)
        except LlmosError as error:
            request.fail(error, out)
        self._settle(request, now, out)

    def _text_error(self, message: Error, now: float, out: Outbox) -> None:
        request = self._requests.get(message.req)
        if request is None:
            log.error("tokenizer: %s", message.message)
        elif request.has_turn:
            error = _typed(message)
            if request.state is not RequestState.ENCODING:
                error = Unavailable(f"the tokenizer can not go on with the text: {message.message}")
            request.text_failed(error, out)
            self._settle(request, now, out)

    # ------------------------------------------------------------ from the microkernel

    def on_kernel(self, message: Any, now: float) -> None:
        out = Outbox()
        if isinstance(message, SeqTokens):
            self._tokens(message, now, out)
        elif isinstance(message, (SeqAccepted, SeqAppended, SeqAttached, Stats)):
            self._answered(message, now, out)
        elif isinstance(message, SeqReplaced):
            if (stream := self._readers.stops(message.rid)) is not None:
                stream.replaced(out)
                self._settle(stream, now, out)
        elif isinstance(message, Error):
            self._kernel_error(message, now, out)
        elif not isinstance(message, Done):  # an open sequence is closed that nobody waited for
            log.error("the microkernel sent a %s", type(message).__name__)
        self._flush(out, now)

    def on_kernel_down(self, now: float) -> None:
        """What it knew, its successor will know; what was on the way is lost."""
        self._kernel_down_since = now
        self._readers.clear()
        self._reasking.stop()
        out = Outbox()
        for request in list(self._requests.values()):
            request.kernel_lost()
            self._settle(request, now, out)
        self._flush(out, now)

    def on_kernel_up(self, now: float) -> None:
        """There is a microkernel that does not know this gateway. Those that had something come before those that want it now, and
        those that had output before those that waited for it.
        """
        self._kernel_down_since = math.inf
        asking = [request for request in self._requests.values() if request.state in ASKING]
        asking.sort(key=lambda request: (request.state is not RequestState.RESUMING, not request.has_output))
        self._reasking.begin(request.number for request in asking)
        self._flush(Outbox(), now)

    def _ask_again(self, now: float, out: Outbox) -> None:
        """The questions whose turn it is."""
        while (number := self._reasking.next()) is not None:
            request = self._requests.get(number)
            if request is None or request.state not in ASKING:
                self._reasking.answered(number)
                continue
            request.kernel_back(now, out)
            self._settle(request, now, out)

    def _tokens(self, message: SeqTokens, now: float, out: Outbox) -> None:
        for result in message.results:
            if (stream := self._readers.get(result.rid)) is not None:
                stream.result(result, out)
                self._settle(stream, now, out)
        for entry in (*message.entries, *_entries(message.columns)):
            if (stream := self._readers.get(entry.rid)) is not None:
                stream.tokens(entry, out)
                self._settle(stream, now, out)
        for end in message.ends:
            if (stream := self._readers.stops(end.rid)) is not None:
                stream.end(end, out)
                self._settle(stream, now, out)

    def _answered(self, message: Granted | Stats, now: float, out: Outbox) -> None:
        request = self._requests.get(message.req)
        if request is None or request.state not in ASKING:
            if not isinstance(message, Stats):  # whoever asked for that may have left
                log.error("the microkernel sent a %s that nobody asked for", type(message).__name__)
            return
        if isinstance(request, Stream) and isinstance(message, SeqAttached):
            self._readers.answered(request, out.kernel, is_granted=True)
        request.answered(message, now, out)
        is_going_on = not isinstance(message, SeqAttached) or message.end is None
        if isinstance(request, Stream) and request.state is RequestState.STREAMING and is_going_on:
            older = self._readers.begins(request)
            if older is not None:  # the microkernel only tells other gateways
                older.replaced(out)
                self._settle(older, now, out)
        self._settle(request, now, out)

    def _kernel_error(self, message: Error, now: float, out: Outbox) -> None:
        request = self._requests.get(message.req)
        if request is not None and request.state in ASKING:
            error = _typed(message)
            if isinstance(error, Overloaded):
                self._note_overload(request, error, now)
            request.refused(error, out)
        else:
            request = request or self._readers.get(message.rid or 0)
            if request is None:
                log.warning("microkernel: %s", message.message)
                return
            request.fail(_typed(message), out)
        self._settle(request, now, out)

    def _note_overload(self, request: Request, error: Overloaded, now: float) -> None:
        owner = request.owner
        if owner is not None:
            self._overload.note(request.model, owner, error, now)
            if request.model == next(iter(self.models), None):  # that of who names none
                self._overload.note("", owner, error, now)

    # ------------------------------------------------------------ time, end, sending

    def tick(self, now: float) -> None:
        """Fail what a service did not answer in time."""
        out = Outbox()
        for number in self._deadlines.late(now):
            request = self._requests[number]
            request.fail(self._too_late(request), out)
            self._settle(request, now, out)
        if now - self._kernel_down_since >= PATIENCE_S:
            gone = Unavailable("the microkernel does not come back")
            for request in [request for request in self._requests.values() if request.state in ASKING]:
                request.refused(gone, out)
                self._settle(request, now, out)
        if now - self._text_down_since >= PATIENCE_S:
            for request in [request for request in self._requests.values() if request.wants_text]:
                request.text_failed(Unavailable("the tokenizer does not come back"), out)
                self._settle(request, now, out)
        self._flush(out, now)

    def _too_late(self, request: Request) -> Unavailable:
        is_text = request.state is RequestState.ENCODING
        service = "tokenizer" if is_text else "microkernel"
        if math.isinf(self._text_down_since if is_text else self._kernel_down_since):
            return Unavailable(f"the {service} is silent for {ANSWER_TIMEOUT_S:g} s")
        return Unavailable(f"the {service} is not running")

    def _settle(self, request: Request, now: float, out: Outbox) -> None:
        """After each event of a request: out of the tables with it if it is over, else see what it waits for."""
        number, state = request.number, request.state
        if state not in ASKING:
            self._reasking.answered(number)
        if state is RequestState.ENDED:
            self._requests.pop(number, None)
            if isinstance(request, Stream):
                self._readers.forget(request, out.kernel)
        elif state in ASKING and isinstance(request, Stream) and request.rid:
            self._readers.asks(request)
        if request.is_over:
            client = self.clients.find(request.client) if self.clients is not None else None
            if client is not None and client.requests.get(request.req) == number:
                del client.requests[request.req]
        elif request.wants_text and not request.has_turn and self._desk.admit(number, request.strikes):
            request.take_turn(out)
        is_paused = state is RequestState.RESUMING and not math.isinf(self._kernel_down_since)
        self._deadlines.watch(number, state if state in _WAITING and not is_paused else None, now)
        weight = 0 if state is RequestState.ENDED else request.weight
        self.waiting_bytes += weight - self._weights.pop(number, 0)
        if weight:
            self._weights[number] = weight

    def _give_turns(self, now: float, out: Outbox) -> None:
        while (number := self._desk.next(self._is_behind, now)) is not None:
            request = self._requests.get(number)
            if request is not None and request.wants_text and not request.has_turn:
                request.take_turn(out)

    def _is_behind(self, number: int) -> bool:
        return number in self._requests and self._requests[number].is_behind

    def _flush(self, out: Outbox, now: float) -> None:
        """Send everything. What can not be sent is asked again when the service is back."""
        self._give_turns(now, out)
        self._ask_again(now, out)
        for message in out.text:
            self._send_text(message)
        if out.decode:
            self._send_text(DecodeStep(tuple(out.decode)))
        for leave in out.leave:
            self._readers.leaves(leave, out.kernel)
        for message in out.kernel:
            if isinstance(message, _QUESTIONS) and self._reasking.holds_up(message.req):
                self._reasking.join(message.req)
            elif self._send_kernel(message) and isinstance(message, _QUESTIONS):
                self._requests[message.req].sent(message)  # a request that asks is not over
        for client_id, message in out.client:
            client = self.clients.find(client_id) if self.clients is not None else None
            if client is not None:
                assert self.clients is not None
                self.clients.send(client, message)


def _entries(columns: bytes) -> Iterable[TokenEntry]:
    """The (rid, offset, token) columns of a `SeqTokens`, one by one."""
    values = unpack_i64(columns)
    return (TokenEntry(rid, offset, (token,)) for rid, offset, token in zip(values[0::3], values[1::3], values[2::3]))


def _typed(message: Error) -> LlmosError:
    """A service's error in the caller's words: however the prompt was given, its name is `prompt`."""
    is_prompt = message.field in ("text", "messages", "tokens")
    return typed(structs.replace(message, field="prompt") if is_prompt else message)
