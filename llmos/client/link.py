"""One socket of the gateway, over as many connections as it takes.

States: new -> open -> lost -> open ... -> closed. Who needs the connection makes it; all others wait for that one attempt.

Nobody listens: then either no daemon runs, which is an error at once, or its gateway is being restarted, which is worth waiting for.
After a loss even a daemon that is gone is: it may be restarted itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable

from llmos.client.connection import Connection
from llmos.client.patience import Pauses
from llmos.client.place import Place
from llmos.errors import DaemonNotRunning, LlmosError, Overloaded, Unavailable

OnOutage = Callable[[str | None], None]


class Outages:
    """What the links of one client know together: when a connection was lost last, and whether somebody waits for a new one.

    `listener` is told why, when the waiting begins, and None when it is over.
    """

    def __init__(self, reconnect_s: float, listener: OnOutage | None) -> None:
        self.reconnect_s = reconnect_s
        self._listener = listener
        self._lost_at = -math.inf
        self._waiting = 0

    def lost(self) -> None:
        self._lost_at = time.monotonic()

    def patience_ends(self, began: float, *, daemon: bool, busy: bool) -> float:
        """When an attempt that began then is hopeless. `daemon`: one runs. `busy`: it has no place for us."""
        since = max(self._lost_at, began) if daemon and not busy else self._lost_at
        return since + self.reconnect_s if self.reconnect_s > 0 else -math.inf

    def begin(self, reason: str) -> None:
        self._waiting += 1
        if self._waiting == 1 and self._listener is not None:
            self._listener(reason)

    def end(self) -> None:
        self._waiting -= 1
        if self._waiting == 0 and self._listener is not None:
            self._listener(None)


class Link:
    """`connection()` gives the open connection."""

    def __init__(self, place: Place, name: str, role_name: str, outages: Outages) -> None:
        self._place = place
        self._name = name
        self._role_name = role_name
        self._outages = outages
        self._lock = asyncio.Lock()
        self._pauses = Pauses()
        self._current: Connection | None = None
        self._closing = asyncio.Event()

    async def connection(self) -> Connection:
        """Made now if there is none. Raises `Unavailable` when there is no hope, `DaemonNotRunning` if no daemon runs."""
        async with self._lock:
            self._check_open()
            if self._current is None or self._current.closed:
                self._current = await self._connect()
            return self._current

    def close(self, error: LlmosError) -> None:
        """Idempotent."""
        self._closing.set()
        if self._current is not None:
            self._current.close(error)

    async def _connect(self) -> Connection:
        began = time.monotonic()
        waits = False
        try:
            while True:
                connection = Connection(self._place, self._name, self._outages.lost)
                try:
                    await connection.open(self._role_name)
                except (Unavailable, Overloaded) as error:
                    left = self._time_left(error, began)
                else:
                    self._pauses.reset()
                    return connection
                if not waits:
                    waits = True
                    self._outages.begin(self._reason())
                await self._pause(min(left, self._pauses.next()))
        finally:
            if waits:
                self._outages.end()

    def _time_left(self, error: Unavailable | Overloaded, began: float) -> float:
        """For further attempts; raises what is to be said if there are none."""
        daemon = self._place.runs()
        ends = self._outages.patience_ends(began, daemon=daemon, busy=isinstance(error, Overloaded))
        left = ends - time.monotonic()
        if left > 0:
            return left
        if daemon and isinstance(error, DaemonNotRunning):
            text = f"llmosd runs on {self._place.shown}, but its gateway does not: it is being restarted, or could not start"
            raise Unavailable(text) from None
        raise error

    def _reason(self) -> str:
        if self._place.runs():
            return "the gateway is being restarted"
        return "the connection to llmosd was lost"

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        self._check_open()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise Unavailable("the client is closed")
