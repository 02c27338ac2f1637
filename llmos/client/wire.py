"""What `AsyncClient` and its sequences have in common: the two connections to the gateway, and how an output is asked for.

`DATA` carries prompts and tokens, `CONTROL` everything else (ps, kill, fork, suspend, ...), which therefore never queues behind
tokens. Each is opened when it is first used, and again after the gateway was restarted.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from llmos.client._core import AckCounter, Generation, Sink
from llmos.client.checked import checked_timeout
from llmos.client.connection import Connection, Submission
from llmos.client.types import Chunk, Completion
from llmos.errors import LlmosError, RequestTimeout, Unavailable
from llmos.ports.endpoint import RunDir, default_run_dir
from llmos.protocol.messages import Message

DATA, CONTROL = "client", "client-control"
_CALL_TIMEOUT_S = 30.0  # everything but outputs and waiting; the gateway itself gives up on its services earlier
Build = Callable[[int], Message]
M = TypeVar("M", bound=Message)


class Wire:
    """The way to one llmosd. `timeout_s`: the client's default for its calls; None = outputs may take for ever."""

    def __init__(self, run_dir: str | Path | None, timeout_s: float | None) -> None:
        self.run_dir = RunDir(run_dir if run_dir is not None else default_run_dir())
        self.timeout_s = checked_timeout(timeout_s)
        self._connections: dict[str, Connection] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._closed = False

    def limit(self, timeout_s: Any) -> float | None:
        """A call's own time limit, or the client's."""
        return self.timeout_s if timeout_s is None else checked_timeout(timeout_s)

    async def call(self, socket: str, build: Build, expected: type[M]) -> M:
        """One request, one reply, within the usual time."""
        limit = _CALL_TIMEOUT_S if self.timeout_s is None else self.timeout_s
        return await (await self.connection(socket)).call(build, expected, limit)

    async def wait(self, socket: str, build: Build, expected: type[M], timeout_s: float | None) -> M:
        """One request whose reply may take for ever; the gateway hears of it when nobody waits any more."""
        return await (await self.connection(socket)).call(build, expected, timeout_s, cancels=True)

    async def connection(self, socket: str) -> Connection:
        """The open connection to a socket, made now if there is none."""
        async with self._locks.setdefault(socket, asyncio.Lock()):
            if self._closed:
                raise Unavailable("the client is closed")
            found = self._connections.get(socket)
            if found is None or found.closed:
                found = Connection(self.run_dir, socket)
                await found.open(f"{os.path.basename(sys.argv[0] or 'python')[:64]}")
                self._connections[socket] = found
            return found

    async def close(self) -> None:
        """Fail all that is unfinished with `Unavailable`. Idempotent."""
        self._closed = True
        for connection in self._connections.values():
            connection.close(Unavailable("the client was closed"))
        self._connections.clear()
        await asyncio.sleep(0)  # let the connections' cancelled tasks end


class Output:
    """A checked request for the output of a sequence from token `start` on. Nothing is sent before `submit` or `collect`.

    `rid`: the sequence, if there is one already. `prepare` makes the message (it may have to ask for something first). `detaches`:
    leaving early lets the sequence go on; else it ends the output.
    """

    def __init__(
        self,
        wire: Wire,
        prepare: Callable[[], Awaitable[Build]],
        timeout_s: float | None,
        *,
        rid: int | None = None,
        start: int = 0,
        detaches: bool = False,
    ) -> None:
        self.rid = rid
        self.timeout_s = timeout_s
        self.start = start
        self._wire = wire
        self._prepare = prepare
        self._detaches = detaches

    async def submit(self, sink: Sink) -> Submission:
        """Send it, on the loop that is running; the sink gets what comes."""
        build = await self._prepare()
        connection = await self._wire.connection(DATA)
        return Submission(connection, build, lambda req: Generation(req, sink, self.start, detaches=self._detaches))

    async def collect(self) -> Completion:
        """Send it and read to the end."""
        items: asyncio.Queue[Any] = asyncio.Queue()
        acks = AckCounter(self.start)
        submission: Submission | None = None
        try:
            async with asyncio.timeout(self.timeout_s):
                submission = await self.submit(items.put_nowait)
                while isinstance(item := await items.get(), Chunk):
                    if (upto := acks.read(len(item.token_ids))) is not None:
                        submission.acknowledge(upto)
        except TimeoutError:
            raise late(self.timeout_s) from None
        finally:
            if submission is not None:
                submission.leave()
        if isinstance(item, LlmosError):
            raise item
        assert isinstance(item, Completion), item
        return item


def late(timeout_s: float | None) -> RequestTimeout:
    return RequestTimeout(f"the answer did not end within {timeout_s:g} s", field="timeout_s")
