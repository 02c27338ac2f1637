"""Tells when a ZeroMQ connection drops. ZeroMQ itself reconnects in silence, so whoever waits for an answer would
wait for ever.

Invariant: the monitor must be read for as long as it is open (libzmq's I/O thread blocks on a full monitor); `lost`
is that read.
"""

from __future__ import annotations

import zmq
import zmq.asyncio


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
