"""A listener with more connections than it wants."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from typing import Any

import pytest
import zmq

from llmos.ports.aio import AsyncDialer, AsyncListener
from llmos.ports.endpoint import RunDir
from llmos.ports.monitor import CrowdMonitor
from llmos.protocol.codec import Schema
from llmos.protocol.messages import ClientToGateway, GatewayToClient

MOST, CROWD = 20, 60


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def crowd(run_dir: RunDir) -> None:
    schema: Schema[Any] = Schema(ClientToGateway)
    listener: AsyncListener[Any] = AsyncListener(run_dir, "client", schema, frozenset({"client"}), max_peers=4)
    monitor = CrowdMonitor(listener, MOST)
    first: AsyncDialer[Any] = AsyncDialer(run_dir, "client", Schema(GatewayToClient))

    async def watch() -> None:
        while True:
            await monitor.lost()

    tasks = [asyncio.create_task(watch()), asyncio.create_task(listener.receive())]
    context = zmq.Context()
    await first.greet("client", "first", 10)
    strangers = [context.socket(zmq.DEALER) for _ in range(CROWD)]
    for stranger in strangers:
        stranger.setsockopt(zmq.RECONNECT_IVL, -1)
        stranger.connect(f"ipc://{run_dir.socket('client')}")
    await until(lambda: monitor.shut == 1 + CROWD - MOST)
    assert len(monitor._open) == MOST
    second: AsyncDialer[Any] = AsyncDialer(run_dir, "client", Schema(GatewayToClient))
    await second.greet("client", "second", 10)
    assert {peer.name for peer in listener.core.peers.values()} == {"first", "second"}
    assert monitor.shut == 2 + CROWD - MOST
    await first.greet("client", "still there", 10)
    assert len(listener.core.peers) == 2
    for stranger in strangers:
        stranger.close(linger=0)
    context.term()
    await until(lambda: len(monitor._open) == 2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    monitor.close()
    for port in (listener, first, second):
        port.close()


def test_strangers_leave_first_and_clients_stay() -> None:
    with tempfile.TemporaryDirectory(prefix="llp-") as folder:
        run_dir = RunDir(folder)
        run_dir.create()
        asyncio.run(crowd(run_dir))


@pytest.mark.parametrize("what", ["closed", "a file", "another socket"])
def test_a_descriptor_that_is_something_else_by_now_is_let_be(what: str) -> None:
    async def shut(run_dir: RunDir) -> None:
        schema: Schema[Any] = Schema(ClientToGateway)
        listener: AsyncListener[Any] = AsyncListener(run_dir, "client", schema, frozenset({"client"}))
        monitor = CrowdMonitor(listener, MOST)
        ours, theirs = socket.socketpair()
        read, write = os.pipe()
        try:
            assert not monitor._shut({"closed": 10_000, "a file": read, "another socket": ours.fileno()}[what])
            os.write(write, b"x")
            assert os.read(read, 1) == b"x"
            theirs.send(b"x")
            assert ours.recv(1) == b"x"
        finally:
            os.close(read), os.close(write), ours.close(), theirs.close()
            monitor.close()
            listener.close()

    with tempfile.TemporaryDirectory(prefix="llp-") as folder:
        run_dir = RunDir(folder)
        run_dir.create()
        asyncio.run(shut(run_dir))
