"""A whole daemon with a network port: clients with keys, llmosctl, kill -9 of the gateway, and revoking while streams run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from daemon import FAKE, running
from gateway_world import free_ports

from llmos import Client
from llmos.codes import SeqState
from llmos.errors import NotFound, Unauthorized
from llmos.keys.keyfile import KeyFile
from llmos.keys.roles import Role
from llmos.keys.server_key import make_server_key
from llmos.services.executor.fake import STEP_MS_VARIABLE, fake_token

pytestmark = pytest.mark.slow
VOCAB = json.loads((Path(__file__).parents[2] / "llmos/assets/demo-model/config.json").read_text())["vocab_size"]
COUNT = 400


class Network:
    """A daemon, its keys, and how to reach it."""

    def __init__(self):
        self.port = free_ports()
        self.config = f'{FAKE}\n[gateway]\ntcp = "127.0.0.1:{self.port}"\n'

    def prepare(self, state):
        self.bob = KeyFile(state).add("test", "bob", Role.INSPECT)[1]
        self.keys = {role: KeyFile(state).add("test", "alice", role)[1] for role in Role}
        self.server_key = make_server_key(state).public

    def client(self, role):
        return Client(f"tcp://127.0.0.1:{self.port}", key=self.keys[role].text, server_key=self.server_key)

    def ctl(self, role, *arguments):
        environment = {
            **os.environ,
            "LLMOS_URL": f"tcp://127.0.0.1:{self.port}",
            "LLMOS_KEY": self.keys[role].text,
            "LLMOS_SERVER_KEY": self.server_key,
        }
        command = [Path(sys.executable).with_name("llmosctl"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)


@pytest.fixture(scope="module")
def network():
    return Network()


@pytest.fixture(scope="module")
def daemon(network):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STEP_MS_VARIABLE, "5")
        with running(network.config, network.prepare) as found:
            yield found


def expected(seed):
    return [fake_token(seed, 3 + i, VOCAB) for i in range(COUNT)]


def test_it_listens_where_it_was_told_and_nowhere_else(daemon, network):
    assert daemon.listening() == {f"127.0.0.1:{network.port}", f"127.0.0.1:{network.port + 1}"}


def test_kill_9_of_the_gateway_is_a_pause_for_network_clients(daemon, network):
    with network.client(Role.SUBMIT) as client:
        stream = client.generate([1, 2, 3], stream=True, seed=7, max_tokens=COUNT, ignore_eos=True)
        first = list(next(iter(stream)).token_ids)
        daemon.children()["gateway"].kill()
        rest = [token for chunk in stream for token in chunk.token_ids]
        assert first + rest == expected(7)
    assert daemon.listening() == {f"127.0.0.1:{network.port}", f"127.0.0.1:{network.port + 1}"}


def test_llmosctl_over_the_network(daemon, network):
    done = network.ctl(Role.INSPECT, "ps", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
    done = network.ctl(Role.SUBMIT, "ps")
    assert (done.returncode, done.stderr) == (1, "llmosctl: PsGet is for the role inspect; this session has submit\n")
    done = network.ctl(Role.ADMIN, "restart", "storage", "--json")
    assert done.returncode == 0, done.stderr
    lines = (daemon.home / "state" / "audit.log").read_text().splitlines()
    assert [(line["who"], line["verb"], line["outcome"]) for line in map(json.loads, lines)] == [
        (f"key:{network.keys[Role.SUBMIT].id}", "PsGet", "permission"),
        (f"key:{network.keys[Role.ADMIN].id}", "RestartService", "ok"),
    ]


FOREIGN = {
    "stat": lambda client, own, rid: client.sequence(rid).stat(),
    "explain": lambda client, own, rid: client.explain(rid),
    "kill": lambda client, own, rid: client.kill(rid),
    "kill a job": lambda client, own, rid: client.kill(job=rid),
    "suspend": lambda client, own, rid: client.suspend(rid),
    "resume": lambda client, own, rid: client.resume(rid),
    "nice": lambda client, own, rid: client.nice(rid, 5),
    "deadline": lambda client, own, rid: client.sequence(rid).deadline(60.0),
    "wait": lambda client, own, rid: client.sequence(rid).wait(),
    "fork": lambda client, own, rid: client.sequence(rid).fork(1),
    "close": lambda client, own, rid: client.sequence(rid).close(),
    "attach": lambda client, own, rid: list(client.sequence(rid).attach()),
    "append": lambda client, own, rid: client.sequence(rid).append([1, 2]),
    "generate": lambda client, own, rid: client.sequence(rid).generate(max_tokens=1),
    "after": lambda client, own, rid: own.after(rid),
    "a new one's parent": lambda client, own, rid: client.spawn([1], parent=rid),
    "a new one's after": lambda client, own, rid: client.generate([1], after=[rid], max_tokens=1),
}


def test_a_foreign_sequence_is_like_one_that_is_not_there(daemon, network):
    """By the real microkernel, and whatever names it."""
    bob = Client(f"tcp://127.0.0.1:{network.port}", key=network.bob.text, server_key=network.server_key)
    with network.client(Role.SUBMIT) as alice, bob, alice.spawn([1, 2, 3]) as hers, bob.spawn([1]) as own:
        for what, ask in FOREIGN.items():
            answers = []
            for rid in (hers.rid, 1_000_000):
                with pytest.raises(NotFound) as caught:
                    ask(bob, own, rid)
                answers.append(
                    (caught.value.field, caught.value.message.replace(str(rid), "N"), caught.value.rid == rid)
                )
            assert answers[0] == answers[1], what
        assert bob.kill(tenant="alice") == ()
        assert [row.rid for row in bob.ps()] == [own.rid]
        assert {row.tenant for row in bob.tenants()} == {"bob"}
        assert hers.stat().row.state == SeqState.BLOCKED


def test_revoked_while_streams_run(daemon, network):
    with network.client(Role.INSPECT) as leaving, Client(daemon.run_dir) as staying:
        streams = [
            client.generate([1, 2, 3], stream=True, seed=9, max_tokens=COUNT, ignore_eos=True)
            for client in (leaving, staying)
        ]
        first = list(next(streams[1]).token_ids)
        next(streams[0])
        KeyFile(daemon.home / "state").revoke(network.keys[Role.INSPECT].id)
        with pytest.raises(Unauthorized, match="was revoked"):
            list(streams[0])
        assert first + [token for chunk in streams[1] for token in chunk.token_ids] == expected(9)
    with pytest.raises(Unauthorized, match="refuses this key"), network.client(Role.INSPECT) as client:
        client.models()
    with network.client(Role.SUBMIT) as client:
        assert [row.name for row in client.models()] == ["demo"]
