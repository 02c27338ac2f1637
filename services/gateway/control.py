"""The control verbs: relayed to the microkernel under the gateway's own request numbers, pure.

    client          microkernel                 client
    PsGet(7)   ->   PsGet(31, owner)       ->   PsReply(7)
    Kill(8)    ->   Kill(32, rid, owner)   ->   Killed(8), or Error(8) NotFound
    Wait(9)    ->   Wait(33, rid, owner)   ->   (hours later) Waited(9)
    Wait(4)    ->   -                      ->   Waited(4): another client's; the microkernel was asked already

`owner` is the client's tenant, whatever the client wrote there, and None for an administrator. The microkernel filters by
it: a sequence of somebody else answers exactly like one that does not exist. What the client's role does not allow (rights.py) is
refused here.

A Wait may last as long as its sequence. Clients that wait for the same one share one Wait at the microkernel, which outlives
them: who leaves, or sends a Cancel, is forgotten here, and a new one joins. So the microkernel holds at most one per sequence and
owner, and this gateway at most `max_open` per client.

If the microkernel dies, what it had not answered is asked again of its successor, and new questions wait for that. A verb may so be
carried out twice, which does no harm, with two exceptions. Of a Fork nobody could tell: it is refused. And a sequence that was
ended the first time is not there to be ended again: then Stat tells whether it was this verb that ended it.

Invariant: every request of a client that stays is answered once: with a reply, with the microkernel's error, with a refusal, or
with Unavailable when the microkernel is silent, or away for too long. (A cancelled Wait is not answered.)
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from llmos.codes import ErrorCode, FinishReason
from llmos.errors import InvalidRequest, LlmosError, Overloaded, Unavailable
from llmos.protocol.failures import error_message
from llmos.protocol.messages import (
    Close,
    ControlAnswer,
    ControlVerb,
    Deadline,
    Done,
    Error,
    Fork,
    Kill,
    Killed,
    Message,
    RestartService,
    Stat,
    Stats,
    Wait,
)
from llmos.services.gateway.owners import Asker
from llmos.services.gateway.questions import deadline_left
from llmos.services.gateway.rights import check_right
from llmos.services.gateway.validate import check_control

TIMEOUT_S = 10.0
RECOVERY_S = 30.0  # instead, if the microkernel died meanwhile
PATIENCE_S = 300.0  # the same for a Wait
_UNKNOWN = "the microkernel died, and it is not known whether it forked the sequence before: `stat` counts its children"


@dataclass(frozen=True, slots=True)
class _Client:
    """One that waits for an answer. `client` is its id."""

    client: bytes
    req: int


@dataclass(slots=True)
class _Question:
    """What the microkernel is asked with `verb`, under our number. `asked_at`: when it came; `times`: how often it was sent.
    `wait`: rid and owner, if it is a Wait. `refusal`: the answer, unless a Stat says that it did happen. `asker`: who asked first.
    """

    asker: Asker
    clients: list[_Client]
    verb: Any
    asked_at: float
    deadline: float
    wait: tuple[int, str | None] | None = None
    times: int = 0
    refusal: Error | None = None


class ControlRelay:
    """`send` to the microkernel returns False if it is not there; `reply` goes to a client by its id. `audit` is told of every verb
    that was answered, but for Waits.
    """

    def __init__(
        self,
        send: Callable[[Message], bool],
        reply: Callable[[bytes, Message], None],
        max_open: int,
        audit: Callable[[Asker, Message, Message], None] = lambda asker, verb, answer: None,
    ) -> None:
        self._send = send
        self._reply = reply
        self._audit = audit
        self._max_open = max_open
        self._is_down = False
        self._numbers = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._open: Counter[bytes] = Counter()  # questions of each client, but for Waits
        self._waits: dict[tuple[int, str | None], _Question] = {}
        self._waiting: dict[bytes, dict[int, _Question]] = {}  # the Waits of each client by its own numbers

    # ------------------------------------------------------------ clients

    def ask(self, asker: Asker, request: ControlVerb, now: float) -> None:
        """A client's request."""
        client = _Client(asker.client, request.req)
        try:
            check_right(asker.role, request)
            check_control(request, asker.is_administrator)
            if isinstance(request, Wait):
                self._wait(asker, request, client, now)
            else:
                self._put(asker, request, _Question(asker, [client], request, now, now + TIMEOUT_S))
        except LlmosError as error:
            self._refuse(client, error)
            self._audit(asker, request, error_message(error, request.req))

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

    def dismiss(self, client: bytes, error: LlmosError) -> None:
        """It may not be here any more: what it waits for is answered with the error. A verb may have been carried out."""
        for number, question in list(self._questions.items()):
            if question.wait is None and question.clients[0].client == client:
                self._fail(number, error)
        for req in list(self._waiting.get(client, ())):
            self._refuse(_Client(client, req), error)
            self.cancel(client, req)

    # ------------------------------------------------------------ the microkernel

    def answer(self, message: ControlAnswer | Error) -> None:
        """The microkernel's reply to one of our numbers."""
        question = self._questions.get(message.req)
        if question is None:
            return
        if question.refusal is not None:
            message = _verdict(question, message)
        elif _may_have_happened(question, message):
            assert isinstance(message, Error)
            question.refusal = message
            self._send(Stat(message.req, question.verb.rid, question.verb.owner))
            return
        self._drop(message.req)
        self._answered(question, message)
        for client in question.clients:
            self._reply(client.client, structs.replace(message, req=client.req))

    def on_kernel_down(self, now: float) -> None:
        """The microkernel died."""
        self._is_down = True
        for number, question in list(self._questions.items()):
            question.refusal = None
            if isinstance(question.verb, RestartService) and question.verb.name == "microkernel" and question.times:
                self.answer(Done(number, 0))
            elif isinstance(question.verb, Fork) and question.times:
                self._fail(number, Unavailable(_UNKNOWN, rid=question.verb.rid))
            elif question.wait is not None:
                question.deadline = now + PATIENCE_S
            else:
                question.deadline = question.asked_at + RECOVERY_S

    def on_kernel_up(self, now: float) -> None:
        """Another one is there."""
        self._is_down = False
        for number, question in list(self._questions.items()):
            if not question.clients:
                self._drop(number)
                continue
            verb = question.verb
            if question.wait is not None:
                question.deadline = math.inf
            elif isinstance(verb, Deadline):
                verb = structs.replace(verb, deadline_ms=deadline_left(verb.deadline_ms, now - question.asked_at))
            question.times += self._send(verb)

    def expire(self, now: float) -> None:
        """Fail what waited too long."""
        error = Unavailable("the microkernel is not running" if self._is_down else "the microkernel is silent")
        for number in [number for number, question in self._questions.items() if question.deadline <= now]:
            self._fail(number, error)

    # ------------------------------------------------------------ questions

    def _wait(self, asker: Asker, request: Wait, client: _Client, now: float) -> None:
        mine = self._waiting.get(asker.client, {})
        if request.req in mine:
            raise InvalidRequest(f"req: {request.req} is in use", field="req")
        if len(mine) >= self._max_open:
            raise Overloaded(f"{len(mine)} requests of this client are in flight, the limit")
        key = (request.rid, asker.limited_to)
        question = self._waits.get(key)
        if question is None:
            question = self._waits[key] = _Question(asker, [], request, now, math.inf, key)
            self._put(asker, request, question)
        question.clients.append(client)
        self._waiting.setdefault(asker.client, {})[request.req] = question

    def _put(self, asker: Asker, request: ControlVerb, question: _Question) -> None:
        """Ask the microkernel, now or when it is there again."""
        if question.wait is None:
            if self._open[asker.client] >= self._max_open:
                raise Overloaded(f"{self._open[asker.client]} requests of this client are in flight, the limit")
            self._open[asker.client] += 1
        number = next(self._numbers)
        question.verb = _for_microkernel(request, number, asker)
        self._questions[number] = question
        question.times += self._send(question.verb)
        if not question.times:
            question.deadline = question.asked_at + (RECOVERY_S if question.wait is None else PATIENCE_S)

    def _fail(self, number: int, error: LlmosError) -> None:
        question = self._questions[number]
        self._drop(number)
        self._answered(question, error_message(error, number))
        for client in question.clients:
            self._refuse(client, error)

    def _answered(self, question: _Question, answer: Message) -> None:
        if question.wait is None:
            self._audit(question.asker, question.verb, answer)

    def _drop(self, number: int) -> None:
        """The question is answered, or never will be."""
        question = self._questions.pop(number)
        if question.wait is None:
            (client,) = question.clients
            self._open[client.client] -= 1
            if not self._open[client.client]:
                del self._open[client.client]
            return
        del self._waits[question.wait]
        for client in question.clients:
            mine = self._waiting[client.client]
            del mine[client.req]
            if not mine:
                del self._waiting[client.client]

    def _refuse(self, client: _Client, error: LlmosError) -> None:
        self._reply(client.client, error_message(error, client.req))


def _may_have_happened(question: _Question, message: Message) -> bool:
    """Was it refused because it was carried out the first time?"""
    ends = isinstance(question.verb, Close) or (isinstance(question.verb, Kill) and question.verb.rid is not None)
    return ends and question.times > 1 and isinstance(message, Error) and message.code == ErrorCode.WRONG_STATE


def _verdict(question: _Question, message: Message) -> ControlAnswer | Error:
    """What to answer now that Stat was asked."""
    assert question.refusal is not None
    verb = question.verb
    by = FinishReason.CLOSED if isinstance(verb, Close) else FinishReason.KILLED
    if not isinstance(message, Stats) or message.reason != by:
        return question.refusal
    return Done(verb.req, verb.rid) if isinstance(verb, Close) else Killed(verb.req, (verb.rid,))


def _for_microkernel(request: ControlVerb, number: int, asker: Asker) -> Message:
    """The request under our number, limited to what the client may see."""
    if "owner" not in request.__struct_fields__:
        return structs.replace(request, req=number)
    return structs.replace(request, req=number, owner=asker.limited_to)
