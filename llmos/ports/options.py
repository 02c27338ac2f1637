"""Every ZeroMQ socket option llmos sets, in this one place (facts: docs/decisions.md, "Sockets").

- ROUTER_MANDATORY: a send to a gone or full peer is an error we count, not a silent drop.
- LINGER 0: our acknowledgements are by offset, so closing never waits. IMMEDIATE on dialers: nothing queues for a peer that is not there.
- HANDSHAKE_IVL on listeners: who connects and does not finish ZeroMQ's own handshake is dropped.
- Explicit high-water marks: 0 would be unlimited. MAXMSGSIZE is per frame; messages are one frame, more parts are refused.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import zmq

from llmos.ports.endpoint import RunDir

_HIGH_WATER_MARK = 10_000  # messages per peer; about 40 s of steps at 256 rows
_HANDSHAKE_MS = 5000
_BACKLOG = 1024  # connections that wait to be accepted; beyond that connect() has to be repeated
_umask_lock = threading.Lock()


def configure(socket: zmq.Socket[Any], *, max_bytes: int) -> None:
    """Options common to both ends. Must run before bind or connect."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, _HIGH_WATER_MARK)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    if socket.type == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        socket.setsockopt(zmq.BACKLOG, _BACKLOG)
    else:
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 100)  # who dies is back within a second


def bind(socket: zmq.Socket[Any], run_dir: RunDir, name: str) -> None:
    """Bind a unix socket that only this user can reach, and check that this is so."""
    with _umask_lock:
        previous = os.umask(0o177)
        try:
            socket.bind(run_dir.address(name))
        finally:
            os.umask(previous)
    mode = run_dir.socket(name).stat().st_mode & 0o777
    assert mode == 0o600, f"socket {name} has mode {mode:o}"
