"""What `AsyncClient` and its sequences have in common: the two links to the gateway, and calls of one request and one reply.

`DATA` carries prompts and tokens, `CONTROL` everything else (ps, kill, fork, suspend, ...), which therefore never queues behind
tokens. Each is opened when it is first used.

A call whose connection is lost is asked again: almost everything may be asked twice. What may not says so with `after_loss`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from llmos.client._core import ConnectionLost
from llmos.client.checked import checked_patience, checked_timeout
from llmos.client.connection import Connection
from llmos.client.lengths import Lengths
from llmos.client.link import Link, OnOutage, Outages
from llmos.client.patience import Patience
from llmos.client.place import CONTROL, DATA, Place
from llmos.client.requests import aged
from llmos.errors import RequestTimeout, Unavailable
from llmos.protocol.messages import Message

RECONNECT_S = 30.0
_CALL_TIMEOUT_S = 30.0  # everything but outputs and waiting; the gateway itself gives up on its services earlier
Build = Callable[[int], Message]
M = TypeVar("M", bound=Message)
__all__ = ["CONTROL", "DATA", "RECONNECT_S", "Build", "Wire", "late"]
# What to do about a call that may have been done: the reply it would have had, None to ask again, or the error.
AfterLoss = Callable[[], Awaitable[M | None]]


class Wire:
    """The way to one llmosd. `timeout_s`: the client's default for its calls; None = outputs may take for ever."""

    def __init__(self, place: Place, timeout_s: float | None, reconnect_s: float, on_outage: OnOutage | None) -> None:
        self.timeout_s = checked_timeout(timeout_s)
        self.reconnect_s = checked_patience(reconnect_s)
        self.lengths = Lengths()
        self.closed = False
        role_name = f"{os.path.basename(sys.argv[0] or 'python')[:64]}"
        outages = Outages(self.reconnect_s, on_outage)
        self._links = {name: Link(place, name, role_name, outages) for name in (DATA, CONTROL)}
        self._tasks: set[asyncio.Task[None]] = set()

    def limit(self, timeout_s: Any) -> float | None:
        """A call's own time limit, or the client's."""
        return self.timeout_s if timeout_s is None else checked_timeout(timeout_s)

    async def call(self, socket: str, build: Build, expected: type[M], after_loss: AfterLoss[M] | None = None) -> M:
        """One request, one reply, within the usual time."""
        limit = _CALL_TIMEOUT_S if self.timeout_s is None else self.timeout_s
        return await self._ask(socket, build, expected, limit, after_loss)

    async def wait(self, socket: str, build: Build, expected: type[M], timeout_s: float | None) -> M:
        """One request whose reply may take for ever; the gateway hears of it when nobody waits any more."""
        return await self._ask(socket, build, expected, timeout_s, None, cancels=True)

    async def connection(self, socket: str) -> Connection:
        """The open connection to a socket, made now if there is none."""
        return await self._links[socket].connection()

    def run(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that ends with this client at the latest."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Fail all that is unfinished with `Unavailable`. Idempotent."""
        self.closed = True
        for link in self._links.values():
            link.close(Unavailable("the client was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # let the connections' own tasks end, too

    async def _ask(
        self,
        socket: str,
        build: Build,
        expected: type[M],
        limit: float | None,
        after_loss: AfterLoss[M] | None,
        *,
        cancels: bool = False,
    ) -> M:
        question, began, patience = build, time.monotonic(), Patience(self.reconnect_s)
        try:
            async with asyncio.timeout(limit):
                while True:
                    connection = await self.connection(socket)
                    patience.asked(time.monotonic())
                    try:
                        return await self._once(connection, question, expected, cancels)
                    except ConnectionLost as lost:
                        # What may take for ever (`cancels`) may be interrupted for ever, too, if there is quiet in between.
                        pause = patience.interrupted(time.monotonic(), progressed=False, accepted=cancels)
                        if pause is None:
                            raise Unavailable(lost.message) from None
                    await asyncio.sleep(pause)
                    if after_loss is not None and (reply := await after_loss()) is not None:
                        return reply
                    question = aged(build, lambda: time.monotonic() - began)
        except TimeoutError:
            raise RequestTimeout(f"no answer from the gateway within {limit:g} s") from None

    async def _once(self, connection: Connection, build: Build, expected: type[M], cancels: bool) -> M:
        try:
            return await connection.call(build, expected, cancels=cancels)
        except Unavailable as error:
            if error.retry_after_s is None or self.reconnect_s <= 0 or self.closed:
                raise
            raise ConnectionLost(error.message) from None  # llmosd is stopping: the next one is asked


def late(timeout_s: float | None) -> RequestTimeout:
    return RequestTimeout(f"the answer did not end within {timeout_s:g} s", field="timeout_s")
