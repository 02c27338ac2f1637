"""A `GatewayWorld` whose gateway dies in the middle of things, and is started again.

`crash_after(7, 3)`: the gateway that runs dies of its 7th message from now on, the one after it of its 3rd, the next one lives. A
message is one that it takes from or gives to anybody, clients, tokenizer and microkernel; the one that it dies of is lost. From then
on nothing of it reaches anybody, and its sockets close as those of a killed process do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from unittest import mock

from gateway_world import DEADLINE_S, GatewayWorld, LoopThread
from loop_thread import wait_until

from llmos.ports.aio import AsyncDialer, AsyncListener
from llmos.protocol.messages import Hello
from llmos.services.gateway.service import Gateway

LISTENS, DIALS = {"client", "client-control"}, {"text", "kernel", "kernel-control"}


class Life:
    """One gateway, on an event loop of its own. `left`: how many messages it lives; None = any number."""

    def __init__(self, world: CrashWorld) -> None:
        self.left: int | None = None
        self.dead = False
        self.messages = 0
        self.thread = LoopThread()
        self._world = world
        self.gateway: Gateway = self.thread.do(lambda: Gateway(world.run_dir, "gateway", **world.limits))

    def outlives(self) -> bool:
        """One more message; False if it gets no further."""
        if self.dead:
            return False
        self.messages += 1
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                self.dead = True
                self._end = self.thread.loop.create_task(self._die())
        return not self.dead

    async def _die(self) -> None:
        await self.gateway.close()
        self._world.died(self)


class CrashWorld(GatewayWorld):
    """`with CrashWorld() as world: world.crash_after(3)`. `start_after_s`: how long a new gateway lets wait for itself."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.deaths = 0
        self.start_after_s = 0.0
        self._plan: list[int] = []
        self._lives: dict[asyncio.AbstractEventLoop, Life] = {}
        self._ended: list[Life] = []
        self._patches = [
            mock.patch.object(AsyncListener, "receive", self._receives(AsyncListener.receive)),
            mock.patch.object(AsyncDialer, "receive", self._receives(AsyncDialer.receive)),
            mock.patch.object(AsyncListener, "send", self._sends(AsyncListener.send)),
            mock.patch.object(AsyncDialer, "send", self._sends(AsyncDialer.send)),
        ]

    def __enter__(self) -> CrashWorld:
        for patch in self._patches:
            patch.start()
        self.run_dir.create()
        self.run_dir.lock.write_text("1\n")  # a daemon runs: one that starts gateways again
        self.start_tokenizer()
        self.start_kernel()
        self.life = self._new_life()
        self.thread.call(self._start(self.life))
        return self

    def __exit__(self, *details: object) -> None:
        self.wait_for_life()
        self.gateway = Gateway(self.run_dir, "nobody", **self.limits)  # that the world has one to close
        self.life.thread.call(self.life.gateway.close())
        for life in (self.life, *self._ended):
            life.thread.stop()
        super().__exit__(*details)
        for patch in self._patches:
            patch.stop()

    def crash_after(self, *messages: int) -> None:
        """Of each life, from the one that runs on."""
        self.wait_for_life()
        self._plan = list(messages[1:])
        self.life.left = messages[0] if messages else None

    def messages(self) -> int:
        """How many messages the gateway had that runs now."""
        self.wait_for_life()
        return self.life.messages

    def wait_for_life(self) -> None:
        wait_until(lambda: not self.life.dead, "the gateway is there again")

    def died(self, life: Life) -> None:
        """On the life's own loop, which it ends with."""
        self.deaths += 1
        self._ended.append(life)
        going_on = asyncio.run_coroutine_threadsafe(self._go_on(), self.thread.loop)
        going_on.add_done_callback(lambda done: done.result())

    async def _go_on(self) -> None:
        for listener in (self.tokenizer.listener, self.kernel.listener, self.kernel.control):
            listener.core.peers.clear()  # as if its death had been reported
        await asyncio.sleep(self.start_after_s)
        life = await asyncio.to_thread(self._new_life)
        await self._start(life)
        life.left = self._plan.pop(0) if self._plan else None
        self.life = life

    def _new_life(self) -> Life:
        life = Life(self)
        self._lives[life.thread.loop] = life
        return life

    async def _start(self, life: Life) -> None:
        started = asyncio.run_coroutine_threadsafe(life.gateway.start(), life.thread.loop)
        await asyncio.wait_for(asyncio.wrap_future(started), DEADLINE_S)

    def _life_of(self, port: AsyncListener[Any] | AsyncDialer[Any]) -> Life | None:
        """Whose port it is, once it serves; None: not a gateway's."""
        if isinstance(port, AsyncListener):
            is_gateway = port.core.name in LISTENS
        else:
            is_gateway = port.name in DIALS
        return self._lives.get(asyncio.get_running_loop()) if is_gateway else None

    def _receives(self, receive: Callable[..., Any]) -> Callable[..., Any]:
        async def wrapped(port: Any) -> Any:
            got = await receive(port)
            life = self._life_of(port)
            if life is not None and not life.outlives():
                await asyncio.Event().wait()
            return got

        return wrapped

    def _sends(self, send: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(port: Any, *message: Any) -> bool:
            life = self._life_of(port)
            if life is not None and not isinstance(message[-1], Hello) and not life.outlives():
                return True
            return bool(send(port, *message))

        return wrapped
