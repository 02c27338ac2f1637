"""The control verbs: relayed to the microkernel under the gateway's own request numbers, pure.

    client          microkernel                 client
    PsGet(7)   ->   PsGet(31, owner)       ->   PsReply(7)
    Kill(8)    ->   Kill(32, rid, owner)   ->   Killed(8), or Error(8) NotFound

`owner` is the client's own name, whatever the client wrote there, and None for an administrator. The microkernel filters by
it: a sequence of somebody else answers exactly like one that does not exist. What needs an administrator is refused here.

Invariant: every request is answered once: with a reply, with the microkernel's error, with a refusal, or with Unavailable
when the microkernel is lost or silent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from llmos.errors import LlmosError, Unavailable
from llmos.ports.core import error_message
from llmos.protocol.messages import ControlAnswer, ControlVerb, Error, Message
from llmos.services.gateway.validate import check_control

TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Asker:
    """The client that waits. `client` is its routing id."""

    client: bytes
    owner: str
    is_administrator: bool


@dataclass(frozen=True, slots=True)
class _Waiting:
    client: bytes
    req: int
    deadline: float


class ControlRelay:
    """`send` to the microkernel returns False if it is not there; `reply` goes to a client by routing id."""

    def __init__(self, send: Callable[[Message], bool], reply: Callable[[bytes, Message], None]) -> None:
        self._send = send
        self._reply = reply
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}

    def ask(self, asker: Asker, request: ControlVerb, now: float) -> None:
        """A client's request."""
        waiting = _Waiting(asker.client, request.req, now + TIMEOUT_S)
        try:
            check_control(request, asker.is_administrator)
        except LlmosError as error:
            self._refuse(waiting, error)
            return
        number = next(self._numbers)
        if self._send(_for_microkernel(request, number, asker)):
            self._waiting[number] = waiting
        else:
            self._refuse(waiting, Unavailable("the microkernel is not running"))

    def answer(self, message: ControlAnswer | Error) -> None:
        """The microkernel's reply to one of our numbers."""
        waiting = self._waiting.pop(message.req, None)
        if waiting is not None:
            self._reply(waiting.client, msgspec.structs.replace(message, req=waiting.req))

    def fail_all(self, error: LlmosError) -> None:
        """The microkernel is gone."""
        waiting, self._waiting = self._waiting, {}
        for each in waiting.values():
            self._refuse(each, error)

    def expire(self, now: float) -> None:
        """Fail what waited too long."""
        for number in [number for number, each in self._waiting.items() if each.deadline <= now]:
            self._refuse(self._waiting.pop(number), Unavailable(f"the microkernel is silent for {TIMEOUT_S:g} s"))

    def _refuse(self, waiting: _Waiting, error: LlmosError) -> None:
        self._reply(waiting.client, error_message(error, waiting.req))


def _for_microkernel(request: ControlVerb, number: int, asker: Asker) -> Message:
    """The request under our number, limited to what the client may see."""
    if "owner" not in request.__struct_fields__:
        return msgspec.structs.replace(request, req=number)
    return msgspec.structs.replace(request, req=number, owner=None if asker.is_administrator else asker.owner)
