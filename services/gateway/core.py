"""What every gateway process has inside, whatever door its clients come through: the links to tokenizer and microkernel, the router of
requests, the relay of control verbs, the live keys.

The doors are `service.py` (ZeroMQ) and `http/` (HTTP); both are clients' doors only and hold no state that the microkernel does not have.
States: connecting -> connected (`connect`) -> closed. A service that goes away meanwhile is a pause for the clients. Nothing here waits
for a peer: one task per link, sends never block.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterable
from typing import Any

from llmos.errors import LlmosError, Unauthorized, Unavailable
from llmos.keys.ring import KeyRing
from llmos.killpoints import ARMED, reach
from llmos.ports.endpoint import RunDir
from llmos.protocol import limits
from llmos.protocol.codec import Schema
from llmos.protocol.messages import FromKernel, Message, ModelInfoGet, TokenizerToGateway
from llmos.services.gateway.audit import AuditLog
from llmos.services.gateway.clients import Client
from llmos.services.gateway.control import ControlRelay
from llmos.services.gateway.links import Link
from llmos.services.gateway.owners import Asker, identify
from llmos.services.gateway.router import Router

log = logging.getLogger(__name__)
_START_TIMEOUT_S = 60.0
TICK_S = 0.1

_from_kernel: Schema[Any] = Schema(FromKernel)
_from_tokenizer: Schema[Any] = Schema(TokenizerToGateway)


class GatewayCore(ABC):
    """`name`: unique among gateways. `keys`: of clients that are not local; None = there are none."""

    def __init__(
        self, run_dir: RunDir, name: str, *, max_in_flight: int, keys: KeyRing | None, audit: AuditLog | None
    ) -> None:
        self._keys = keys
        self._keys_version = keys.version if keys is not None else 0
        self._tasks: list[asyncio.Task[None]] = []
        self._text = Link(
            run_dir,
            "text",
            _from_tokenizer,
            name=name,
            on_message=self._on_text,
            on_up=self._on_text_up,
            on_down=lambda: self.router.on_text_down(time.monotonic()),
        )
        self._kernel = Link(
            run_dir,
            "kernel",
            _from_kernel,
            name=name,
            on_message=self._on_kernel,
            on_up=lambda: self.router.on_kernel_up(time.monotonic()),
            on_down=lambda: self.router.on_kernel_down(time.monotonic()),
        )
        self._control = Link(
            run_dir,
            "kernel-control",
            _from_kernel,
            name=name,
            on_message=lambda message: self.relay.answer(message),
            on_up=lambda: self.relay.on_kernel_up(time.monotonic()),
            on_down=lambda: self.relay.on_kernel_down(time.monotonic()),
        )
        key_prefix = f"{limits.MADE_UP_REQUEST_ID}gw-{secrets.token_hex(8)}-"
        self.router = Router(self._text.send, self._kernel.send, max_in_flight, key_prefix, self.identify)
        self._note = audit.note if audit is not None else lambda asker, verb, answer: None
        self.relay = ControlRelay(self._control.send, self._reply_control, max_in_flight, self._note)
        self._has_models = asyncio.Event()

    @property
    def is_connected(self) -> bool:
        """Are tokenizer and microkernel there?"""
        return all(link.is_up for link in (self._text, self._kernel, self._control)) and bool(self.router.models)

    async def connect(self) -> None:
        """Reach the services; raises `Unavailable` if they do not answer in time."""
        self._run(*(link.run() for link in (self._text, self._kernel, self._control)))
        waits = (self._has_models.wait(), self._kernel.wait_up(), self._control.wait_up())
        await self._unless_broken(asyncio.gather(*waits))
        if ARMED:
            reach("gateway.start.connected")

    async def serve(self, stop: asyncio.Event) -> None:
        """Return when `stop` is set; raises what broke a task."""
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({stopping, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        self._raise_broken()

    async def close(self) -> None:
        """Leave without a word, as if it had died: clients ask the next gateway what they were not answered, and the microkernel keeps
        their streams until then. Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def identify(self, client: Client) -> Asker:
        """Raises `Unauthorized` if its key is not live any more."""
        return identify(client.id, client.peer, self._keys)

    # ------------------------------------------------------------ what a door adds

    @abstractmethod
    def _reply_control(self, client_id: bytes, message: Message) -> None:
        """The answer to a control verb."""

    @abstractmethod
    def _everybody(self) -> Iterable[Client]:
        """All clients that are there."""

    @abstractmethod
    def _show_out(self, client: Client, error: LlmosError) -> None:
        """What it waited for has been answered; it is not to be here any more."""

    # ------------------------------------------------------------ tasks and time

    def _run(self, *coroutines: Coroutine[Any, Any, None]) -> None:
        self._tasks.extend(asyncio.create_task(coroutine) for coroutine in coroutines)

    def _raise_broken(self) -> None:
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    async def _unless_broken(self, waits: asyncio.Future[Any]) -> None:
        try:
            done, _ = await asyncio.wait(
                {waits, *self._tasks}, timeout=_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            self._raise_broken()
            if not done:
                down = [link.socket for link in (self._text, self._kernel, self._control) if not link.is_up]
                raise Unavailable(f"no answer within {_START_TIMEOUT_S:g} s from: {', '.join(down) or 'text'}")
        finally:
            waits.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waits

    def _look(self, now: float) -> None:
        """To be called every `TICK_S`."""
        self.router.tick(now)
        self.relay.expire(now)
        for link in (self._text, self._kernel, self._control):
            link.flush()
        self._look_at_keys(now)

    def _look_at_keys(self, now: float) -> None:
        """Show those out whose key was revoked."""
        if self._keys is None:
            return
        self._keys.refresh(now)
        if self._keys.version == self._keys_version:
            return
        self._keys_version = self._keys.version
        for client in list(self._everybody()):
            try:
                self.identify(client)
            except Unauthorized as error:
                log.warning("client %r: %s", client.peer.name, error.message)
                self.router.dismiss(client, error, now)
                self.relay.dismiss(client.id, error)
                self._show_out(client, error)

    # ------------------------------------------------------------ services

    def _on_text_up(self) -> None:
        self._text.send(ModelInfoGet(self.router.next_number()))
        self.router.on_text_up(time.monotonic())

    def _on_kernel(self, message: Any) -> None:
        if ARMED:
            reach("gateway.kernel.received")
        self.router.on_kernel(message, time.monotonic())
        if ARMED:
            reach("gateway.kernel.handled")

    def _on_text(self, message: Any) -> None:
        if ARMED:
            reach("gateway.text.received")
        self.router.on_text(message, time.monotonic())
        if ARMED:
            reach("gateway.text.handled")
        if self.router.models:
            self._has_models.set()
