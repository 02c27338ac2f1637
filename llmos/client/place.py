"""Where a daemon is: a run directory of this machine, or an address of the network with the keys to it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import zmq.asyncio

from llmos.client.presence import check_listening, daemon_runs
from llmos.errors import InvalidRequest, Unauthorized
from llmos.keys.secret import Secret, is_public_key
from llmos.ports.aio import AsyncDialer
from llmos.ports.endpoint import RunDir, default_run_dir
from llmos.ports.monitor import LossMonitor
from llmos.ports.tcp import Credentials, HandshakeMonitor, TcpDialer
from llmos.protocol.codec import Schema
from llmos.tcp_address import TcpAddress

DATA, CONTROL = "client", "client-control"


class Place(Protocol):
    """What a connection needs to know of it. `name`: DATA or CONTROL."""

    @property
    def shown(self) -> str: ...

    def check_listening(self, name: str) -> None:
        """Raise `DaemonNotRunning` if that can be said without trying."""

    def runs(self) -> bool:
        """Is a daemon known to be alive there?"""

    def dial(self, name: str, schema: Schema[Any]) -> AsyncDialer[Any]: ...

    def monitor(self, socket: zmq.asyncio.Socket) -> LossMonitor: ...


class LocalPlace:
    """A run directory."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir

    @property
    def shown(self) -> str:
        return str(self._run_dir.path)

    def check_listening(self, name: str) -> None:
        check_listening(self._run_dir, name)

    def runs(self) -> bool:
        return daemon_runs(self._run_dir)

    def dial(self, name: str, schema: Schema[Any]) -> AsyncDialer[Any]:
        return AsyncDialer(self._run_dir, name, schema)

    def monitor(self, socket: zmq.asyncio.Socket) -> LossMonitor:
        return LossMonitor(socket)


class RemotePlace:
    """A network address: data on `port`, control on the next one."""

    def __init__(self, address: TcpAddress, secret: Secret, server_key: str) -> None:
        self._urls = {DATA: address.url, CONTROL: address.control.url}
        self._credentials = Credentials(server_key.encode(), secret.public_key.encode(), secret.curve_secret)

    @property
    def shown(self) -> str:
        return self._urls[DATA]

    def check_listening(self, name: str) -> None:
        """The network says so itself."""

    def runs(self) -> bool:
        return False

    def dial(self, name: str, schema: Schema[Any]) -> AsyncDialer[Any]:
        return TcpDialer(self._urls[name], self._credentials, name, schema)

    def monitor(self, socket: zmq.asyncio.Socket) -> LossMonitor:
        return HandshakeMonitor(socket, self.shown)


def find_place(url: str | Path | None, key: str | None, server_key: str | None) -> Place:
    """`url`: tcp://HOST:PORT, or a run directory. What is None comes from LLMOS_URL, LLMOS_KEY and LLMOS_SERVER_KEY; without LLMOS_URL
    it is the usual run directory. Raises `InvalidRequest`, and `Unauthorized` if there is no key.
    """
    where = url if url is not None else os.environ.get("LLMOS_URL") or default_run_dir()
    if isinstance(where, Path) or "://" not in where:
        return LocalPlace(RunDir(where))
    address = _parse(where)
    if not (text := key if key is not None else os.environ.get("LLMOS_KEY", "")):
        raise Unauthorized(f"{where}: a key is needed: key=..., or LLMOS_KEY in the environment", field="key")
    server = server_key if server_key is not None else os.environ.get("LLMOS_SERVER_KEY", "")
    if not is_public_key(server):
        what = "is not 40 characters of Z85" if server else "is needed: server_key=..., or LLMOS_SERVER_KEY"
        raise InvalidRequest(f"server_key: {what} (`llmosctl keys server` shows it)", field="server_key")
    return RemotePlace(address, Secret.parse(text), server)


def _parse(url: str) -> TcpAddress:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme != "tcp" or parts.path or parts.query or parts.username or port > 65_534:
        raise InvalidRequest(f"url: {url!r} is not of the form tcp://HOST:PORT", field="url")
    return TcpAddress(host, port)
