"""Who may ask for what, over a real network port: every message of a client by every kind of key. Only the right cells pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import zmq
from gateway_world import DEADLINE_S, GatewayWorld, wait_until
from zmq.utils.monitor import parse_monitor_message

from llmos.codes import ErrorCode
from llmos.keys.roles import Role
from llmos.keys.secret import Secret
from llmos.ports import options
from llmos.ports.tcp import Credentials
from llmos.protocol import handshake
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, encode, pack_i32
from llmos.protocol.params import SamplingParams
from llmos.services.gateway.rights import RIGHTS

_schema: Schema[Any] = Schema(m.GatewayToClient)
PARAMS = SamplingParams(max_tokens=3)
NOBODYS = 4711  # no sequence has this number
# Every message of the client port. RID: a resting sequence of alice's.
RID = 0
DATA: list[Any] = [
    m.Generate(5, None, "abc", None, None, PARAMS),
    m.Spawn(5, None, "abc"),
    m.Append(5, RID, "echo", "d", None),
    m.Continue(5, RID, "echo", PARAMS),
    m.Attach(5, RID),
    m.Tokenize(5, None, "abc", None),
    m.Detokenize(5, None, pack_i32([65, 66])),
    m.Embed(5, None, "abc"),
]
CONTROL: list[Any] = [
    m.PsGet(5),
    m.Kill(5, RID),
    m.StatusGet(5),
    m.ModelsGet(5),
    m.Nice(5, RID, 3),
    m.Suspend(5, RID),
    m.Resume(5, RID),
    m.Explain(5, RID),
    m.TenantsGet(5),
    m.TenantSet(5, "alice", weight=2.0),
    m.Fork(5, RID),
    m.Wait(5, RID),
    m.Stat(5, RID),
    m.Close(5, RID),
    m.Deadline(5, RID, 1e6),
    m.After(5, RID, ()),
    m.RecordWrite(5),
    m.RestartService(5, "gateway"),
    m.MeasuresGet(5),
]
SILENT = (m.Ack(5, 1), m.Cancel(5))  # never answered: they concern requests of the same connection
NEEDS_INSPECT = (m.PsGet, m.StatusGet, m.Explain, m.TenantsGet, m.MeasuresGet)
NEEDS_ADMIN = (m.TenantSet, m.RecordWrite, m.RestartService)


class Remote:
    """A client connection over the network, by messages. `secret` None: without CURVE."""

    def __init__(self, world: GatewayWorld, secret: Secret | None, *, control: bool = False) -> None:
        assert world.tcp is not None
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        options.configure(self.socket, max_bytes=_schema.max_bytes)
        if secret is not None:
            keys = Credentials(world.server_key.encode(), secret.public_key.encode(), secret.curve_secret)
            self.socket.curve_serverkey, self.socket.curve_publickey = keys.server, keys.public
            self.socket.curve_secretkey = keys.secret
        self.events = self.socket.get_monitor_socket()
        self.socket.connect(f"tcp://{world.tcp.host}:{world.tcp.port + control}")

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.disable_monitor()
        self.events.close(linger=0)
        self.socket.close()

    def handshake(self) -> str:
        """How it ended: in, refused (in so many words), or cut off."""
        words = {
            zmq.EVENT_HANDSHAKE_SUCCEEDED: "in",
            zmq.EVENT_HANDSHAKE_FAILED_AUTH: "refused",
            zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "cut off",
            zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "cut off",
        }
        while self.events.poll(int(DEADLINE_S * 1000)):
            event = parse_monitor_message(self.events.recv_multipart())["event"]
            if event in words:
                return words[event]
        raise AssertionError("no end of the handshake")

    def greet(self) -> Any:
        self.send(handshake.hello("client", "matrix"))
        return self.receive(m.Message)

    def send(self, message: m.Message) -> None:
        self.socket.send(encode(message))

    def receive(self, kind: type[m.Message]) -> Any:
        while self.socket.poll(int(DEADLINE_S * 1000)):
            message = _schema.decode(self.socket.recv())
            if not (isinstance(message, m.Welcome) and kind is not m.Message):  # a probe
                assert isinstance(message, kind), message
                return message
        raise AssertionError("no answer")


def answer(remote: Remote, message: Any) -> Any:
    remote.send(message)
    while isinstance(found := remote.receive(m.Message), m.Welcome):
        pass
    return found


@pytest.fixture(scope="module")
def world() -> Iterator[GatewayWorld]:
    with GatewayWorld(tcp=True, max_clients=64) as running:
        yield running


@pytest.fixture(scope="module")
def keys(world: GatewayWorld) -> dict[str, Secret]:
    made = {role.word: world.add_key("alice", role) for role in Role}
    made["other tenant"] = world.add_key("bob", Role.INSPECT)
    made["revoked"] = world.add_key("alice", Role.ADMIN)
    world.revoke(made["revoked"])
    made["wrong"] = Secret.make()
    return made


def rest(world: GatewayWorld, key: Secret) -> int:
    """A new resting sequence of alice's."""
    with Remote(world, key) as remote:
        assert isinstance(remote.greet(), m.Welcome)
        return int(answer(remote, m.Spawn(1, None, "abc")).rid)


def aimed(message: Any, rid: int) -> Any:
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    return type(message)(**(fields | ({"rid": rid} if fields.get("rid") == RID else {})))


def test_every_message_of_a_client_is_in_the_table_and_here() -> None:
    clients = {kind for kind in get_args(m.ClientToGateway) if kind is not m.Hello}
    assert set(RIGHTS) == clients
    assert {type(message) for message in (*DATA, *CONTROL, *SILENT)} == clients
    assert {kind for kind, role in RIGHTS.items() if role is Role.INSPECT} == set(NEEDS_INSPECT)
    assert {kind for kind, role in RIGHTS.items() if role is Role.ADMIN} == set(NEEDS_ADMIN)


@pytest.mark.parametrize("control", [False, True], ids=["data", "control"])
@pytest.mark.parametrize("who", ["no key", "wrong", "revoked"])
def test_without_a_live_key_nothing_is_heard(
    world: GatewayWorld, keys: dict[str, Secret], who: str, control: bool
) -> None:
    """Not even a Hello: so every message is covered."""
    with Remote(world, keys.get(who), control=control) as remote:
        assert remote.handshake() == ("cut off" if who == "no key" else "refused")
        with pytest.raises(zmq.Again):
            remote.socket.send(encode(handshake.hello("client", who)), zmq.NOBLOCK)


@pytest.mark.parametrize("role", [role.word for role in Role])
@pytest.mark.parametrize("message", [*DATA, *CONTROL], ids=lambda message: type(message).__name__)
def test_roles(world: GatewayWorld, keys: dict[str, Secret], message: Any, role: str) -> None:
    rid = rest(world, keys["submit"])
    needed = Role.INSPECT if isinstance(message, NEEDS_INSPECT) else Role.SUBMIT
    needed = Role.ADMIN if isinstance(message, NEEDS_ADMIN) else needed
    with Remote(world, keys[role], control=message in CONTROL) as remote:
        assert isinstance(remote.greet(), m.Welcome)
        asked = aimed(message, rid)
        if isinstance(message, m.Wait):
            with Remote(world, keys["admin"], control=True) as killer:
                killer.greet()
                answer(killer, m.Kill(1, rid))
        before = len(world.kernel.controls) + len(world.kernel.seen)
        found = answer(remote, asked)
        if Role[role.upper()] >= needed:
            assert not isinstance(found, m.Error) or found.code not in (ErrorCode.PERMISSION, ErrorCode.UNAUTHORIZED)
            assert found.req == 5
        else:
            assert isinstance(found, m.Error)
            assert (found.req, found.code) == (5, ErrorCode.PERMISSION)
            assert found.message == (f"{type(message).__name__} is for the role {needed.word}; this session has {role}")
            assert len(world.kernel.controls) + len(world.kernel.seen) == before


ABOUT_ONE = [message for message in (*DATA, *CONTROL) if getattr(message, "rid", None) == RID]


@pytest.mark.parametrize("message", ABOUT_ONE, ids=lambda message: type(message).__name__)
def test_another_tenants_sequence_answers_like_one_that_is_not_there(
    world: GatewayWorld, keys: dict[str, Secret], message: Any
) -> None:
    rid = rest(world, keys["submit"])
    with Remote(world, keys["other tenant"], control=message in CONTROL) as remote:
        remote.greet()
        answers = [answer(remote, aimed(message, number)) for number in (rid, NOBODYS)]
    shown = [
        (found.req, found.code, found.field, found.message.replace(str(number), "N"), found.rid == number)
        for found, number in zip(answers, (rid, NOBODYS))
    ]
    assert shown[0] == shown[1]
    assert shown[0][1] == ErrorCode.NOT_FOUND
    assert rid in world.kernel.sequences


def test_lists_show_the_own_tenant_only(world: GatewayWorld, keys: dict[str, Secret]) -> None:
    rid = rest(world, keys["submit"])
    with (
        Remote(world, keys["other tenant"], control=True) as bob,
        Remote(world, keys["inspect"], control=True) as alice,
    ):
        bob.greet()
        alice.greet()
        assert answer(bob, m.PsGet(5, "alice")).rows == ()
        assert {row.tenant for row in answer(bob, m.TenantsGet(5, "alice")).tenants} == {"bob"}
        assert answer(bob, m.Kill(5, None, "alice", tenant="alice")).rids == ()
        rows = answer(alice, m.PsGet(5)).rows
    assert {row.owner for row in rows} == {"alice"}
    assert rid in {row.rid for row in rows}


def test_the_audit_log_has_changes_and_refusals(world: GatewayWorld, keys: dict[str, Secret]) -> None:
    rid = rest(world, keys["submit"])
    with Remote(world, keys["submit"], control=True) as remote:
        remote.greet()
        for message in (m.Nice(5, rid, 7), m.Stat(5, rid), m.PsGet(5), m.Kill(5, NOBODYS)):
            answer(remote, message)
    who = f'"who":"key:{keys["submit"].id}","tenant":"alice"'
    lines = world.audit.path.read_text().splitlines()[-3:]
    assert [line[line.index('"who"') :] for line in lines] == [
        f'{who},"verb":"Nice","target":{{"rid":{rid},"nice":7}},"outcome":"ok"}}',
        f'{who},"verb":"PsGet","target":{{}},"outcome":"permission"}}',
        f'{who},"verb":"Kill","target":{{"rid":{NOBODYS}}},"outcome":"not_found"}}',
    ]
    assert world.audit.path.stat().st_mode & 0o777 == 0o600


def test_nobody_is_left(world: GatewayWorld) -> None:
    wait_until(lambda: not any(table.each() for table in world.gateway._tables))
    assert len(world.gateway.router) == 0
