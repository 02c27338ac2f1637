"""The network's way in: it works like the local one, it serves nobody it should not, and it does not open where it can not be trusted."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.asyncio
from gateway_world import GatewayWorld, free_ports, wait_until

from llmos import Client
from llmos.errors import ConfigError, DaemonNotRunning, InvalidRequest, LlmosError, Unauthorized, Unavailable
from llmos.keys.keyfile import KeyFile
from llmos.keys.ring import KeyRing
from llmos.keys.roles import Role
from llmos.keys.secret import Secret
from llmos.keys.server_key import make_server_key
from llmos.ports import tcp_check
from llmos.ports.core import ListenerCore, Peer, Reply
from llmos.ports.tcp import Authenticator
from llmos.protocol import handshake
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, encode
from llmos.services.gateway.clients import ClientTable
from llmos.services.gateway.door import TcpDoor
from llmos.services.gateway.sockets import check_listening, listening
from llmos.tcp_address import TcpAddress


@pytest.fixture
def world() -> Iterator[GatewayWorld]:
    with GatewayWorld(tcp=True) as running:
        yield running


def echo(prompt: str, length: int) -> str:
    return "".join(itertools.islice(itertools.cycle(prompt), length))


# ------------------------------------------------------------ it works


def test_streams_and_verbs_as_over_the_local_socket(world: GatewayWorld) -> None:
    alice = world.add_key("alice", Role.INSPECT)
    with world.client(alice) as client, Client(world.path) as local:
        assert client.generate("abc", max_tokens=300).text == echo("abc", 300)
        with client.spawn("xy") as seq:
            assert seq.generate(max_tokens=4).text == "xyxy"
            assert [row.owner for row in client.ps()] == ["alice"]
            assert [row.rid for row in local.ps()] == [seq.rid]
            (kid,) = seq.fork(1)
            kid.close()
            assert kid.wait().reason == "closed"
    assert {row.tenant for row in KeyFile(world.state).read()} == {"alice", "operator"}


def test_the_environment_says_where_and_who(world: GatewayWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOS_URL", world.url)
    monkeypatch.setenv("LLMOS_KEY", world.admin.text)
    monkeypatch.setenv("LLMOS_SERVER_KEY", world.server_key)
    with Client() as client:
        assert client.generate("abc", max_tokens=4).text == "abca"
    with Client(world.path) as local:
        assert local.generate("abc", max_tokens=4).text == "abca"


def test_a_gateway_that_is_restarted_is_a_pause(world: GatewayWorld) -> None:
    world.kernel.tokens_per_step = 1
    with world.client(world.admin) as client, client.generate("stream", max_tokens=400, stream=True) as stream:
        chunks = [next(stream).text for _ in range(3)]
        world.thread.call(world.gateway.close())
        world.thread.do(world._make)
        world.thread.call(world.gateway.start())
        chunks += [chunk.text for chunk in stream]
        assert "".join(chunks) == echo("stream", 400)
        assert client.ps() == ()


# ------------------------------------------------------------ whom it lets in


def wrong_server(world: GatewayWorld) -> Client:
    return Client(world.url, key=world.admin.text, server_key=zmq.curve_keypair()[0].decode())


def revoked(world: GatewayWorld) -> Client:
    key = world.add_key("alice")
    world.revoke(key)
    return world.client(key)


@pytest.mark.parametrize(
    ("who", "error", "field"),
    [
        (lambda world: world.client(Secret.make()), Unauthorized, "key"),
        (revoked, Unauthorized, "key"),
        (wrong_server, Unauthorized, "server_key"),
        (lambda world: Client(world.url, server_key=world.server_key), Unauthorized, "key"),
        (lambda world: Client(world.url, key="secret", server_key=world.server_key), InvalidRequest, "key"),
        (lambda world: Client(world.url, key=world.admin.text), InvalidRequest, "server_key"),
        (lambda world: Client("tcp://127.0.0.1", key=world.admin.text), InvalidRequest, "url"),
        (lambda world: Client("tcp://a b:1", key=world.admin.text, server_key=world.server_key), InvalidRequest, "url"),
        (lambda world: Client("http://127.0.0.1:1", key=world.admin.text), InvalidRequest, "url"),
        (lambda world: Client("tcp://127.0.0.1:1", key=world.admin.text, server_key=world.server_key), DaemonNotRunning, "url"),
    ],
    ids=["unknown", "revoked", "wrong server", "no key", "malformed", "no server key", "no port", "no name", "http", "nobody there"],
)  # fmt: skip
def test_a_client_that_can_not_come_in_learns_why(
    world: GatewayWorld,
    monkeypatch: pytest.MonkeyPatch,
    who: Callable[[GatewayWorld], Client],
    error: type[LlmosError],
    field: str,
) -> None:
    for name in ("LLMOS_URL", "LLMOS_KEY", "LLMOS_SERVER_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(error) as caught, who(world) as client:
        client.ps()
    assert caught.value.field == field
    assert type(caught.value) is error


def test_a_revoked_key_is_shown_out_and_others_stay(world: GatewayWorld) -> None:
    alice, bob = world.add_key("alice"), world.add_key("bob")
    world.kernel.tokens_per_step = 1
    with world.client(alice) as leaving, world.client(bob) as staying:
        other = staying.generate("other", max_tokens=200, stream=True)
        stream = leaving.generate("mine", max_tokens=100_000, stream=True)
        next(stream)
        next(other)
        world.kernel.paused = True
        open_seq = leaving.spawn("abc")
        waited: list[LlmosError] = []

        def wait() -> None:
            try:
                open_seq.wait()
            except LlmosError as error:
                waited.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: any(isinstance(message, m.Wait) for message in world.kernel.controls))
        world.revoke(alice)
        with pytest.raises(Unauthorized, match=f"key {alice.id} was revoked"):
            list(stream)
        thread.join()
        assert [type(error) for error in waited] == [Unauthorized]
        for again in (lambda: leaving.generate("x"), open_seq.stat, lambda: leaving.tokenize("x")):
            with pytest.raises(Unauthorized):
                again()
        last = world.audit.path.read_text().splitlines()[-1]
        assert f'"who":"key:{alice.id}","tenant":"","verb":"Stat"' in last
        assert '"outcome":"unauthorized"' in last
        world.kernel.paused = False
        assert len([token for chunk in other for token in chunk.token_ids]) == 199
        assert other.completion.text == echo("other", 200)
        wait_until(lambda: any(isinstance(message, m.SeqCancel) for message in world.kernel.seen))
        assert [seq.owner for seq in world.kernel.sequences.values()] == ["alice"], "its open sequence is its tenant's"
    with world.client(world.add_key("alice")) as successor:
        assert successor.sequence(open_seq.rid).generate(max_tokens=3).text == "abc"


def test_a_damaged_key_file_shows_everybody_out(world: GatewayWorld) -> None:
    with world.client(world.admin) as client, Client(world.path) as local:
        client.ps()
        good = KeyFile(world.state).path.read_bytes()
        KeyFile(world.state).path.write_bytes(b"{")
        wait_until(lambda: world.gateway._door is not None and not len(world.gateway._door.keys))
        with pytest.raises(Unauthorized):
            client.ps()
        assert local.ps() == ()
        KeyFile(world.state).path.write_bytes(good)
    with world.client(world.admin) as client:
        assert client.ps() == ()


def test_who_comes_with_the_routing_id_of_another_gets_nothing_of_it() -> None:
    core: ListenerCore[Any] = ListenerCore("client", Schema(m.ClientToGateway), frozenset({"client"}), 1, 8)
    hello = encode(handshake.hello("client", "x"))
    assert isinstance(core.accept(b"id", hello, None, "aaaa"), Reply)
    first = core.accept(b"id", encode(m.PsGet(1)), None, "aaaa")
    assert not isinstance(first, Reply)
    refused = core.accept(b"id", encode(m.PsGet(1)), None, "bbbb")
    assert isinstance(refused, Reply)
    assert b"say hello first" in refused.frame
    gone: list[bytes] = []
    listener: Any = None
    table: ClientTable[int] = ClientTable(listener, lambda client: gone.append(client.id), b"t")
    table.of(first[0]).requests[7] = 70
    assert isinstance(core.accept(b"id", hello, None, "bbbb"), Reply)
    second = core.accept(b"id", encode(m.PsGet(1)), None, "bbbb")
    assert not isinstance(second, Reply)
    assert table.of(second[0]).requests == {}
    assert gone == [b"tid"]
    assert table.of(Peer(b"id", 9, "client", "x", 1, None, "bbbb")) is table.find(b"tid")


# ------------------------------------------------------------ it does not open


class Doorway:
    """A door in an event loop, with an authenticator of the test's own."""

    def __init__(self, folder: Path, judge: Callable[[str], str | None] | None) -> None:
        KeyFile(folder).add("a", "alice", Role.SUBMIT)
        self.server = make_server_key(folder)
        self.door = TcpDoor(TcpAddress("127.0.0.1", free_ports()), folder, KeyRing(folder))
        if judge is not None:
            self.door.authenticator._judge = judge

    async def check(self, *, answers: bool = True) -> None:
        schema: Schema[Any] = Schema(m.ClientToGateway)
        listeners = []
        running = asyncio.create_task(self.door.authenticator.run() if answers else asyncio.sleep(60))
        try:
            for url in self.door.urls:
                listeners.append(self.door.listen(url, "client", schema, 1, 8))
            await self.door.check()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            for listener in listeners:
                listener.close()
            self.door.close()


def test_a_door_that_refuses_strangers_opens(tmp_path: Path) -> None:
    async def script() -> None:
        asked: list[str] = []
        doorway = Doorway(tmp_path, lambda key: asked.append(key))
        await doorway.check()
        assert len(set(asked)) == 2, "one stranger at each port"
        assert doorway.door.authenticator.accepted == 0

    asyncio.run(script())


def test_an_authenticator_that_accepts_everybody(tmp_path: Path) -> None:
    async def script() -> None:
        with pytest.raises(ConfigError, match="lets clients in whose key it does not know") as caught:
            await Doorway(tmp_path, lambda key: "0123abcd").check()
        assert caught.value.field == "gateway.tcp"

    asyncio.run(script())


@pytest.mark.parametrize("dead", ["hangs", "is gone", "raises"])
def test_a_dead_authenticator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: str) -> None:
    def judge(key: str) -> str | None:
        raise ZeroDivisionError

    async def script() -> None:
        doorway = Doorway(tmp_path, judge if dead == "raises" else None)
        if dead == "is gone":
            doorway.door.authenticator.close()
        await doorway.check(answers=dead == "raises")

    check, limit = tcp_check.check_refuses, 0.5
    monkeypatch.setattr("llmos.services.gateway.door.check_refuses", lambda *args: check(*args, limit))
    # One that raises refuses the first stranger; the second check, of the other port, finds nobody.
    with pytest.raises(
        ConfigError, match=r"does not answer within 0\.5 s: its authenticator is dead; llmosd does not serve"
    ):
        asyncio.run(script())


def test_a_port_without_curve(tmp_path: Path) -> None:
    async def script() -> None:
        with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as open_port:
            port = open_port.bind_to_random_port("tcp://127.0.0.1")
            assert (
                await tcp_check._check_no_curve(TcpAddress("127.0.0.1", port).url)
                == "lets clients in that do not use CURVE"
            )

    asyncio.run(script())


def test_a_gateway_ends_when_its_authenticator_does(world: GatewayWorld) -> None:
    def judge(key: str) -> str | None:
        raise ZeroDivisionError

    assert world.gateway._door is not None
    serving = world.thread.spawn(world.gateway.serve(asyncio.Event()))
    world.gateway._door.authenticator._judge = judge
    with pytest.raises(Unauthorized), world.client(world.admin) as client:
        client.ps()
    wait_until(serving.done)
    assert isinstance(serving.exception(), ZeroDivisionError)
    world.thread._tasks.remove(serving)


def test_the_authenticator_believes_nothing_else() -> None:
    """Another domain, mechanism or length of key is refused whatever the judge says; so is a question that is cut short."""
    authenticator = Authenticator.__new__(Authenticator)
    authenticator._judge = lambda key: "0123abcd"
    authenticator.accepted, authenticator.refused, authenticator.quiet = 0, 0, True
    good = [b"peer", b"", b"1.0", b"1", b"llmos", b"127.0.0.1", b"", b"CURVE", b"k" * 32]
    assert authenticator._decide(good) == "0123abcd"
    for place, value in ((4, b""), (4, b"other"), (7, b"NULL"), (7, b"PLAIN"), (8, b"k" * 31), (8, b"")):
        assert authenticator._decide([*good[:place], value, *good[place + 1 :]]) is None
    assert authenticator._decide(good[:8]) is None
    assert authenticator._decide([*good, b"more"]) is None
    assert (authenticator.accepted, authenticator.refused) == (1, 8)


def test_without_the_servers_key_it_does_not_open(tmp_path: Path) -> None:
    KeyFile(tmp_path).add("a", "alice", Role.SUBMIT)
    with pytest.raises(ConfigError, match=r"no server\.key; make it: llmosctl keys server"):
        TcpDoor(TcpAddress("127.0.0.1", 1), tmp_path, KeyRing(tmp_path))


def test_a_port_in_use_is_typed(tmp_path: Path) -> None:
    async def script() -> None:
        doorway = Doorway(tmp_path, None)
        port = doorway.door._address.port
        taken = pytest.raises(
            Unavailable, match=rf"can not listen on tcp://127\.0\.0\.1:{port}: Address already in use"
        )
        with socket.create_server(("127.0.0.1", port)), taken:
            await doorway.check()

    asyncio.run(script())


# ------------------------------------------------------------ what it listens on


def test_a_socket_too_many_is_found() -> None:
    before = listening()
    check_listening(before)
    with socket.create_server(("127.0.0.1", 0)) as extra:
        url = TcpAddress(*extra.getsockname()[:2]).url
        assert listening() - before == {url}
        with pytest.raises(ConfigError, match=url):
            check_listening(before)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as extra:
        extra.bind(("127.0.0.1", 0))
        assert listening() - before == {f"udp://127.0.0.1:{extra.getsockname()[1]}"}
    with pytest.raises(ConfigError, match=r"/x/client\.sock"):
        check_listening({*before, "/x/client.sock"})


def test_the_gateways_own_list(world: GatewayWorld) -> None:
    found = listening()
    assert set(world.gateway.addresses) <= found
    assert {url for url in found if url.startswith("tcp://")} == set(world.gateway.addresses[2:])
