"""Real processes, kill -9 while streams run: whoever reads them notices a pause, and everything is as if nobody had died."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from daemon import DEADLINE_S, FAKE, Daemon, running, wait_until

from llmos import AsyncClient, Client
from llmos.ports.endpoint import RunDir
from llmos.ports.sync import Dialer
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, pack_i32
from llmos.protocol.params import SamplingParams
from llmos.services.executor.fake import STEP_MS_VARIABLE, fake_token

pytestmark = pytest.mark.slow
VOCAB = json.loads((Path(__file__).parents[2] / "llmos/assets/demo-model/config.json").read_text())["vocab_size"]
STREAMS = 8
TOKENS = 300


@contextlib.contextmanager
def slow_daemon() -> Iterator[Daemon]:
    """One whose steps last long enough to be interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STEP_MS_VARIABLE, "4")
        with running(FAKE) as found:
            yield found


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with slow_daemon() as found:
        yield found


def child(daemon: Daemon, name: str) -> psutil.Process | None:
    """The service's process, if it has one right now."""
    try:
        return daemon.children().get(name)
    except psutil.NoSuchProcess:  # one of them has just died
        return None


def kill(daemon: Daemon, name: str, number: int = signal.SIGKILL) -> None:
    """The process is gone, or stopped, and llmosd has another one, when this returns."""
    while (victim := child(daemon, name)) is None:
        time.sleep(0.01)  # it is being started again: that it is in time others check
    victim.send_signal(number)
    wait_until(lambda: (now := child(daemon, name)) and now.pid != victim.pid, f"{name} is started again")


def expected(seed: int, prompt_len: int, count: int) -> tuple[int, ...]:
    return tuple(fake_token(seed, prompt_len + i, VOCAB) for i in range(count))


Answer = tuple[tuple[int, ...], str, str | None]  # ids, text, stop string


async def read(client: AsyncClient, index: int, stop: tuple[str, ...], progress: list[int]) -> Answer:
    """One stream to its end."""
    prompt = [index % VOCAB + 1] * (index % 5 + 1)
    stream = client.generate(prompt, stream=True, seed=index, max_tokens=TOKENS, ignore_eos=True, stop=stop)
    ids: list[int] = []
    text = ""
    async for chunk in stream:
        assert not chunk.token_ids or chunk.offset == len(ids)
        ids += chunk.token_ids
        text += chunk.text
        progress[index] = len(ids)
    done = stream.completion
    assert done.usage.output_tokens == len(ids)
    assert tuple(ids) == expected(index, len(prompt), len(ids))
    assert (len(ids) == TOKENS) == (done.stop_string is None)
    assert text == done.text
    return tuple(ids), text, done.stop_string


def all_streams(daemon: Daemon, stops: list[tuple[str, ...]], *deaths: tuple[int, tuple[str, ...]]) -> list[Answer]:
    """`deaths`: when some stream has so many tokens, these die together."""

    async def run() -> list[Answer]:
        progress = [0] * STREAMS
        async with AsyncClient(daemon.run_dir) as client:
            reading = asyncio.gather(*(read(client, index, stops[index], progress) for index in range(STREAMS)))
            for tokens, names in deaths:
                async with asyncio.timeout(DEADLINE_S):
                    while max(progress) < tokens:
                        await asyncio.sleep(0.001)
                assert not reading.done()
                await asyncio.gather(*(asyncio.to_thread(kill, daemon, name) for name in names))
            return await asyncio.wait_for(reading, DEADLINE_S)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def stops(daemon: Daemon) -> list[tuple[str, ...]]:
    """Every other stream has one, which it meets somewhere in its second half."""
    answers = all_streams(daemon, [()] * STREAMS)
    return [(text[len(text) // 2 :][:6],) if index % 2 else () for index, (_, text, _) in enumerate(answers)]


@pytest.fixture(scope="module")
def undisturbed(daemon: Daemon, stops: list[tuple[str, ...]]) -> list[Answer]:
    return all_streams(daemon, stops)


@pytest.mark.parametrize(
    "deaths",
    [
        ((20, ("tokenizer",)), (120, ("tokenizer",))),
        ((20, ("executor.demo",)), (120, ("executor.demo",))),
        ((20, ("microkernel",)), (120, ("microkernel",))),
        ((20, ("microkernel", "tokenizer")), (120, ("microkernel", "executor.demo"))),
    ],
    ids=["tokenizer", "executor", "microkernel", "pairs"],
)
def test_streams_are_as_if_nobody_had_died(daemon, stops, undisturbed, deaths) -> None:
    assert all_streams(daemon, stops, *deaths) == undisturbed


def test_a_hung_microkernel_is_a_longer_pause(daemon) -> None:
    with Client(daemon.run_dir) as client:
        stream = client.generate([1], stream=True, seed=3, max_tokens=200, ignore_eos=True)
        ids = list(next(stream).token_ids)
        kill(daemon, "microkernel", signal.SIGSTOP)
        for chunk in stream:
            ids += chunk.token_ids
    assert tuple(ids) == expected(3, 1, 200)


@pytest.mark.parametrize("victim", ["microkernel", "tokenizer", "executor.demo"])
def test_a_conversation_goes_on(victim: str) -> None:
    """Verbs right after a death, so that they wait; and an output during one. A daemon of its own: deaths in a row take longer to mend."""
    with slow_daemon() as daemon, Client(daemon.run_dir) as client:
        sequence = client.spawn([5, 6, 7])
        for turn in range(2):
            kill(daemon, victim)
            sequence.append([8, 9])
            stream = sequence.generate(stream=True, seed=turn, max_tokens=100, ignore_eos=True)
            ids = list(next(stream).token_ids)
            kill(daemon, victim)
            for chunk in stream:
                ids += chunk.token_ids
            assert tuple(ids) == expected(turn, 5 + turn * 102, 100)
        assert sequence.stat().num_tokens == 3 + 2 * 102
        sequence.close()


def test_verbs_and_waits_outlive_the_microkernel(daemon) -> None:
    with Client(daemon.run_dir) as client:
        stream = client.generate([1], stream=True, seed=4, max_tokens=4000, ignore_eos=True)
        next(stream)
        assert stream.rid is not None

        async def wait_and_kill() -> str:
            async with AsyncClient(daemon.run_dir) as other:
                waiting = asyncio.create_task(other.sequence(stream.rid).wait())
                await other.ps()  # the wait is on its way by then
                await asyncio.to_thread(kill, daemon, "microkernel")
                assert [row.rid for row in await other.ps()] == [stream.rid]
                await other.kill(stream.rid)
                return (await waiting).reason

        assert asyncio.run(wait_and_kill()) == "killed"
        for _ in stream:
            pass
        assert stream.completion.finish_reason == "killed"


class Raw:
    """A client that has no opinion: it does not come back by itself."""

    def __init__(self, daemon: Daemon) -> None:
        self.dialer: Dialer[Any] = Dialer(RunDir(daemon.run_dir), "client", Schema(m.GatewayToClient))
        self.dialer.greet("client", "raw", DEADLINE_S)

    def ask(self, message: m.Message) -> m.Accepted:
        self.dialer.send(message)
        answer = self.next()
        assert isinstance(answer, m.Accepted), answer
        return answer

    def next(self) -> Any:
        while isinstance(message := self.dialer.expect(DEADLINE_S), m.Welcome):
            pass
        return message

    def tokens(self, count: int) -> tuple[int, ...]:
        """At least so many, if the stream has them."""
        ids: tuple[int, ...] = ()
        while len(ids) < count and isinstance(message := self.next(), m.Tokens):
            ids += message.ids
        return ids


def test_after_a_gateway_died_streams_are_found_again(daemon) -> None:
    """By their number from where the client is, or under the client's own name from the beginning."""
    params = SamplingParams(seed=5, max_tokens=400, ignore_eos=True)
    generate = m.Generate(1, None, None, pack_i32([1, 2]), None, params, "found-again")
    first = Raw(daemon)
    rid = first.ask(generate).rid
    had = first.tokens(50)
    kill(daemon, "gateway")
    first.dialer.close()
    second, third = Raw(daemon), Raw(daemon)
    assert second.ask(m.Attach(9, rid, len(had))).rid == rid
    rest = second.tokens(50)
    assert had + rest == expected(5, 2, len(had) + len(rest))
    assert third.ask(generate).rid == rid
    whole = third.tokens(400)
    assert whole == expected(5, 2, 400)
    assert isinstance(third.next(), m.Finished)
    second.dialer.close()
    third.dialer.close()


def test_whoever_leaves_under_its_own_name_collects_later(daemon) -> None:
    params = SamplingParams(seed=6, max_tokens=200, ignore_eos=True)
    generate = m.Generate(1, None, None, pack_i32([3]), None, params, "collected-later")
    first = Raw(daemon)
    rid = first.ask(generate).rid
    first.tokens(1)
    first.dialer.close()
    with Client(daemon.run_dir) as client:
        assert client.sequence(rid).wait().reason == "length"
    second = Raw(daemon)
    assert second.ask(generate).rid == rid
    assert second.tokens(200) == expected(6, 1, 200)
    second.dialer.close()
