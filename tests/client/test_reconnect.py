"""A gateway that dies at any message, and is started again: callers notice a pause, and nothing is lost, repeated or changed.

Each scenario runs once undisturbed, to count the gateway's messages, then once for each of them, at which the gateway dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from crash_world import CrashWorld
from gateway_world import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos import AsyncClient
from llmos.codes import SeqState
from llmos.errors import WrongState

PROMPT = "aé漢🙂b"  # characters of one to four tokens: a cut goes through the middle of them
RAW = PROMPT.encode()
Scenario = Callable[[AsyncClient, CrashWorld], Coroutine[Any, Any, Any]]


def echo(count: int, prompt: bytes = RAW) -> tuple[int, ...]:
    return tuple(prompt[i % len(prompt)] for i in range(count))


@pytest.fixture
def world() -> Iterator[CrashWorld]:
    with CrashWorld() as running:
        yield running


@pytest.fixture(scope="module")
def shared() -> Iterator[CrashWorld]:
    """For properties: each example leaves it as it was."""
    with CrashWorld() as running:
        yield running


async def read(stream: Any) -> tuple[list[int], str]:
    """All ids and the text, checked on the way."""
    ids: list[int] = []
    text = ""
    async for chunk in stream:
        assert chunk.offset == len(ids)
        ids += chunk.token_ids
        text += chunk.text
    assert (tuple(ids), text) == (stream.completion.token_ids, stream.completion.text)
    return ids, text


# ------------------------------------------------------------ scenarios


async def one_stream(client: AsyncClient, world: CrashWorld) -> None:
    ids, text = await read(client.generate(PROMPT, max_tokens=13, stream=True))
    assert (tuple(ids), text) == (echo(13), (PROMPT * 2).encode()[:13].decode(errors="replace"))


async def one_answer(client: AsyncClient, world: CrashWorld) -> None:
    done = await client.generate(PROMPT, max_tokens=11)
    assert (done.token_ids, done.text, done.finish_reason) == (echo(11), PROMPT, "length")
    assert done.usage.output_tokens == 11


async def a_stop_string(client: AsyncClient, world: CrashWorld) -> None:
    stream = client.generate(PROMPT, max_tokens=100, stop=("🙂ba", "zzz"), stream=True)
    ids, text = await read(stream)
    assert (tuple(ids), text, stream.completion.stop_string) == (echo(12), "aé漢", "🙂ba")
    assert (stream.completion.finish_reason, stream.completion.usage.output_tokens) == ("stop", 12)


async def a_conversation(client: AsyncClient, world: CrashWorld) -> None:
    async with await client.spawn("abc") as seq:
        assert await seq.append("de") == 5
        assert (await seq.generate(max_tokens=6)).text == "abcdea"
        assert await seq.append([33]) == 12
        ids, text = await read(seq.generate(max_tokens=3, stream=True))
        assert (bytes(ids), text) == (b"abc", "abc")
        assert bytes(world.kernel.sequences[seq.rid].tokens) == b"abcdeabcdea!abc"
    assert (await seq.wait()).reason == "closed"


async def an_attached_reader(client: AsyncClient, world: CrashWorld) -> None:
    seq = await client.spawn(PROMPT)
    await seq.generate(max_tokens=12)
    stream = seq.attach(5)
    pieces = [(chunk.offset, chunk.token_ids) async for chunk in stream if chunk.token_ids]
    assert [token for _, ids in pieces for token in ids] == list(echo(12)[5:])
    assert pieces[0][0] == 5
    await seq.close()


async def several_samples(client: AsyncClient, world: CrashWorld) -> None:
    answers = await client.samples("abc", 3, max_tokens=4)
    assert [answer.text for answer in answers] == ["abca"] * 3
    assert len({answer.rid for answer in answers}) == 3


async def many_verbs(client: AsyncClient, world: CrashWorld) -> None:
    seq, other = await client.spawn("abc"), await client.spawn("x")
    await seq.suspend("swap")
    assert (await seq.stat()).row.state == SeqState.SUSPENDED
    await seq.resume()
    await seq.nice(5)
    assert (await seq.explain()).nice == 5
    assert {row.rid for row in await client.ps()} >= {seq.rid, other.rid}
    assert (await client.models())[0].name == "echo"
    await other.after(seq)
    assert await client.kill(seq) == (seq.rid,)
    await other.kill()
    assert [(await each.wait()).reason for each in (seq, other)] == ["killed"] * 2
    with pytest.raises(WrongState, match=r"has ended \(killed\)"):
        await seq.append("x")


SCENARIOS = [
    one_stream, one_answer, a_stop_string, a_conversation, an_attached_reader, several_samples, many_verbs,
]  # fmt: skip


def play(scenario: Scenario, world: CrashWorld) -> None:
    async def main() -> None:
        async with AsyncClient(world.path) as client:
            await scenario(client, world)

    asyncio.run(main())


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_gateway_may_die_at_every_message(world: CrashWorld, scenario: Scenario) -> None:
    before = world.messages()
    play(scenario, world)
    messages = world.messages() - before
    assert messages > 15
    for count in range(1, messages + 1):
        world.crash_after(count)
        play(scenario, world)
        wait_until(lambda: not world.kernel.sequences, "nothing is left behind")
    assert world.deaths > messages // 2, "how many there are depends on time, and the last ones come after the end"


@settings(max_examples=25, deadline=None)
@given(
    deaths=st.lists(st.integers(1, 60), max_size=5),
    steps=st.integers(1, 5),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
)
def test_streams_are_exact_wherever_gateways_die(
    shared: CrashWorld, deaths: list[int], steps: int, counts: list[int]
) -> None:
    shared.kernel.tokens_per_step = steps
    shared.crash_after(*deaths)

    async def main() -> None:
        async with AsyncClient(shared.path) as client:
            streams = [client.generate(PROMPT, max_tokens=count, stream=True) for count in counts]
            for count, (ids, text) in zip(counts, await asyncio.gather(*map(read, streams))):
                assert (tuple(ids), text) == (echo(count), bytes(echo(count)).decode(errors="replace"))

    asyncio.run(main())
    shared.crash_after()
    wait_until(lambda: not shared.kernel.sequences)


@settings(max_examples=25, deadline=None)
@given(scenario=st.sampled_from(SCENARIOS), deaths=st.lists(st.integers(1, 40), min_size=2, max_size=6))
def test_gateways_may_die_again_while_things_are_mended(
    shared: CrashWorld, scenario: Scenario, deaths: list[int]
) -> None:
    shared.kernel.tokens_per_step = 3
    shared.crash_after(*deaths)
    play(scenario, shared)
    shared.crash_after()
    wait_until(lambda: not shared.kernel.sequences)
