"""Connections that fail, come late or break while they are made: against a listener that does what the test says."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_world import until

from llmos.client.link import Link, Outages
from llmos.client.place import LocalPlace
from llmos.client.presence import daemon_runs
from llmos.errors import DaemonNotRunning, Overloaded, Unavailable, VersionMismatch
from llmos.ports.aio import AsyncListener
from llmos.ports.endpoint import RunDir
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema


class Place:
    """A run directory, and who listens there. `told`: what is said of outages."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="llmos-ln-")
        self.run_dir = RunDir(self._folder.name)
        self.told: list[str | None] = []
        self.listener: AsyncListener[Any] | None = None

    def link(self, reconnect_s: float = 10.0) -> Link:
        return Link(LocalPlace(self.run_dir), "client", "test", Outages(reconnect_s, self.told.append))

    def listen(self, max_peers: int = 8) -> None:
        schema: Schema[Any] = Schema(m.ClientToGateway)
        self.listener = AsyncListener(self.run_dir, "client", schema, frozenset({"client"}), max_peers=max_peers)
        self._serving = asyncio.create_task(self._serve(self.listener))

    def hold_lock(self) -> None:
        self.run_dir.lock.write_text(f"{os.getpid()}\n")

    async def _serve(self, listener: AsyncListener[Any]) -> None:
        while True:
            await listener.receive()

    async def fall_silent(self) -> None:
        assert self.listener is not None
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self.listener.close()

    def close(self) -> None:
        self._folder.cleanup()


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    made.close()


def go(script: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await script

    asyncio.run(limited())


def test_without_a_daemon_it_fails_at_once(place: Place) -> None:
    async def script() -> None:
        with pytest.raises(DaemonNotRunning, match="llmosd is not running"):
            await place.link().connection()

    go(script())
    assert place.told == []


def test_a_gateway_that_is_started_is_waited_for(place: Place) -> None:
    place.hold_lock()

    async def script() -> None:
        link = place.link()
        waiting = asyncio.gather(*(link.connection() for _ in range(5)))
        await until(lambda: place.told)
        place.listen()
        connections = await waiting
        assert len(set(map(id, connections))) == 1
        assert len(place.listener.core.peers) == 1  # type: ignore[union-attr]
        link.close(Unavailable("over"))
        await place.fall_silent()

    go(script())
    assert place.told == ["the gateway is being restarted", None]


def test_the_waiting_has_an_end(place: Place) -> None:
    place.hold_lock()

    async def script() -> None:
        with pytest.raises(Unavailable, match="but its gateway does not") as caught:
            await place.link(0.2).connection()
        assert not isinstance(caught.value, DaemonNotRunning)
        with pytest.raises(Unavailable, match="but its gateway does not"):
            await place.link(0).connection()

    go(script())
    assert place.told == ["the gateway is being restarted", None]


def test_after_a_loss_even_a_daemon_that_is_gone_is_waited_for(place: Place) -> None:
    async def script() -> None:
        place.listen()
        link = place.link()
        first = await link.connection()
        assert await link.connection() is first
        await place.fall_silent()
        await until(lambda: first.closed)
        waiting = asyncio.create_task(link.connection())
        await until(lambda: place.told)
        place.listen()
        assert await waiting is not first
        link.close(Unavailable("over"))
        await place.fall_silent()

    go(script())
    assert place.told == ["the connection to llmosd was lost", None]


def test_long_after_a_loss_nobody_is_waited_for(place: Place) -> None:
    async def script() -> None:
        place.listen()
        link = place.link(0.05)
        first = await link.connection()
        await place.fall_silent()
        await until(lambda: first.closed)
        await asyncio.sleep(0.1)
        with pytest.raises(DaemonNotRunning):
            await link.connection()

    go(script())
    assert place.told == []


def test_a_gateway_that_leaves_while_it_is_greeted(place: Place) -> None:
    """One that takes the connection and dies: its successor gets a hello of its own."""
    place.hold_lock()

    async def script() -> None:
        path = place.run_dir.socket("client")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as deaf:
            deaf.bind(str(path))
            deaf.listen(8)
            deaf.setblocking(False)
            waiting = asyncio.create_task(place.link().connection())
            loop = asyncio.get_running_loop()
            probe, _ = await loop.sock_accept(deaf)
            taken, _ = await loop.sock_accept(deaf)
            await loop.sock_recv(taken, 10)
        path.unlink()
        place.listen()
        taken.close()
        probe.close()
        connection = await waiting
        connection.close(Unavailable("over"))
        await place.fall_silent()

    go(script())


@pytest.mark.parametrize("lost", [False, True])
def test_a_full_gateway_is_waited_for_only_after_a_loss(place: Place, lost: bool) -> None:
    place.hold_lock()

    async def script() -> None:
        link = place.link(0.3)
        if lost:
            place.listen()
            first = await link.connection()
            await place.fall_silent()
            await until(lambda: first.closed)
        place.listen(max_peers=0)
        with pytest.raises(Overloaded):
            await link.connection()
        await place.fall_silent()

    go(script())
    assert place.told == (["the gateway is being restarted", None] if lost else [])


def test_another_version_is_not_waited_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.hold_lock()
    monkeypatch.setattr("llmos.protocol.handshake.hello", lambda role, name: m.Hello(1, "0" * 16, role, name, 1))

    async def script() -> None:
        place.listen()
        with pytest.raises(VersionMismatch):
            await place.link().connection()
        await place.fall_silent()

    go(script())


def test_closing_ends_the_waiting(place: Place) -> None:
    place.hold_lock()

    async def script() -> None:
        link = place.link(60)
        waiting = [asyncio.create_task(link.connection()) for _ in range(2)]
        await until(lambda: place.told)
        link.close(Unavailable("over"))
        for task in waiting:
            with pytest.raises(Unavailable, match="client is closed"):
                await task

    go(script())


def test_who_does_not_wait_any_more_leaves_the_waiting_to_others(place: Place) -> None:
    place.hold_lock()

    async def script() -> None:
        link = place.link(60)
        first = asyncio.create_task(link.connection())
        await until(lambda: place.told)
        second = asyncio.create_task(link.connection())
        first.cancel()
        await until(lambda: len(place.told) == 3)
        place.listen()
        assert (await second).closed is False
        link.close(Unavailable("over"))
        await place.fall_silent()

    go(script())
    assert place.told == ["the gateway is being restarted", None] * 2


LOCKS: list[tuple[str, Callable[[], str], bool]] = [
    ("no file", lambda: "", False),
    ("nonsense", lambda: "x\n", False),
    ("not a pid", lambda: "-1\n", False),
    ("0", lambda: "0\n", False),
    ("too large", lambda: f"{2**70}\n", False),
    ("dead", lambda: f"{dead_pid()}\n", False),
    ("alive", lambda: f"{os.getpid()}\n", True),
    ("another user's", lambda: "1\n", True),
]


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return process.pid


@pytest.mark.parametrize(("name", "text", "runs"), LOCKS, ids=[row[0] for row in LOCKS])
def test_a_daemon_runs_if_the_process_of_its_lock_does(
    name: str, text: Callable[[], str], runs: bool, tmp_path: Path
) -> None:
    if name != "no file":
        (tmp_path / "llmosd.lock").write_text(text())
    assert daemon_runs(RunDir(tmp_path)) is runs
