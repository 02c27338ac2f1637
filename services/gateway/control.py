"""The control verbs: relayed to the microkernel under the gateway's own request numbers, pure.

    client          microkernel                 client
    PsGet(7)   ->   PsGet(31, owner)       ->   PsReply(7)
    Kill(8)    ->   Kill(32, rid, owner)   ->   Killed(8), or Error(8) NotFound
    Wait(9)    ->   Wait(33, rid, owner)   ->   (hours later) Waited(9)
    Wait(4)    ->   -                      ->   Waited(4): another client's; the microkernel was asked already

`owner` is the client's own name, whatever the client wrote there, and None for an administrator. The microkernel filters by
it: a sequence of somebody else answers exactly like one that does not exist. What needs an administrator is refused here.

A Wait may last as long as its sequence. Clients that wait for the same one share one Wait at the microkernel, which outlives
them: who leaves, or sends a Cancel, is forgotten here, and a new one joins. So the microkernel holds at most one per sequence and
owner, and this gateway at most `max_waits` per client.

Invariant: every request of a client that stays is answered once: with a reply, with the microkernel's error, with a refusal, or
with Unavailable when the microkernel is lost, or silent where it should answer at once. (A cancelled Wait is not answered.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from llmos.errors import InvalidRequest, LlmosError, Overloaded, Unavailable
from llmos.ports.core import error_message
from llmos.protocol.messages import ControlAnswer, ControlVerb, Error, Message, Wait
from llmos.services.gateway.owners import Asker
from llmos.services.gateway.validate import check_control

TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Client:
    """One that waits for an answer. `client` is its routing id."""

    client: bytes
    req: int


@dataclass(slots=True)
class _Question:
    """What the microkernel was asked. `wait`: its rid and owner, if it is a Wait."""

    clients: list[_Client]
    deadline: float
    wait: tuple[int, str | None] | None = None


class ControlRelay:
    """`send` to the microkernel returns False if it is not there; `reply` goes to a client by routing id."""

    def __init__(
        self, send: Callable[[Message], bool], reply: Callable[[bytes, Message], None], max_waits: int
    ) -> None:
        self._send = send
        self._reply = reply
        self._max_waits = max_waits
        self._numbers = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._waits: dict[tuple[int, str | None], _Question] = {}
        self._waiting: dict[bytes, dict[int, _Question]] = {}  # the Waits of each client by its own numbers

    def ask(self, asker: Asker, request: ControlVerb, now: float) -> None:
        """A client's request."""
        client = _Client(asker.client, request.req)
        try:
            check_control(request, asker.is_administrator)
            if isinstance(request, Wait):
                self._wait(asker, request, client)
            else:
                self._put(asker, request, _Question([client], now + TIMEOUT_S))
        except LlmosError as error:
            self._refuse(client, error)

    def answer(self, message: ControlAnswer | Error) -> None:
        """The microkernel's reply to one of our numbers."""
        question = self._questions.get(message.req)
        if question is not None:
            self._drop(message.req)
            for client in question.clients:
                self._reply(client.client, msgspec.structs.replace(message, req=client.req))

    def cancel(self, client: bytes, req: int) -> None:
        """The client does not wait any more. Idempotent."""
        question = self._waiting.get(client, {}).pop(req, None)
        if question is not None:
            question.clients.remove(_Client(client, req))
            if not self._waiting[client]:
                del self._waiting[client]

    def on_client_gone(self, client: bytes) -> None:
        for req in list(self._waiting.get(client, ())):
            self.cancel(client, req)

    def fail_all(self, error: LlmosError) -> None:
        """The microkernel is gone."""
        for number in list(self._questions):
            self._fail(number, error)

    def expire(self, now: float) -> None:
        """Fail what waited too long."""
        error = Unavailable(f"the microkernel is silent for {TIMEOUT_S:g} s")
        for number in [number for number, question in self._questions.items() if question.deadline <= now]:
            self._fail(number, error)

    def _wait(self, asker: Asker, request: Wait, client: _Client) -> None:
        mine = self._waiting.get(asker.client, {})
        if request.req in mine:
            raise InvalidRequest(f"req: {request.req} is in use", field="req")
        if len(mine) >= self._max_waits:
            raise Overloaded(f"{len(mine)} requests of this client are in flight, the limit")
        key = (request.rid, asker.limited_to)
        question = self._waits.get(key)
        if question is None:
            question = self._waits[key] = _Question([], math.inf, key)
            self._put(asker, request, question)
        question.clients.append(client)
        self._waiting.setdefault(asker.client, {})[request.req] = question

    def _put(self, asker: Asker, request: ControlVerb, question: _Question) -> None:
        """Ask the microkernel; raises `Unavailable` if it is not there."""
        number = next(self._numbers)
        self._questions[number] = question
        if not self._send(_for_microkernel(request, number, asker)):
            self._drop(number)
            raise Unavailable("the microkernel is not running")

    def _fail(self, number: int, error: LlmosError) -> None:
        clients = self._questions[number].clients
        self._drop(number)
        for client in clients:
            self._refuse(client, error)

    def _drop(self, number: int) -> None:
        """The question is answered, or never will be."""
        question = self._questions.pop(number)
        if question.wait is not None:
            del self._waits[question.wait]
            for client in question.clients:
                mine = self._waiting[client.client]
                del mine[client.req]
                if not mine:
                    del self._waiting[client.client]

    def _refuse(self, client: _Client, error: LlmosError) -> None:
        self._reply(client.client, error_message(error, client.req))


def _for_microkernel(request: ControlVerb, number: int, asker: Asker) -> Message:
    """The request under our number, limited to what the client may see."""
    if "owner" not in request.__struct_fields__:
        return msgspec.structs.replace(request, req=number)
    return msgspec.structs.replace(request, req=number, owner=asker.limited_to)
