"""The network's way in: TCP listeners behind one authenticator, in a ZeroMQ context of their own.

States: made (keys read) -> listening (bound, nothing is read yet) -> checked (`check`: strangers are refused) -> closed.
Whatever is wrong on the way is a `ConfigError` or `Unavailable`, and the gateway does not serve. That there is no key is llmosd's to
refuse, at its start (supervisor/check.py): a gateway that is started again after the last key was revoked has local clients, too.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import zmq.asyncio

from llmos.errors import ConfigError
from llmos.keys.ring import KeyRing
from llmos.keys.server_key import ServerKey, read_server_key
from llmos.ports.tcp import Authenticator, TcpListener
from llmos.ports.tcp_check import check_refuses
from llmos.protocol.codec import Schema
from llmos.tcp_address import TcpAddress

_ROLES = frozenset({"client"})
log = logging.getLogger(__name__)
M = TypeVar("M")


class TcpDoor:
    """`keys`: the live ones. The first port is for data, the second for control."""

    def __init__(self, address: TcpAddress, state_dir: Path, keys: KeyRing) -> None:
        self.urls = (address.url, address.control.url)
        self._address = address
        self.keys = keys
        self._server = _server_key(state_dir)
        keys.refresh(time.monotonic(), at_once=True)
        if not len(keys):
            log.warning("there is no live key: nobody can come in over the network")
        self._context = zmq.asyncio.Context()
        self.authenticator = Authenticator(self._context, self._judge)

    def listen(self, url: str, name: str, schema: Schema[M], incarnation: int, max_peers: int) -> TcpListener[M]:
        secret = self._server.secret
        return TcpListener(
            self._context, url, secret, name, schema, _ROLES, incarnation=incarnation, max_peers=max_peers
        )

    async def check(self) -> None:
        """Knock as a stranger. `authenticator.run()` must be running."""
        address = self._address
        if address.is_any:
            address = replace(address, host="::1" if ":" in address.host else "127.0.0.1")
        self.authenticator.quiet = True
        for each in (address, address.control):
            await check_refuses(each.url, self._server.public)
        self.authenticator.quiet = False
        self.authenticator.refused = 0

    def close(self) -> None:
        """The listeners must be closed."""
        self.authenticator.close()
        self._context.destroy(linger=0)

    def _judge(self, public_key: str) -> str | None:
        self.keys.refresh(time.monotonic(), at_once=True)
        key = self.keys.by_public_key(public_key)
        return None if key is None else key.id


def _server_key(state_dir: Path) -> ServerKey:
    server = read_server_key(state_dir)
    if server is None:
        text = f"gateway.tcp is set, but {state_dir} has no server.key; make it: llmosctl keys server"
        raise ConfigError(text, field="gateway.tcp")
    return server
