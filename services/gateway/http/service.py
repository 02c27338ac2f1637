"""An HTTP worker: the inside of a gateway, and uvicorn on a socket that llmosd opened. Stateless; several may share the socket.

States: connecting (to the services) -> serving (`ready`) -> stopping. When it stops it lets go of no sequence: clients find theirs again at
the next process, by `Last-Event-ID` or `idempotency-key`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator

import uvicorn

from llmos.config import HttpConfig, state_dir
from llmos.errors import ConfigError
from llmos.keys.ring import KeyRing
from llmos.ports.async_lifeline import AsyncLifeline
from llmos.services.base import ServiceContext
from llmos.services.gateway.audit import AuditLog
from llmos.services.gateway.http.access import Access
from llmos.services.gateway.http.app import App
from llmos.services.gateway.http.context import Site
from llmos.services.gateway.http.protocol import LimitedProtocol
from llmos.services.gateway.http.sessions import HttpCore
from llmos.services.gateway.sockets import check_listening
from llmos.tcp_address import TcpAddress

_KEEP_ALIVE_S = 75
_STOP_S = 1


class Server(uvicorn.Server):
    """Signals are the lifeline's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_server(app: App, config: HttpConfig) -> Server:
    options = uvicorn.Config(
        app,
        http=LimitedProtocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_STOP_S,
        limit_concurrency=config.max_connections,
        ssl_certfile=config.tls_cert or None,
        ssl_keyfile=config.tls_key or None,
    )
    return Server(options)


async def run(context: ServiceContext, lifeline: AsyncLifeline) -> None:
    """Serve until llmosd says stop."""
    if context.listen_fd is None:
        raise ConfigError("an HTTP worker needs --listen-fd")
    config = context.config.http
    folder = state_dir(context.config.storage)
    listener = socket.socket(fileno=context.listen_fd)
    audit = AuditLog(folder) if context.config.gateway.audit_log else None
    keys = KeyRing(folder)
    keys.refresh(time.monotonic(), at_once=True)
    core = HttpCore(
        context.run_dir,
        context.name,
        max_in_flight=context.config.gateway.max_in_flight_per_client,
        keys=keys,
        audit=audit,
    )
    access = Access(core, context.run_dir.path, folder)
    site = Site(core, access, int(config.max_body_mib * 2**20), int(time.time()), is_tls=bool(config.tls_cert))
    server = make_server(App(site), config)
    serving = None
    try:
        await core.start()
        host, port = listener.getsockname()[:2]
        check_listening([TcpAddress(host, port).url])
        serving = asyncio.create_task(server.serve([listener]))
        lifeline.ready(f"serves {', '.join(core.router.models)} on {host} port {port}")
        await _until_first(core.serve(lifeline.stop), serving)
    finally:
        core.stop()
        server.should_exit = True
        if serving is not None:
            await asyncio.gather(serving, return_exceptions=True)
        await core.close()
        if audit is not None:
            audit.close()


async def _until_first(working: object, serving: asyncio.Task[None]) -> None:
    """Raises what broke either."""
    task = asyncio.ensure_future(working)  # type: ignore[call-overload]
    try:
        await asyncio.wait({task, serving}, return_when=asyncio.FIRST_COMPLETED)
        for each in (task, serving):
            if each.done():
                each.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
