"""Sequence objects of the asyncio client: the same verbs, with `await`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from gateway_world import GatewayWorld, until
from wiretap import Wiretap

from llmos import AsyncClient, AsyncSequence
from llmos.codes import PageFate, SeqState
from llmos.errors import InvalidRequest, NotFound, RequestTimeout, WrongState
from llmos.protocol import messages as m


@pytest.fixture
def world() -> Iterator[GatewayWorld]:
    with GatewayWorld() as running:
        yield running


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch) -> Wiretap:
    return Wiretap(monkeypatch)


def drive(world: GatewayWorld, script: Callable[[AsyncClient], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with AsyncClient(world.path) as client:
            await script(client)

    asyncio.run(main())


def test_a_conversation_with_forks(world: GatewayWorld) -> None:
    async def script(client: AsyncClient) -> None:
        async with await client.spawn("abc", nice=2) as seq:
            kids = await seq.fork(4)
            assert [type(kid) for kid in kids] == [AsyncSequence] * 4
            answers = await asyncio.gather(*(kid.generate(max_tokens=4) for kid in kids))
            assert [str(answer) for answer in answers] == ["abca"] * 4
            assert await seq.append("d") == 4
            text = ""
            async for chunk in seq.generate(stream=True, max_tokens=6):
                text += chunk.text
            assert text == "abcdab"
            async with seq.attach(4) as again:
                assert again.sequence is seq
                assert [chunk.text async for chunk in again] == ["ab"]
        assert (await seq.wait()).reason == "closed"
        assert repr(seq) == f"<AsyncSequence {seq.rid}>"
        with pytest.raises(WrongState):
            await seq.close()

    drive(world, script)


def test_every_verb(world: GatewayWorld, tap: Wiretap) -> None:
    world.kernel.paused = True

    async def script(client: AsyncClient) -> None:
        other, made = await client.spawn("x"), await client.spawn("abc")
        seq = client.sequence(made.rid)
        stream = made.generate(stream=True)
        await until(lambda: world.kernel.sequences[made.rid].generating)
        tap.sent.clear()
        await seq.suspend("swap")
        assert (await seq.stat()).row.state == SeqState.SUSPENDED
        await seq.resume()
        await seq.nice(5)
        await seq.deadline(1.5)
        await other.after(made)
        assert (await seq.explain()).nice == 5
        with pytest.raises(RequestTimeout):
            await seq.wait(timeout_s=0.02)
        await seq.kill()
        assert (await seq.wait()).reason == "killed"
        assert [chunk async for chunk in stream] == []
        rid = made.rid
        assert tap.sent == [
            m.Suspend(1, rid, PageFate.SWAP), m.Stat(2, rid), m.Resume(3, rid), m.Nice(4, rid, 5),
            m.Deadline(5, rid, 1500.0), m.After(6, other.rid, (rid,)), m.Explain(7, rid), m.Wait(8, rid), m.Cancel(8),
            m.Kill(9, rid), m.Wait(10, rid),
        ]  # fmt: skip
        with pytest.raises(InvalidRequest):
            seq.generate(temperature=-1)
        with pytest.raises(NotFound):
            await client.sequence(4711).append("x")

    drive(world, script)


def test_many_wait_at_once(world: GatewayWorld) -> None:
    async def script(client: AsyncClient) -> None:
        made = [await client.spawn("abc", parent=parent) for parent in (None, None)]
        waiting = asyncio.gather(*(client.sequence(seq.rid).wait() for seq in made for _ in range(3)))
        await until(lambda: sum(isinstance(message, m.Wait) for message in world.kernel.controls) == 2)
        assert await client.kill(model="echo") == tuple(seq.rid for seq in made)
        assert [(ending.rid, ending.reason) for ending in await waiting] == [
            (seq.rid, "killed") for seq in made for _ in range(3)
        ]

    drive(world, script)


def test_a_stream_left_by_its_task(world: GatewayWorld, tap: Wiretap) -> None:
    """A cancelled task ends the output it asked for, not what it is only attached to."""
    world.kernel.paused = True

    async def read(stream: Any) -> None:
        async for _ in stream:
            pass

    async def leave(stream: Any) -> None:
        task = asyncio.create_task(read(stream))
        await until(lambda: len(tap.of(m.Continue, m.Attach)) > 0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def script(client: AsyncClient) -> None:
        seq = await client.spawn("abc")
        await leave(seq.generate(stream=True))
        await until(lambda: len(tap.of(m.Cancel)) == 1)
        await until(lambda: not world.kernel.sequences[seq.rid].generating)
        first = seq.generate(stream=True, max_tokens=3)
        await until(lambda: world.kernel.sequences[seq.rid].generating)
        tap.sent.clear()
        await leave(seq.attach())
        world.kernel.paused = False
        await until(lambda: not world.kernel.sequences[seq.rid].generating)
        assert tap.of(m.Cancel) == []
        await first.aclose()

    drive(world, script)
