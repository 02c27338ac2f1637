"""Ports over memory, blocking ZeroMQ and asyncio: the same messages, the same refusals."""

from __future__ import annotations

import asyncio
import itertools
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from msgspec.structs import replace

from llmos.codes import ErrorCode
from llmos.errors import ConfigError, DaemonNotRunning, Overloaded, ProtocolError, RequestTimeout, VersionMismatch
from llmos.ports import aio, sync
from llmos.ports.aio import AsyncDialer, AsyncListener
from llmos.ports.core import peer_uid
from llmos.ports.endpoint import RunDir
from llmos.ports.memory import MemoryListener
from llmos.ports.sync import Dialer, Listener, PortSet
from llmos.protocol import handshake
from llmos.protocol.codec import Schema, encode
from llmos.protocol.messages import Error, FromSupervisor, Heartbeat, ServiceReady, Stop, ToSupervisor, Welcome

ROLES = frozenset({"storage", "executor"})
TO: Schema[Any] = Schema(ToSupervisor)
FROM: Schema[Any] = Schema(FromSupervisor)
SMALL: Schema[Any] = Schema(ToSupervisor, max_bytes=1000)
DEADLINE_S = 10.0


@pytest.fixture
def run_dir() -> Iterator[RunDir]:
    with tempfile.TemporaryDirectory(prefix="llp-") as folder:
        yield RunDir(folder)


def until(condition: Callable[[], Any]) -> Any:
    """The first true value of a condition that sockets make true."""
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing came"
    return value


class SyncPair:
    """A listener and one dialer, blocking sockets, served in this thread."""

    def __init__(self, run_dir: RunDir, schema: Schema[Any] = TO, **options: Any) -> None:
        self.listener: Listener[Any] = Listener(run_dir, "supervisor", schema, ROLES, **options)
        self.dialer: Dialer[Any] = Dialer(run_dir, "supervisor", FROM)

    def __enter__(self) -> SyncPair:
        return self

    def __exit__(self, *_: object) -> None:
        self.dialer.close()
        self.listener.close()

    def ask(self, frame: bytes) -> Any:
        """What the listener's port answers by itself."""
        assert self.dialer.socket.poll(DEADLINE_S * 1000, zmq.POLLOUT)
        self.dialer.socket.send(frame)

        def answer() -> Any:
            assert self.listener.receive() is None
            return self.dialer.receive()

        return until(answer)

    def greet(self) -> Welcome:
        answer = self.ask(encode(handshake.hello("storage", "s1")))
        return handshake.check_answer(answer, "supervisor")


def test_sync_round_trip(run_dir: RunDir) -> None:
    with SyncPair(run_dir, incarnation=77) as pair:
        welcome = pair.greet()
        assert (welcome.name, welcome.incarnation) == ("supervisor", 77)
        for number in range(100):
            assert pair.dialer.send(Heartbeat("s1", number))
        for number in range(100):
            peer, message = until(pair.listener.receive)
            assert message == Heartbeat("s1", number)
        assert (peer.role, peer.name, peer.pid, peer.uid) == ("storage", "s1", os.getpid(), os.getuid())
        assert pair.listener.send(peer, Stop())
        assert pair.dialer.expect(DEADLINE_S) == Stop()
        assert pair.listener.core.counters == type(pair.listener.core.counters)()


def test_sockets_are_for_this_user_only_and_umask_is_restored(run_dir: RunDir) -> None:
    before = os.umask(0o022)
    try:
        with SyncPair(run_dir):
            assert stat.S_IMODE(run_dir.socket("supervisor").stat().st_mode) == 0o600
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"schema_hash": "0" * 16}, ErrorCode.VERSION_MISMATCH, "schema_hash"),
        ({"protocol": 99}, ErrorCode.VERSION_MISMATCH, "protocol"),
        ({"role": "client"}, ErrorCode.PROTOCOL, "role"),
    ],
)
def test_a_wrong_hello_is_refused_and_the_peer_stays_unknown(
    run_dir: RunDir, changes: Any, code: int, field: str
) -> None:
    with SyncPair(run_dir) as pair:
        answer = pair.ask(encode(replace(handshake.hello("storage", "s1"), **changes)))
        assert isinstance(answer, Error)
        assert (answer.req, answer.code, answer.field) == (0, code, field)
        assert pair.listener.core.counters.refused_hello == 1
        assert pair.ask(encode(Heartbeat("s1", 1))).field == "hello"
        assert isinstance(pair.greet(), Welcome)


def test_a_message_before_hello_is_refused(run_dir: RunDir) -> None:
    with SyncPair(run_dir) as pair:
        answer = pair.ask(encode(Heartbeat("s1", 1)))
        assert (answer.code, answer.field) == (ErrorCode.PROTOCOL, "hello")
        assert pair.listener.core.counters.before_hello == 1


def test_a_bad_frame_is_answered_and_the_next_one_served(run_dir: RunDir) -> None:
    with SyncPair(run_dir) as pair:
        pair.greet()
        answer = pair.ask(msgspec.msgpack.encode([121, "s1"]))
        assert (answer.code, answer.field) == (ErrorCode.PROTOCOL, "progress")
        assert pair.ask(b"\xc1").code == ErrorCode.PROTOCOL
        assert pair.listener.core.counters.undecodable == 2
        pair.dialer.send(Heartbeat("s1", 5))
        assert until(pair.listener.receive)[1] == Heartbeat("s1", 5)


def test_a_message_of_more_frames_is_dropped_and_counted(run_dir: RunDir) -> None:
    with SyncPair(run_dir) as pair:
        pair.greet()
        pair.dialer.socket.send_multipart((encode(Heartbeat("s1", 1)), b"more"))
        pair.dialer.send(Heartbeat("s1", 2))
        assert until(pair.listener.receive)[1] == Heartbeat("s1", 2)
        assert pair.listener.core.counters.extra_frames == 1


def test_a_frame_over_the_limit_ends_the_connection_and_nothing_else(run_dir: RunDir) -> None:
    with SyncPair(run_dir, SMALL) as pair:
        pair.greet()
        other: Dialer[Any] = Dialer(run_dir, "supervisor", FROM)
        try:
            assert other.socket.poll(DEADLINE_S * 1000, zmq.POLLOUT)
            other.send(handshake.hello("executor", "e1"))
            until(lambda: pair.listener.receive() or other.receive())
            pair.dialer.send(ServiceReady("s1", 1, "x" * 2000))
            other.send(ServiceReady("e1", 1, "x" * 900))
            assert until(pair.listener.receive)[1].name == "e1"
            # libzmq closed the first connection; it comes back as a stranger
            answer = until(lambda: pair.listener.receive() or pair.dialer.receive() or _again(pair.dialer))
            assert answer.field == "hello"
        finally:
            other.close()


def _again(dialer: Dialer[Any]) -> None:
    dialer.send(Heartbeat("s1", 9))
    dialer.socket.poll(20)


def test_sends_to_a_peer_that_left_are_counted(run_dir: RunDir) -> None:
    with SyncPair(run_dir) as pair:
        pair.greet()
        pair.dialer.send(Heartbeat("s1", 1))
        peer, _ = until(pair.listener.receive)
        pair.dialer.close()
        until(lambda: not pair.listener.send(peer, Stop()))
        assert pair.listener.core.counters.unroutable == 1
        pair.listener.core.forget(peer)
        assert not pair.listener.core.peers


def test_one_peer_too_many_is_overloaded(run_dir: RunDir) -> None:
    with SyncPair(run_dir, max_peers=1) as pair:
        pair.greet()
        first, pair.dialer = pair.dialer, Dialer(run_dir, "supervisor", FROM)
        try:
            with pytest.raises(Overloaded):
                pair.greet()
        finally:
            first.close()


def test_who_left_makes_room_and_is_reported(run_dir: RunDir) -> None:
    with SyncPair(run_dir, max_peers=1) as pair:
        lost: list[str] = []
        pair.listener.core.on_lost = lambda peer: lost.append(peer.name)
        pair.greet()
        pair.dialer.close()
        left = pair.listener.core.counters.unroutable

        def another() -> bool:  # ZeroMQ needs a moment to notice
            pair.dialer = Dialer(run_dir, "supervisor", FROM)
            answer = pair.ask(encode(handshake.hello("storage", "s2")))
            if isinstance(answer, Welcome):
                return True
            pair.dialer.close()
            return False

        until(another)
        assert lost == ["s1"]
        assert [peer.name for peer in pair.listener.core.peers.values()] == ["s2"]
        assert pair.listener.core.counters.unroutable == left


def test_a_second_hello_ends_the_first_peer(run_dir: RunDir) -> None:
    with SyncPair(run_dir) as pair:
        lost: list[int] = []
        pair.listener.core.on_lost = lambda peer: lost.append(peer.serial)
        for _ in range(3):
            pair.greet()
        assert lost == [1, 2]
        assert [peer.serial for peer in pair.listener.core.peers.values()] == [3]


def test_bad_frames_without_end_do_not_keep_the_listener(run_dir: RunDir) -> None:
    with SyncPair(run_dir) as pair:
        pair.greet()
        for _ in range(600):
            pair.dialer.socket.send(b"\xc1")
        answered = pair.listener.core.counters
        calls = 0
        while answered.undecodable < 600:
            until(lambda: pair.listener.socket.poll(0))
            before = answered.undecodable
            assert pair.listener.receive() is None
            calls += 1
            assert answered.undecodable - before <= 256
        assert calls >= 3


def test_asyncio_bad_frames_without_end_leave_others_their_turn(run_dir: RunDir) -> None:
    async def run() -> None:
        listener: AsyncListener[Any] = AsyncListener(run_dir, "supervisor", TO, ROLES)
        dialer: AsyncDialer[Any] = AsyncDialer(run_dir, "supervisor", FROM)
        turns: list[int] = []

        async def other() -> None:
            while True:
                turns.append(listener.core.counters.undecodable)
                await asyncio.sleep(0)

        reading = asyncio.create_task(listener.receive())
        await dialer.greet("storage", "s1", DEADLINE_S)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        for _ in range(2000):
            await dialer.socket.send(b"\xc1")
        time.sleep(0.1)  # so that all of them are there before the first is read
        tasks = [asyncio.create_task(other()), asyncio.create_task(listener.receive())]
        async with asyncio.timeout(DEADLINE_S):
            while listener.core.counters.undecodable < 2000:
                await asyncio.sleep(0.001)
        steps = [after - before for before, after in itertools.pairwise(turns)]
        assert max(steps) <= 64
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        listener.close()
        dialer.close()

    asyncio.run(run())


def test_nobody_there_is_daemon_not_running_and_silence_is_a_timeout(run_dir: RunDir) -> None:
    dialer: Dialer[Any] = Dialer(run_dir, "supervisor", FROM)
    with pytest.raises(DaemonNotRunning, match="nobody listens"):
        dialer.greet("storage", "s1", 0.05)
    assert not dialer.send(Heartbeat("s1", 1))
    assert dialer.counters.high_water == 1
    with pytest.raises(RequestTimeout):
        dialer.expect(0.01)
    dialer.close()


def test_a_silent_listener_is_daemon_not_running(run_dir: RunDir) -> None:
    with SyncPair(run_dir) as pair, pytest.raises(DaemonNotRunning, match="no answer"):
        pair.dialer.greet("storage", "s1", 0.1)


def test_a_hello_that_died_with_its_hearer_is_said_again(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "HELLO_AGAIN_S", 0.2)
    first: Listener[Any] = Listener(run_dir, "supervisor", TO, frozenset({"storage"}))
    dialer: Dialer[Any] = Dialer(run_dir, "supervisor", FROM)
    second: list[Listener[Any]] = []

    def die_and_come_back() -> None:
        until(lambda: first.socket.poll(10, zmq.POLLIN))  # the hello is there, and will not be read
        first.close()
        second.append(Listener(run_dir, "supervisor", TO, frozenset({"storage"})))
        until(lambda: (second[0].receive(), second[0].core.peers)[1])

    other = threading.Thread(target=die_and_come_back)
    other.start()
    try:
        assert isinstance(dialer.greet("storage", "s1", 20.0), Welcome)
    finally:
        other.join()
        dialer.close()
        second[0].close()


def test_asyncio_a_hello_that_nobody_hears_is_said_again(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hearer may die of something else, or be busy for a moment: the second Welcome comes later and harms nobody."""
    monkeypatch.setattr(aio, "HELLO_AGAIN_S", 0.2)

    async def scenario() -> None:
        deaf: AsyncListener[Any] = AsyncListener(run_dir, "supervisor", TO, ROLES)
        dialer: AsyncDialer[Any] = AsyncDialer(run_dir, "supervisor", FROM)
        greeting = asyncio.create_task(dialer.greet("storage", "s1", 20.0))
        async with asyncio.timeout(DEADLINE_S):
            for _ in range(2):
                await deaf.socket.recv_multipart()  # not answered
            receiving = asyncio.create_task(deaf.receive())
            assert isinstance(await greeting, Welcome)
            receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        dialer.close()
        deaf.close()

    asyncio.run(scenario())


def test_port_set_gives_ports_in_their_order(run_dir: RunDir) -> None:
    control: Listener[Any] = Listener(run_dir, "kernel-control", TO, ROLES)
    with SyncPair(run_dir) as pair:
        second: Dialer[Any] = Dialer(run_dir, "kernel-control", FROM)
        try:
            ports = PortSet(control, pair.listener)
            assert ports.wait(0) == []
            for dialer in (pair.dialer, second):
                assert dialer.socket.poll(DEADLINE_S * 1000, zmq.POLLOUT)
                dialer.send(Heartbeat("s1", 1))
            until(lambda: len(ports.wait(0.1)) == 2)
            assert ports.wait(0) == [control, pair.listener]
        finally:
            second.close()
            control.close()


def test_asyncio_round_trip_refusals_and_loss(run_dir: RunDir) -> None:
    async def talk() -> None:
        listener: AsyncListener[Any] = AsyncListener(run_dir, "text", TO, ROLES, incarnation=3)
        dialer: AsyncDialer[Any] = AsyncDialer(run_dir, "text", FROM)
        stranger: AsyncDialer[Any] = AsyncDialer(run_dir, "text", FROM)
        received: asyncio.Queue[Any] = asyncio.Queue()

        async def serve() -> None:
            while True:
                await received.put(await listener.receive())

        server = asyncio.create_task(serve())
        try:
            assert (await dialer.greet("storage", "s1", DEADLINE_S)).incarnation == 3
            assert dialer.send(Heartbeat("s1", 4))
            peer, message = await received.get()
            assert (message, peer.name, peer.uid) == (Heartbeat("s1", 4), "s1", os.getuid())
            assert listener.send(peer, Stop())
            assert await dialer.receive() == Stop()
            with pytest.raises(ProtocolError, match="role 'client'"):
                await stranger.greet("client", "c", DEADLINE_S)
            stranger.send(Heartbeat("c", 1))
            assert (await stranger.receive()).field == "hello"
            dialer.close()
            async with asyncio.timeout(DEADLINE_S):
                while listener.send(peer, Stop()):
                    await asyncio.sleep(0)
            assert listener.core.counters.unroutable == 1
            assert stat.S_IMODE(run_dir.socket("text").stat().st_mode) == 0o600
        finally:
            server.cancel()
            await asyncio.gather(server, return_exceptions=True)
            for port in (listener, dialer, stranger):
                port.close()

    asyncio.run(talk())


def test_asyncio_nobody_there(run_dir: RunDir) -> None:
    async def talk() -> None:
        dialer: AsyncDialer[Any] = AsyncDialer(run_dir, "text", FROM)
        try:
            with pytest.raises(DaemonNotRunning):
                await dialer.greet("storage", "s1", 0.05)
            assert not dialer.send(Heartbeat("s1", 1))
        finally:
            dialer.close()

    asyncio.run(talk())


def test_memory_round_trip_and_refusals() -> None:
    listener: MemoryListener[Any] = MemoryListener("supervisor", TO, ROLES, incarnation=9, max_peers=2)
    dialer = listener.connect(FROM)
    dialer.send(Heartbeat("s1", 1))
    assert listener.receive() is None
    assert dialer.receive().field == "hello"
    assert dialer.greet("storage", "s1").incarnation == 9
    dialer.send(Heartbeat("s1", 2))
    peer, message = listener.receive() or pytest.fail("no message")
    assert message == Heartbeat("s1", 2)
    assert listener.send(peer, Stop())
    assert dialer.receive() == Stop()
    assert dialer.receive() is None
    with pytest.raises(ProtocolError, match="role 'client'"):
        listener.connect(FROM).greet("client", "c")
    listener.connect(FROM).greet("executor", "e1")
    with pytest.raises(Overloaded):
        listener.connect(FROM).greet("executor", "e2")
    dialer.close()
    assert not listener.send(peer, Stop())
    assert not dialer.send(Heartbeat("s1", 3))
    assert listener.core.counters.unroutable == 1


def test_a_second_hello_is_a_new_peer_on_the_same_connection() -> None:
    greeted: list[Any] = []
    listener: MemoryListener[Any] = MemoryListener("supervisor", TO, ROLES)
    listener.core.on_greet = greeted.append
    dialer = listener.connect(FROM)
    dialer.greet("storage", "s1")
    dialer.greet("storage", "s1")
    first, second = greeted
    assert second.serial > first.serial
    listener.core.forget(first)  # too late: the routing id belongs to the second one
    assert list(listener.core.peers.values()) == [second]


@pytest.mark.parametrize(
    ("address", "uid"),
    [
        ("localhost:1000:1000:42", 1000),
        ("localhost:0:0:1", 0),
        ("", None),
        (None, None),
        ("1.2.3.4", None),
        ("a:b:c:d", None),
    ],
)
def test_peer_uid(address: str | None, uid: int | None) -> None:
    assert peer_uid(address) == uid


def test_run_dir_is_private_and_short_enough(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run")
    folder.create()
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    folder.socket("client").touch()
    folder.remove_sockets()
    assert not folder.socket("client").exists()
    with pytest.raises(ConfigError, match="too long") as caught:
        RunDir("/tmp/" + "x" * 90)
    assert caught.value.field == "run_dir"
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(ConfigError, match="not a directory of this user"):
        RunDir(tmp_path / "link").create()


def test_version_mismatch_is_what_a_dialer_sees(run_dir: RunDir) -> None:
    with SyncPair(run_dir) as pair:
        answer = pair.ask(encode(replace(handshake.hello("storage", "s1"), schema_hash="feedfeedfeedfeed")))
        with pytest.raises(VersionMismatch, match="feedfeedfeedfeed"):
            handshake.check_answer(answer, "supervisor")
