"""The verbs of the SDK: what goes on the wire, what comes back, what is refused before it leaves."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gateway_world import GatewayWorld, explained, tenant_row, wait_until

from llmos import AsyncClient, Client
from llmos.client import verbs
from llmos.client.prompts import generate_request
from llmos.codes import SeqState
from llmos.errors import InvalidRequest, NotFound
from llmos.protocol import messages as m


@pytest.fixture
def world() -> Iterator[GatewayWorld]:
    with GatewayWorld() as running:
        running.kernel.paused = True
        yield running


def test_verbs_change_a_live_sequence(world: GatewayWorld) -> None:
    with Client(world.path) as client:
        stream = client.generate("abc", max_tokens=4, stream=True, nice=3, deadline_s=60)
        wait_until(lambda: client.ps())
        (row,) = client.ps()
        assert (row.nice, row.state) == (3, SeqState.RUNNING)
        client.nice(row.rid, -5)
        client.suspend(row.rid)
        client.suspend(row.rid, keep_pages=False)
        (row,) = client.ps()
        assert (row.nice, row.state) == (-5, SeqState.SUSPENDED)
        found = client.explain(row.rid)
        assert (found.rid, found.age_ms, found.nice, found.queue_ms) == (row.rid, 10_000.0, -5, 2000.0)
        client.resume(row.rid)
        world.kernel.paused = False
        assert "".join(map(str, stream)) == "abca"
        suspends = [message for message in world.kernel.controls if isinstance(message, m.Suspend)]
        assert [message.keep_pages for message in suspends] == [True, False]
        for act in (client.suspend, client.resume, client.explain, lambda rid: client.nice(rid, 1)):
            with pytest.raises(NotFound, match=f"no sequence {row.rid}"):
                act(row.rid)


def test_tenants(world: GatewayWorld) -> None:
    with Client(world.path) as client:
        assert client.tenants() == (tenant_row("alice"), tenant_row("bob"))
        changed = tenant_row("alice", weight=3.0, max_pages=100, max_running=4, tokens_per_s=0.5)
        assert client.set_tenant("alice", weight=3, max_pages=100, max_running=4, tokens_per_s=0.5) == (changed,)
        again = tenant_row("carol", guaranteed_pages=7, max_waiting=9)
        assert client.set_tenant("carol", guaranteed_pages=7, max_waiting=9) == (again,)
        assert client.tenants() == (changed, tenant_row("bob"), again)


def test_the_async_client_has_the_same_verbs(world: GatewayWorld) -> None:
    async def main() -> None:
        async with AsyncClient(world.path) as client:
            answer = asyncio.create_task(client.generate([97], max_tokens=2, nice=1, deadline_s=2.5))
            while not (rows := await client.ps()):
                await asyncio.sleep(0.005)
            rid = rows[0].rid
            await client.nice(rid, 19)
            await client.suspend(rid, False)
            assert [(row.nice, row.state) for row in await client.ps()] == [(19, SeqState.SUSPENDED)]
            await client.resume(rid)
            assert (await client.explain(rid)).nice == 19
            assert len(await client.tenants()) == 2
            assert (await client.set_tenant("bob", weight=2.0))[0].weight == 2.0
            world.kernel.paused = False
            assert (await answer).text == "aa"

    asyncio.run(main())
    (submit,) = [message for message in world.kernel.seen if isinstance(message, m.SeqSubmit)]
    assert (submit.nice, submit.deadline_ms) == (1, 2500.0)


def test_both_clients_offer_the_same_calls() -> None:
    names = [name for name in vars(AsyncClient) if not name.startswith("_") and name not in ("start", "complete")]
    assert [name for name in names if not hasattr(Client, name)] == []
    assert {"nice", "suspend", "resume", "explain", "tenants", "set_tenant"} <= set(names)


REFUSED: list[tuple[Callable[[], Any], str, str]] = [
    *((lambda rid=rid: verbs.resume_request(rid), "rid", repr(rid)) for rid in (0, -1, "5", True, None, 2**63)),
    (lambda: verbs.nice_request(1, 20), "nice", "20 is outside"),
    (lambda: verbs.nice_request(1, "5"), "nice", "expected an int, got str"),
    (lambda: verbs.nice_request(1, True), "nice", "got bool"),
    (lambda: verbs.nice_request(1, 1.0), "nice", "got float"),
    (lambda: verbs.suspend_request(1, 1), "keep_pages", "got int"),
    (lambda: verbs.tenant_set_request(5, {}), "tenant", "got int"),
    (lambda: verbs.tenant_set_request("", {}), "tenant", "0 characters"),
    (lambda: verbs.tenant_set_request("a\ud800", {}), "tenant", "Unicode"),
    (lambda: verbs.tenant_set_request("a", {"weight": "3"}), "weight", "expected a number, got str"),
    (lambda: verbs.tenant_set_request("a", {"weight": math.nan}), "weight", "nan"),
    (lambda: verbs.tenant_set_request("a", {"max_pages": 1.5}), "max_pages", "expected an int"),
    (lambda: verbs.tenant_set_request("a", {"max_pages": -1}), "max_pages", "-1 is outside"),
    (lambda: verbs.tenant_set_request("a", {"tokens_per_s": True}), "tokens_per_s", "got bool"),
    *(
        (lambda value=value: generate_request("x", None, None, None, {}, 0, value), "deadline_s", str(words))
        for value, words in ((0, "0"), (-1.5, "-1.5"), (math.nan, "nan"), (math.inf, "inf"), ("1", "str"), (604_801, "604800"))
    ),
    (lambda: generate_request("x", None, None, None, {}, -21), "nice", "-21 is outside"),
    (lambda: generate_request("x", None, None, None, {}, None), "nice", "NoneType"),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize(("build", "field", "words"), REFUSED)
def test_bad_arguments_are_refused_at_once(build: Callable[[], Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build()
    assert caught.value.field == field
    assert words in caught.value.message


def test_builders_give_the_message() -> None:
    assert verbs.kill_request(4)(9) == m.Kill(9, 4)
    assert verbs.nice_request(4, -20)(9) == m.Nice(9, 4, -20)
    assert verbs.suspend_request(4, True)(9) == m.Suspend(9, 4, True)
    assert verbs.resume_request(4)(9) == m.Resume(9, 4)
    assert verbs.explain_request(4)(9) == m.Explain(9, 4)
    assert verbs.tenant_set_request("a", {"weight": 2, "max_pages": None})(9) == m.TenantSet(9, "a", weight=2)
    request = generate_request("x", None, None, None, {}, 7, 0.25)(9)
    assert (request.nice, request.deadline_ms) == (7, 250.0)
    assert explained(1).age_ms == sum(
        getattr(explained(1), f"{name}_ms")
        for name in ("queue", "prefill", "decode", "preempted", "suspended", "client")
    )
