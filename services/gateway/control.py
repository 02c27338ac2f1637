"""ps, kill, status and models: relayed to the microkernel under the gateway's own request numbers, pure.

    client          microkernel        client
    PsGet(7)   ->   PsGet(31)     ->   PsReply(7), only the rows of the client's user
    Kill(8)    ->   PsGet(32), is it this user's?  ->  Kill(33)  ->  Killed(8) or NotFound

Administrators skip the filter. Invariant: a sequence of somebody else answers exactly like one that does not exist,
and every request is answered once: with a reply, with the microkernel's error, or with Unavailable when the
microkernel is lost or silent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from llmos.codes import ErrorCode
from llmos.errors import LlmosError, NotFound, Unavailable
from llmos.ports.core import error_message
from llmos.protocol.messages import (
    Error,
    Kill,
    Killed,
    Message,
    ModelsGet,
    ModelsReply,
    PsGet,
    PsReply,
    StatusGet,
    StatusReply,
)

TIMEOUT_S = 10.0
ControlRequest = PsGet | Kill | StatusGet | ModelsGet
ControlReply = PsReply | Killed | StatusReply | ModelsReply


@dataclass(frozen=True, slots=True)
class Asker:
    """The client that waits. `client` is its routing id."""

    client: bytes
    owner: str
    is_administrator: bool


@dataclass(frozen=True, slots=True)
class _Waiting:
    asker: Asker
    request: ControlRequest
    deadline: float


class ControlRelay:
    """`send` to the microkernel returns False if it is not there; `reply` goes to a client by routing id."""

    def __init__(self, send: Callable[[Message], bool], reply: Callable[[bytes, Message], None]) -> None:
        self._send = send
        self._reply = reply
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}

    def ask(self, asker: Asker, request: ControlRequest, now: float) -> None:
        """A client's request."""
        waiting = _Waiting(asker, request, now + TIMEOUT_S)
        if isinstance(request, Kill) and not asker.is_administrator:
            self._forward(waiting, PsGet(0))
        else:
            self._forward(waiting, request)

    def answer(self, message: ControlReply | Error) -> None:
        """The microkernel's reply to one of our numbers."""
        waiting = self._waiting.pop(message.req, None)
        if waiting is None:
            return
        asker, request = waiting.asker, waiting.request
        if isinstance(message, Error):
            if isinstance(request, Kill) and message.code == ErrorCode.NOT_FOUND:
                self._refuse(waiting, _unknown(request.rid))
            else:
                self._reply(asker.client, msgspec.structs.replace(message, req=request.req))
        elif isinstance(request, Kill) and isinstance(message, PsReply):
            if any(row.rid == request.rid and row.owner == asker.owner for row in message.rows):
                self._forward(waiting, request)
            else:
                self._refuse(waiting, _unknown(request.rid))
        elif isinstance(message, PsReply) and not asker.is_administrator:
            rows = tuple(row for row in message.rows if row.owner == asker.owner)
            self._reply(asker.client, PsReply(request.req, rows))
        else:
            self._reply(asker.client, msgspec.structs.replace(message, req=request.req))

    def fail_all(self, error: LlmosError) -> None:
        """The microkernel is gone."""
        waiting, self._waiting = self._waiting, {}
        for each in waiting.values():
            self._refuse(each, error)

    def expire(self, now: float) -> None:
        """Fail what waited too long."""
        for number in [number for number, each in self._waiting.items() if each.deadline <= now]:
            self._refuse(self._waiting.pop(number), Unavailable(f"the microkernel is silent for {TIMEOUT_S:g} s"))

    def _forward(self, waiting: _Waiting, request: ControlRequest) -> None:
        number = next(self._numbers)
        if self._send(msgspec.structs.replace(request, req=number)):
            self._waiting[number] = waiting
        else:
            self._refuse(waiting, Unavailable("the microkernel is not running"))

    def _refuse(self, waiting: _Waiting, error: LlmosError) -> None:
        self._reply(waiting.asker.client, error_message(error, waiting.request.req))


def _unknown(rid: int) -> NotFound:
    return NotFound(f"no sequence {rid}", field="rid", rid=rid)
