"""A real daemon whose gateway is killed or stopped in the middle of things: the SDK's callers notice a pause and nothing else."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from daemon import FAKE, Daemon, running

from llmos import AsyncClient, AsyncSequence, Client
from llmos.errors import DaemonNotRunning
from llmos.services.executor.fake import fake_token

pytestmark = pytest.mark.slow
VOCAB = json.loads((Path(__file__).parents[2] / "llmos/assets/demo-model/config.json").read_text())["vocab_size"]
STREAMS, TOKENS = 8, 300
HANGS_SOON = FAKE + "\n[daemon]\nhang_timeout_s = 1.0\n"


def expected(seed: int, position: int, count: int) -> tuple[int, ...]:
    return tuple(fake_token(seed, position + i, VOCAB) for i in range(count))


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there is a middle of things: an answer takes two seconds."""
    monkeypatch.setenv("LLMOS_FAKE_STEP_MS", "7")


@asynccontextmanager
async def killing(daemon: Daemon, *, times: int) -> AsyncIterator[list[int]]:
    """Kill the gateway, each time a moment after the one before is gone; gives the pids as they die."""
    rng, killed = random.Random(4), []

    async def kill() -> None:
        for _ in range(times):
            await asyncio.sleep(rng.uniform(0.1, 0.4))
            gateway = await serving(daemon)
            gateway.kill()
            killed.append(gateway.pid)

    task = asyncio.create_task(kill())
    try:
        yield killed
        await task
    finally:
        task.cancel()


async def serving(daemon: Daemon) -> Any:
    """The gateway's process, once it lets clients in."""
    async with AsyncClient(daemon.run_dir) as client:
        await client.ps()
    return daemon.children()["gateway"]


async def read(client: AsyncClient, index: int) -> str:
    """One stream, checked; returns its text."""
    prompt = [index + 1] * (index + 3)
    stream = client.generate(prompt, stream=True, seed=index, max_tokens=TOKENS, ignore_eos=True)
    ids: list[int] = []
    text = ""
    async for chunk in stream:
        assert chunk.offset == len(ids)
        ids += chunk.token_ids
        text += chunk.text
    assert tuple(ids) == stream.completion.token_ids == expected(index, len(prompt), TOKENS)
    assert text == stream.completion.text
    assert stream.completion.usage.output_tokens == TOKENS
    return text


async def read_all(client: AsyncClient) -> list[str]:
    return await asyncio.gather(*(read(client, index) for index in range(STREAMS)))


async def converse(seq: AsyncSequence, seed: int, turns: int) -> None:
    """Input and output in turns; each token of the fake model depends on its place, so a lost or repeated input would show."""
    length = (await seq.stat()).num_tokens
    for turn in range(turns):
        length += 3
        assert await seq.append([5, 6, 7]) == length
        done = await seq.generate(seed=seed + turn, max_tokens=20, ignore_eos=True)
        assert done.token_ids == expected(seed + turn, length, 20)
        length += 20


@pytest.mark.usefixtures("slow_steps")
def test_streams_survive_kill_9_of_the_gateway():
    async def script(daemon: Daemon) -> None:
        async with AsyncClient(daemon.run_dir) as client:
            calm = await read_all(client)
            async with killing(daemon, times=4) as killed:
                assert await read_all(client) == calm
            assert len(set(killed)) == 4
            assert await client.ps() == ()

    with running(FAKE) as daemon:
        asyncio.run(script(daemon))


@pytest.mark.usefixtures("slow_steps")
def test_conversations_and_samples_survive_kill_9_of_the_gateway():
    async def script(daemon: Daemon) -> None:
        async with AsyncClient(daemon.run_dir) as client, killing(daemon, times=4):
            made = await asyncio.gather(*(client.spawn([index + 1]) for index in range(4)))
            await asyncio.gather(*(converse(seq, 100 * index, 12) for index, seq in enumerate(made)))
            answers = await client.samples([1, 2, 3], 4, seed=7, max_tokens=50, ignore_eos=True)
            assert [answer.token_ids for answer in answers] == [expected(7 + i, 3, 50) for i in range(4)]
            assert [await client.kill(seq) for seq in made] == [(seq.rid,) for seq in made]
            assert await client.ps() == ()

    with running(FAKE) as daemon:
        asyncio.run(script(daemon))


@pytest.mark.usefixtures("slow_steps")
def test_a_gateway_that_hangs_is_replaced_and_nothing_is_lost():
    async def script(daemon: Daemon) -> None:
        async with AsyncClient(daemon.run_dir) as client:
            calm = await read_all(client)
            reading = asyncio.create_task(read_all(client))
            await asyncio.sleep(0.3)
            gateway = await serving(daemon)
            gateway.send_signal(signal.SIGSTOP)
            assert await reading == calm
            assert (await serving(daemon)).pid != gateway.pid

    with running(HANGS_SOON) as daemon:
        asyncio.run(script(daemon))


@pytest.mark.usefixtures("slow_steps")
def test_llmosctl_goes_on_with_its_answer():
    command = [
        Path(sys.executable).with_name("llmosctl"),
        "run",
        "--raw",
        "hello",
        "--seed",
        "5",
        "--max-tokens",
        "250",
        "--ignore-eos",
    ]
    with running(FAKE) as daemon:
        arguments = [*command, "--run-dir", daemon.run_dir]
        calm = subprocess.run(arguments, capture_output=True, timeout=60, check=True).stdout
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as answer:
            assert answer.stdout is not None
            assert answer.stderr is not None
            begun = answer.stdout.read(20)
            daemon.children()["gateway"].kill()
            assert begun + answer.stdout.read() == calm
            assert b"lost" not in answer.stderr.read()
        assert answer.returncode == 0


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_streams_survive_a_restart_of_the_whole_daemon(number: signal.Signals):
    async def script(daemon: Daemon) -> None:
        async with AsyncClient(daemon.run_dir) as client:
            calm = await read_all(client)
            seq = await client.spawn([1, 2])
            reading = asyncio.gather(read_all(client), converse(seq, 50, 8))
            await asyncio.sleep(0.7)
            await asyncio.to_thread(daemon.stop, number)
            assert not reading.done()
            await asyncio.to_thread(daemon.start_again)
            texts, _ = await reading
            assert texts == calm
            await seq.close()

    with running(FAKE + "\n[daemon]\ndrain_s = 0.0\n") as daemon:
        asyncio.run(script(daemon))


def test_a_daemon_that_was_killed_is_not_waited_for_by_who_comes_later():
    with running(FAKE) as daemon, Client(daemon.run_dir, reconnect_s=0.5) as client:
        client.ps()
        daemon.process.kill()
        daemon.process.wait()
        with pytest.raises(DaemonNotRunning):
            client.ps()
        with Client(daemon.run_dir) as later, pytest.raises(DaemonNotRunning):
            later.ps()
