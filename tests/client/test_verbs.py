"""Messages of the control port: exact, or refused before anything is sent. And what the client does with tenants."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gateway_world import GatewayWorld, tenant_row
from wiretap import Wiretap

from llmos import AsyncClient, Client
from llmos.client import verbs
from llmos.client.checked import checked_rid
from llmos.codes import PageFate
from llmos.errors import InvalidRequest
from llmos.protocol import messages as m


@pytest.fixture
def world() -> Iterator[GatewayWorld]:
    with GatewayWorld() as running:
        yield running


def test_builders_give_the_message() -> None:
    assert verbs.kill_request(4, None, None, None)(9) == m.Kill(9, 4)
    everything = verbs.kill_request(None, "bob", 3, "demo")(9)
    assert everything == m.Kill(9, None, tenant="bob", job=3, model="demo")
    assert verbs.fork_request(4, 256)(9) == m.Fork(9, 4, 256)
    assert verbs.nice_request(4, -20)(9) == m.Nice(9, 4, -20)
    fates = {word: verbs.suspend_request(4, word)(9) for word in ("keep", "swap", "drop")}
    assert fates == {
        "keep": m.Suspend(9, 4, PageFate.KEEP),
        "swap": m.Suspend(9, 4, PageFate.SWAP),
        "drop": m.Suspend(9, 4, PageFate.DROP),
    }
    assert verbs.deadline_request(4, 2.5)(9) == m.Deadline(9, 4, 2500.0)
    assert verbs.deadline_request(4, None)(9) == m.Deadline(9, 4, None)
    assert verbs.after_request(4, (5, 6))(9) == m.After(9, 4, (5, 6))
    assert verbs.after_request(4, ())(9) == m.After(9, 4, ())
    assert verbs.tenant_set_request("a", {"weight": 2, "max_pages": None})(9) == m.TenantSet(9, "a", weight=2)


REFUSED: list[tuple[Callable[[], Any], str, str]] = [
    *((lambda rid=rid: checked_rid(rid), "rid", repr(rid)) for rid in (0, -1, "5", True, None, 2**63)),
    (lambda: verbs.kill_request(None, None, None, None), "rid", "give either a rid, or one or more of"),
    (lambda: verbs.kill_request(4, "bob", None, None), "rid", "give either a rid, or one or more of"),
    (lambda: verbs.kill_request(None, "", None, None), "tenant", "0 characters"),
    (lambda: verbs.kill_request(None, 5, None, None), "tenant", "got int"),
    (lambda: verbs.kill_request(None, None, "5", None), "job", "'5' is not a sequence number"),
    (lambda: verbs.kill_request(None, None, None, "\ud800"), "model", "Unicode"),
    (lambda: verbs.fork_request(1, 0), "n", "0 is outside [1, 256]"),
    (lambda: verbs.fork_request(1, 257), "n", "257 is outside"),
    (lambda: verbs.fork_request(1, 2.0), "n", "got float"),
    (lambda: verbs.nice_request(1, 20), "nice", "20 is outside"),
    (lambda: verbs.nice_request(1, "5"), "nice", "expected an int, got str"),
    (lambda: verbs.nice_request(1, True), "nice", "got bool"),
    (lambda: verbs.nice_request(1, 1.0), "nice", "got float"),
    (lambda: verbs.suspend_request(1, "all"), "pages", "'all' is none of keep, swap, drop"),
    (lambda: verbs.suspend_request(1, True), "pages", "True is none of"),
    (lambda: verbs.suspend_request(1, ["keep"]), "pages", "is none of"),
    (lambda: verbs.deadline_request(1, 0), "deadline_s", "0 is outside (0, 604800]"),
    (lambda: verbs.deadline_request(1, math.nan), "deadline_s", "nan"),
    (lambda: verbs.deadline_request(1, "2"), "deadline_s", "got str"),
    (lambda: verbs.after_request(1, (2, "x")), "after", "'x' is not a sequence number"),
    (lambda: verbs.tenant_set_request(5, {}), "tenant", "got int"),
    (lambda: verbs.tenant_set_request("", {}), "tenant", "0 characters"),
    (lambda: verbs.tenant_set_request("a\ud800", {}), "tenant", "Unicode"),
    (lambda: verbs.tenant_set_request("a", {"weight": "3"}), "weight", "expected a number, got str"),
    (lambda: verbs.tenant_set_request("a", {"weight": math.nan}), "weight", "nan"),
    (lambda: verbs.tenant_set_request("a", {"max_pages": 1.5}), "max_pages", "expected an int"),
    (lambda: verbs.tenant_set_request("a", {"max_pages": -1}), "max_pages", "-1 is outside"),
    (lambda: verbs.tenant_set_request("a", {"tokens_per_s": True}), "tokens_per_s", "got bool"),
]


@pytest.mark.parametrize(("build", "field", "words"), REFUSED, ids=[f"{row[1]}-{row[2]}" for row in REFUSED])
def test_bad_arguments_are_refused_at_once(build: Callable[[], Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build()
    assert caught.value.field == field
    assert words in caught.value.message


def test_tenants(world: GatewayWorld) -> None:
    with Client(world.path) as client:
        assert client.tenants() == (tenant_row("alice"), tenant_row("bob"))
        changed = tenant_row("alice", weight=3.0, max_pages=100, max_running=4, tokens_per_s=0.5)
        assert client.set_tenant("alice", weight=3, max_pages=100, max_running=4, tokens_per_s=0.5) == (changed,)
        again = tenant_row("carol", guaranteed_pages=7, max_waiting=9)
        assert client.set_tenant("carol", guaranteed_pages=7, max_waiting=9) == (again,)
        assert client.tenants() == (changed, tenant_row("bob"), again)


def test_the_flight_recorder_is_written_on_request(world: GatewayWorld) -> None:
    with Client(world.path) as client:
        written = client.write_record()
    assert (written.path, written.records, written.bytes) == ("/state/flight-1.rec", 7, 350)


def test_verbs_by_number_are_those_of_the_handle(world: GatewayWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    tap = Wiretap(monkeypatch)
    with Client(world.path) as client:
        seq = client.spawn("abc")
        client.nice(seq.rid, 3)
        client.suspend(seq, "drop")
        client.resume(seq.rid)
        assert client.explain(seq).nice == 3
    assert [type(message) for message in tap.sent] == [m.Spawn, m.Nice, m.Suspend, m.Resume, m.Explain]
    assert tap.of(m.Suspend) == [m.Suspend(2, seq.rid, PageFate.DROP)]


def test_both_clients_offer_the_same_calls() -> None:
    def calls(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert calls(AsyncClient) == calls(Client)
    assert {"generate", "spawn", "sequence", "samples", "kill", "ps", "tenants"} <= calls(Client)
