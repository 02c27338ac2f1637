"""`samples`: spawn, fork and generate together, and nothing left behind, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from gateway_world import GatewayWorld, until, wait_until
from wiretap import Wiretap

from llmos import AsyncClient, AsyncSequence, Client, SamplingParams
from llmos.codes import FinishReason
from llmos.errors import InvalidRequest, RequestTimeout, SequenceFailed
from llmos.protocol import messages as m


@pytest.fixture
def world() -> Iterator[GatewayWorld]:
    with GatewayWorld() as running:
        yield running


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch) -> Wiretap:
    return Wiretap(monkeypatch)


def test_samples_are_one_prompt_and_its_forks(world: GatewayWorld, tap: Wiretap) -> None:
    with Client(world.path, model="echo") as client:
        answers = client.samples("abc", 4, max_tokens=5, seed=2**63 - 2, nice=3, parent=None, deadline_s=60)
        assert [answer.text for answer in answers] == ["abcab"] * 4
        assert client.ps() == ()
    rids = [answer.rid for answer in answers]
    assert tap.of(m.Spawn, m.Fork) == [m.Spawn(1, "echo", "abc", nice=3), m.Fork(1, rids[0], 3)]
    assert [message.rid for message in tap.of(m.Continue)] == rids
    assert [message.params.seed for message in tap.of(m.Continue)] == [2**63 - 2, 2**63 - 1, 0, 1]
    assert {message.deadline_ms for message in tap.of(m.Continue)} == {60_000.0}
    assert sorted(message.rid for message in tap.of(m.Close)) == sorted(rids)
    assert {world.kernel.ended[rid].reason for rid in rids} == {FinishReason.CLOSED}


def test_without_a_seed_each_draws_its_own(world: GatewayWorld, tap: Wiretap) -> None:
    with Client(world.path) as client:
        assert len(client.samples([97, 98], 3, max_tokens=2)) == 3
        assert [message.params.seed for message in tap.of(m.Continue)] == [None] * 3
        tap.sent.clear()
        client.samples([{"role": "user", "content": "x"}], 2, params=SamplingParams(seed=7, max_tokens=2))
        assert [message.params.seed for message in tap.of(m.Continue)] == [7, 8]


def test_one_sample_needs_no_fork(world: GatewayWorld, tap: Wiretap) -> None:
    with Client(world.path) as client:
        assert [answer.text for answer in client.samples("abc", 1, max_tokens=2)] == ["ab"]
    assert [type(message) for message in tap.sent] == [m.Spawn, m.Continue, m.Close]


def test_they_run_at_the_same_time(world: GatewayWorld) -> None:
    world.kernel.paused = True

    async def main() -> None:
        async with AsyncClient(world.path) as client:
            asked = asyncio.create_task(client.samples("abc", 8, max_tokens=2))
            await until(lambda: sum(seq.generating for seq in world.kernel.sequences.values()) == 8)
            world.kernel.paused = False
            assert [answer.text for answer in await asked] == ["ab"] * 8

    asyncio.run(main())


def test_one_that_fails_ends_the_others(world: GatewayWorld) -> None:
    world.kernel.paused = True

    async def main() -> None:
        async with AsyncClient(world.path) as client:
            asked = asyncio.create_task(client.samples("abc", 4))
            await until(lambda: sum(seq.generating for seq in world.kernel.sequences.values()) == 4)
            victim = list(world.kernel.sequences.values())[2]
            world.thread.do(world.kernel._tell_end, victim, FinishReason.NUMERICAL_ERROR, True)
            with pytest.raises(SequenceFailed, match="numerical_error") as caught:
                await asked
            assert caught.value.rid == victim.rid
            assert not world.kernel.sequences, "all are closed before the caller goes on"

    asyncio.run(main())


def test_a_time_limit_and_a_cancellation_leave_nothing_behind(world: GatewayWorld) -> None:
    world.kernel.paused = True

    async def main() -> None:
        async with AsyncClient(world.path) as client:
            with pytest.raises(RequestTimeout):
                await client.samples("abc", 3, timeout_s=0.1)
            assert not world.kernel.sequences
            asked = asyncio.create_task(client.samples("abc", 3))
            await until(lambda: sum(seq.generating for seq in world.kernel.sequences.values()) == 3)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert not world.kernel.sequences

    asyncio.run(main())


def test_a_cancellation_while_the_first_is_still_being_made(
    world: GatewayWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn = AsyncClient.spawn

    async def main() -> None:
        asking, gate = asyncio.Event(), asyncio.Event()

        async def slow(client: AsyncClient, *args: Any, **options: Any) -> AsyncSequence:
            asking.set()
            await gate.wait()
            return await spawn(client, *args, **options)

        monkeypatch.setattr(AsyncClient, "spawn", slow)
        async with AsyncClient(world.path) as client:
            asked = asyncio.create_task(client.samples("abc", 3))
            await asking.wait()
            asked.cancel()
            asyncio.get_running_loop().call_later(0.02, gate.set)
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert not world.kernel.sequences
            assert len(world.kernel.ended) == 3

    asyncio.run(main())


def test_an_interrupted_caller_leaves_nothing_behind(world: GatewayWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C arrives in the thread that waits; what was made is closed before it goes on."""
    world.kernel.paused = True
    with Client(world.path) as client:

        def interrupted(*_: object) -> None:
            wait_until(lambda: sum(seq.generating for seq in world.kernel.sequences.values()) == 2)
            raise KeyboardInterrupt

        monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.samples("abc", 2)
        monkeypatch.undo()
        assert not world.kernel.sequences


@pytest.mark.parametrize(
    ("n", "options", "field"),
    [
        (0, {}, "n"), (257, {}, "n"), ("4", {}, "n"), (2, {"top_p": 2}, "top_p"), (2, {"nice": 20}, "nice"),
        (2, {"client_request_id": "a"}, "client_request_id"), (2, {"after": 0}, "after"), (2, {"timeout_s": 0}, "timeout_s"),
    ],
)  # fmt: skip
def test_bad_arguments_make_nothing(world: GatewayWorld, tap: Wiretap, n: int, options: dict, field: str) -> None:
    with Client(world.path) as client:
        with pytest.raises(InvalidRequest) as caught:
            client.samples("abc", n, **options)
        assert caught.value.field == field
        with pytest.raises(InvalidRequest, match="empty"):
            client.samples("", 2)
    assert tap.sent == []
