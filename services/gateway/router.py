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
from dataclasses import dataclass
from typing import Any

from llmos.codes import FinishReason
from llmos.errors import InvalidRequest, LlmosError, Overloaded, Unavailable, from_code
from llmos.ports.core import error_message
from llmos.protocol.codec import unpack_i64
from llmos.protocol.messages import (
    Ack,
    Cancel,
    Decoded,
    DecodeStep,
    Encode,
    Encoded,
    Error,
    Generate,
    Message,
    ModelInfo,
    ModelInfoList,
    SeqAccepted,
    SeqCancel,
    SeqSubmit,
    SeqTokens,
    TokenEntry,
    Tokenize,
    Tokenized,
)
from llmos.services.gateway.clients import ClientState, ClientTable
from llmos.services.gateway.owners import is_administrator, owner_name
from llmos.services.gateway.requests import Outbox, Request, RequestState, Terms
from llmos.services.gateway.validate import check_generate, check_tokenize, check_tokens

log = logging.getLogger(__name__)
ANSWER_TIMEOUT_S = 20.0  # for Encode and for SeqSubmit
Send = Callable[[Message], bool]


@dataclass(frozen=True, slots=True)
class _Tokenization:
    """A Tokenize request on its way through the tokenizer."""

    client: bytes
    req: int
    model: str


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
        self._by_rid: dict[int, Request] = {}
        self._tokenizations: dict[int, _Tokenization] = {}
        self._deadlines: deque[tuple[float, int, RequestState]] = deque()

    def __len__(self) -> int:
        return len(self._requests) + len(self._tokenizations)

    def next_number(self) -> int:
        return next(self._numbers)

    # ------------------------------------------------------------ from clients

    def on_client(self, client: ClientState[int], message: Any, now: float) -> None:
        out = Outbox()
        if isinstance(message, (Generate, Tokenize)):
            try:
                self._admit(client, message)
                if isinstance(message, Generate):
                    self._generate(client, message, now, out)
                else:
                    self._tokenize(client, message, now, out)
            except LlmosError as error:
                out.client.append((client.peer.routing_id, error_message(error, message.req)))
        elif isinstance(message, (Ack, Cancel)):
            request = self._requests.get(client.requests.get(message.req, 0))
            if request is None:
                return  # it has just ended
            if isinstance(message, Ack):
                request.acknowledge(message.upto, out)
            else:
                request.cancel(out)
                self._settle(request)
        else:
            text = f"{type(message).__name__} belongs on the client-control socket"
            out.client.append(
                (client.peer.routing_id, error_message(InvalidRequest(text, field="message"), message.req))
            )
        self._flush(out)

    def on_client_gone(self, client: ClientState[int]) -> None:
        """The client left: its sequences have no reader."""
        out = Outbox()
        numbers, client.requests = list(client.requests.values()), {}
        if numbers:
            log.info("client %r (pid %d) left %d requests", client.peer.name, client.peer.pid, len(numbers))
        for number in numbers:
            self._tokenizations.pop(number, None)
            request = self._requests.get(number)
            if request is not None:
                request.abandon(out)
                self._settle(request)
        self._flush(out)

    def _admit(self, client: ClientState[int], message: Generate | Tokenize) -> None:
        if message.req <= 0 or message.req in client.requests:
            raise InvalidRequest(f"req: {message.req} is in use or not positive", field="req")
        if len(client.requests) >= self._max_in_flight:
            raise Overloaded(f"{len(client.requests)} requests of this client are in flight, the limit")

    def _generate(self, client: ClientState[int], message: Generate, now: float, out: Outbox) -> None:
        checked = check_generate(message, self.models, is_administrator(client.peer.uid))
        number, owner = next(self._numbers), owner_name(client.peer.uid)
        routing_id, model = client.peer.routing_id, checked.model.model
        terms = Terms(message.client_request_id, message.nice, message.deadline_ms, now)
        request = Request(number, routing_id, message.req, model, checked.params, owner, terms)
        if message.token_ids is not None:
            params = check_tokens(message.token_ids, checked.params, checked.model)
            request.encoded(message.token_ids, params, now, out)
        else:
            out.text.append(Encode(number, model, message.text, message.messages))
        self._requests[number] = request
        client.requests[message.req] = number
        self._deadlines.append((now + ANSWER_TIMEOUT_S, number, request.state))

    def _tokenize(self, client: ClientState[int], message: Tokenize, now: float, out: Outbox) -> None:
        info = check_tokenize(message, self.models)
        number = next(self._numbers)
        self._tokenizations[number] = _Tokenization(client.peer.routing_id, message.req, info.model)
        client.requests[message.req] = number
        out.text.append(Encode(number, info.model, message.text, message.messages, pieces=True))
        self._deadlines.append((now + ANSWER_TIMEOUT_S, number, RequestState.ENCODING))

    # ------------------------------------------------------------ from the tokenizer

    def on_text(self, message: Any, now: float) -> None:
        out = Outbox()
        if isinstance(message, Decoded):
            for item in message.items:
                request = self._requests.get(item.stream)
                if request is not None:
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
        error = Unavailable("the tokenizer went away")
        for request in list(self._requests.values()):
            if request.state is RequestState.ENCODING:
                request.fail(error, out)
            else:
                request.text_lost(out)
            self._settle(request)
        for number in list(self._tokenizations):
            self._fail_number(number, error, out)
        self._flush(out)

    def _encoded(self, message: Encoded, now: float, out: Outbox) -> None:
        tokenization = self._forget_tokenization(message.req)
        if tokenization is not None:
            reply = Tokenized(tokenization.req, tokenization.model, message.token_ids, message.pieces)
            out.client.append((tokenization.client, reply))
            return
        request = self._requests.get(message.req)
        if request is None or request.state is not RequestState.ENCODING:
            return
        try:
            params = check_tokens(message.token_ids, request.params, self.models[request.model])
        except LlmosError as error:
            request.fail(error, out)
        else:
            request.encoded(message.token_ids, params, now, out)
            self._deadlines.append((now + ANSWER_TIMEOUT_S, request.number, request.state))
        self._settle(request)

    def _text_error(self, message: Error, out: Outbox) -> None:
        request = self._requests.get(message.req)
        if request is not None and request.state is not RequestState.ENCODING:
            request.text_lost(out)
            self._settle(request)
        elif not self._fail_number(message.req, _about_prompt(message), out):
            log.error("tokenizer: %s", message.message)

    # ------------------------------------------------------------ from the microkernel

    def on_kernel(self, message: Any) -> None:
        out = Outbox()
        if isinstance(message, SeqTokens):
            for entry in (*message.entries, *_entries(message.columns)):
                if (request := self._by_rid.get(entry.rid)) is not None:
                    request.tokens(entry, out)
                    self._settle(request)
            for end in message.ends:
                if (request := self._by_rid.get(end.rid)) is not None:
                    request.end(end, out)
                    self._settle(request)
        elif isinstance(message, SeqAccepted):
            request = self._requests.get(message.req)
            if request is None or request.state is not RequestState.SUBMITTED:
                out.kernel.append(SeqCancel(message.rid, FinishReason.CANCELLED))  # nobody waits for it
            else:
                self._by_rid[message.rid] = request
                request.accepted(message.rid, out)
        elif isinstance(message, Error):
            request = self._requests.get(message.req) or self._by_rid.get(message.rid or 0)
            if request is None:
                log.warning("microkernel: %s", message.message)
            else:
                request.fail(_typed(message), out)
                self._settle(request)
        else:
            log.error("the microkernel sent a %s", type(message).__name__)
        self._flush(out)

    def on_kernel_down(self) -> None:
        """Every sequence is lost with the microkernel."""
        self._fail_requests(
            [r for r in self._requests.values() if r.state is not RequestState.ENCODING],
            Unavailable("the microkernel went away"),
        )

    # ------------------------------------------------------------ time, end, sending

    def tick(self, now: float) -> None:
        """Fail what a service did not answer in time."""
        out = Outbox()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number, state = self._deadlines.popleft()
            service = "tokenizer" if state is RequestState.ENCODING else "microkernel"
            request = self._requests.get(number)
            if request is None or request.state is state:
                self._fail_number(number, Unavailable(f"the {service} is silent for {ANSWER_TIMEOUT_S:g} s"), out)
        self._flush(out)

    def fail_all(self, error: LlmosError) -> None:
        out = Outbox()
        for number in list(self._tokenizations):
            self._fail_number(number, error, out)
        self._flush(out)
        self._fail_requests(list(self._requests.values()), error)

    def _fail_requests(self, requests: Iterable[Request], error: LlmosError) -> None:
        out = Outbox()
        for request in requests:
            request.fail(error, out)
            self._settle(request)
        self._flush(out)

    def _fail_number(self, number: int, error: LlmosError, out: Outbox) -> bool:
        """Fail a request or tokenization, if it is still there."""
        tokenization = self._forget_tokenization(number)
        if tokenization is not None:
            out.client.append((tokenization.client, error_message(error, tokenization.req)))
            return True
        request = self._requests.get(number)
        if request is None:
            return False
        request.fail(error, out)
        self._settle(request)
        return True

    def _settle(self, request: Request) -> None:
        """Drop a request that ended from all tables."""
        if request.state is not RequestState.ENDED or self._requests.pop(request.number, None) is None:
            return
        self._by_rid.pop(request.rid, None)
        self._release(request.client, request.req)

    def _forget_tokenization(self, number: int) -> _Tokenization | None:
        tokenization = self._tokenizations.pop(number, None)
        if tokenization is not None:
            self._release(tokenization.client, tokenization.req)
        return tokenization

    def _release(self, routing_id: bytes, req: int) -> None:
        client = self.clients.find(routing_id) if self.clients is not None else None
        if client is not None:
            client.requests.pop(req, None)

    def _flush(self, out: Outbox) -> None:
        """Send everything; what a service can not take fails, which may give more to send."""
        failed = Outbox()
        for message in out.text:
            if not self._send_text(message) and isinstance(message, Encode):
                self._fail_number(message.req, Unavailable("the tokenizer is not running"), failed)
        if out.decode and not self._send_text(DecodeStep(tuple(out.decode))):
            for item in out.decode:
                if (request := self._requests.get(item.stream)) is not None:
                    request.text_lost(failed)
                    self._settle(request)
        for message in out.kernel:
            if not self._send_kernel(message) and isinstance(message, SeqSubmit):
                self._fail_number(message.req, Unavailable("the microkernel is not running"), failed)
        for routing_id, message in out.client:
            client = self.clients.find(routing_id) if self.clients is not None else None
            if client is not None:
                assert self.clients is not None
                self.clients.send(client, message)
        if failed.client or failed.kernel or failed.text or failed.decode:
            self._flush(failed)


def _entries(columns: bytes) -> Iterable[TokenEntry]:
    """The (rid, offset, token) columns of a `SeqTokens`, one by one."""
    values = unpack_i64(columns)
    return (TokenEntry(rid, offset, (token,)) for rid, offset, token in zip(values[0::3], values[1::3], values[2::3]))


def _typed(message: Error) -> LlmosError:
    return from_code(message.code, message.message, field=message.field, rid=message.rid)


def _about_prompt(message: Error) -> LlmosError:
    """The tokenizer's error in the caller's words: however the prompt was given, its name is `prompt`."""
    field = "prompt" if message.field in ("text", "messages") else message.field
    return from_code(message.code, message.message, field=field)
