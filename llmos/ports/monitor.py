"""Tells when a ZeroMQ connection drops, and bounds how many a listener has. ZeroMQ itself reconnects in silence, so whoever waits for an
answer would wait for ever; and it accepts whoever comes, until there are no descriptors left.

Invariant: a monitor must be read for as long as it is open (libzmq's I/O thread blocks on a full monitor); `lost` is that read.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

if TYPE_CHECKING:
    from llmos.ports.aio import AsyncListener


class LossMonitor:
    """Watches one socket. Open it before the handshake, so that no loss goes unseen."""

    _EVENTS = zmq.EVENT_DISCONNECTED

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._watched = socket
        self._events = socket.get_monitor_socket(self._EVENTS)

    async def lost(self) -> None:
        """Return at the next loss of a connection: the dialer's only one, or any one of a listener."""
        await self._events.recv_multipart()

    def close(self) -> None:
        """Stop watching; call it before the socket is closed."""
        self._watched.disable_monitor()
        self._events.close(linger=0)


class CrowdMonitor(LossMonitor):
    """As `LossMonitor`, for a listener that is to have `most` connections: beyond that the oldest of those that greeted nobody are shut
    down, which libzmq takes for their peer's leaving. (It has no such option, and a connection must not be closed behind its back.)
    """

    _EVENTS = zmq.EVENT_DISCONNECTED | zmq.EVENT_ACCEPTED

    def __init__(self, listener: AsyncListener[Any], most: int) -> None:
        super().__init__(listener.socket)
        self.shut = 0
        self._listener = listener
        self._most = most
        self._open: dict[int, None] = {}  # descriptors, oldest first

    async def lost(self) -> None:
        while True:
            event = parse_monitor_message(await self._events.recv_multipart())
            descriptor = event["value"]
            self._open.pop(descriptor, None)
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._listener.greeted.pop(descriptor, None)
                return
            self._open[descriptor] = None
            if len(self._open) > self._most:
                self._make_room()

    def _make_room(self) -> None:
        greeted, peers = self._listener.greeted, self._listener.core.peers
        victim = next((each for each in self._open if greeted.get(each) not in peers), None)
        if victim is not None:
            del self._open[victim]
            self.shut += self._shut(victim)

    def _shut(self, descriptor: int) -> bool:
        """False: it has been closed meanwhile, and may have become something else."""
        try:
            copy = os.dup(descriptor)
        except OSError:
            return False
        try:
            with socket.socket(fileno=copy) as connection:
                endpoint = self._watched.getsockopt_string(zmq.LAST_ENDPOINT)
                name = connection.getsockname()
                if endpoint != f"ipc://{name}" and not (isinstance(name, tuple) and endpoint.endswith(f":{name[1]}")):
                    return False
                connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # no socket, or no connection any more
            with contextlib.suppress(OSError):
                os.close(copy)
            return False
        return True
