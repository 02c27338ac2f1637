"""Both clients against a real gateway between fakes, and against a scripted gateway that misbehaves."""

from __future__ import annotations

import asyncio
import gc
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_world import DEADLINE_S, GatewayWorld, LoopThread, until, usage, wait_until

from llmos import AsyncClient, Client, SamplingParams
from llmos.codes import FinishReason
from llmos.errors import (
    DaemonNotRunning,
    InvalidRequest,
    LlmosError,
    ProtocolError,
    RequestTimeout,
    SequenceFailed,
    Unavailable,
    VersionMismatch,
)
from llmos.ports.aio import AsyncListener
from llmos.ports.core import Peer
from llmos.ports.endpoint import RunDir
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema


@pytest.fixture
def world() -> Iterator[GatewayWorld]:
    with GatewayWorld() as running:
        yield running


def test_generate_from_text_tokens_and_chat(world: GatewayWorld) -> None:
    with Client(world.path, model="echo") as client:
        assert client.generate("abc", max_tokens=5).text == "abcab"
        assert client.generate([97, 98], params=SamplingParams(max_tokens=3)).token_ids == (97, 98, 97)
        done = client.generate([{"role": "user", "content": "hi"}], max_tokens=8)
        assert (str(done), done.finish_reason, done.model) == ("user:hi\n", "length", "echo")
        assert done.usage.prompt_tokens == 8


def test_streams_are_iterators_with_a_completion(world: GatewayWorld) -> None:
    with Client(world.path) as client:
        stream = client.generate("abcdef", max_tokens=10, stream=True)
        with pytest.raises(InvalidRequest, match="not read to its end"):
            _ = stream.completion
        chunks = list(stream)
        assert [(chunk.offset, chunk.token_ids) for chunk in chunks if chunk.token_ids] == [
            (0, (97, 98, 99)),
            (3, (100, 101, 102)),
            (6, (97, 98, 99)),
            (9, (100,)),
        ]
        assert "".join(map(str, chunks)) == stream.completion.text == "abcdefabcd"
        assert list(stream) == []


def leave_by_close(client: Client) -> None:
    stream = client.generate("abc", stream=True)
    next(stream)
    stream.close()
    assert list(stream) == []


def leave_by_block(client: Client) -> None:
    with client.generate("abc", stream=True) as stream:
        next(stream)


def leave_by_exception(client: Client) -> None:
    with pytest.raises(ZeroDivisionError), client.generate("abc", stream=True) as stream:  # noqa: PT012
        next(stream)
        raise ZeroDivisionError


def leave_by_break(client: Client) -> None:
    for _ in client.generate("abc", stream=True):
        break
    gc.collect()


@pytest.mark.parametrize("leave", [leave_by_close, leave_by_block, leave_by_exception, leave_by_break])
def test_leaving_a_stream_early_cancels_its_sequence(world: GatewayWorld, leave: Callable[[Client], None]) -> None:
    world.kernel.window = 6  # it can not end by itself
    with Client(world.path) as client:
        leave(client)
        wait_until(lambda: any(isinstance(message, m.SeqCancel) for message in world.kernel.seen))
        wait_until(lambda: not world.kernel.sequences)
        assert client.generate("still good", max_tokens=5).text == "still"


def test_a_stream_that_nobody_takes_is_cancelled(world: GatewayWorld) -> None:
    world.kernel.paused = True
    with Client(world.path) as client:
        client.generate("abc", stream=True)
        gc.collect()
        assert client.tokenize("x").ids == (120,), "what was sent before has arrived"
        wait_until(lambda: len(world.gateway.router) == 0)
        assert not world.kernel.sequences


def test_32_threads_share_a_client(world: GatewayWorld) -> None:
    answers: dict[int, str] = {}
    with Client(world.path) as client:

        def work(i: int) -> None:
            answers[i] = client.generate(f"thread {i:02d}|", max_tokens=30 + i).text

        threads = [threading.Thread(target=work, args=(i,)) for i in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert answers == {i: (f"thread {i:02d}|" * 8)[: 30 + i] for i in range(32)}


def test_control_calls(world: GatewayWorld) -> None:
    with Client(world.path) as client:
        assert client.tokenize("ab").ids == (97, 98)
        assert client.tokenize([{"role": "u", "content": "x"}]).pieces == ("u", ":", "x", "\n")
        assert client.models()[0].name == "echo"
        assert client.status().lanes[0].pages_total == 64
        assert client.ps() == ()
        for rid in (0, -1, "5", True, 2**63):
            with pytest.raises(InvalidRequest) as caught:
                client.kill(rid)  # type: ignore[arg-type]
            assert caught.value.field == "rid"


def test_time_limits(world: GatewayWorld) -> None:
    world.kernel.paused = True
    with Client(world.path, timeout_s=0.05) as client:
        with pytest.raises(RequestTimeout, match=r"0\.05 s"):
            client.generate("abc")
        with pytest.raises(RequestTimeout, match=r"0\.1 s"):
            list(client.generate("abc", stream=True, timeout_s=0.1))
        wait_until(lambda: len(world.gateway.router) == 0, "both are cancelled")
        with pytest.raises(InvalidRequest, match="timeout_s"):
            client.generate("abc", timeout_s=-1)


def test_a_closed_client_says_so(world: GatewayWorld) -> None:
    world.kernel.paused = True
    client = Client(world.path)
    failures: list[LlmosError] = []

    def wait() -> None:
        try:
            client.generate("abc")
        except LlmosError as error:
            failures.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    stream = client.generate("abc", stream=True)
    wait_until(lambda: len(world.kernel.sequences) == 2)
    client.close()
    client.close()
    waiting.join(DEADLINE_S)
    assert [type(error) for error in failures] == [Unavailable]
    with pytest.raises(Unavailable):
        list(stream)
    for use in (lambda: client.generate("abc"), lambda: client.generate("abc", stream=True), client.ps):
        with pytest.raises(Unavailable, match="client is closed"):
            use()


def test_a_forgotten_client_closes_itself(world: GatewayWorld) -> None:
    before = threading.active_count()
    client = Client(world.path)
    client.generate("a", max_tokens=1)
    assert threading.active_count() == before + 1
    del client
    gc.collect()
    wait_until(lambda: threading.active_count() == before)


@pytest.mark.parametrize("stale", [False, True])
def test_without_a_daemon(stale: bool, tmp_path: Path) -> None:
    path = Path(tempfile.mkdtemp(prefix="llmos-none-"))
    if stale:  # a socket file that nobody listens on
        import socket

        with socket.socket(socket.AF_UNIX) as left_over:
            left_over.bind(str(path / "client.sock"))
    with Client(path) as client:
        started = time.monotonic()
        with pytest.raises(DaemonNotRunning) as caught:
            client.generate("abc")
        with pytest.raises(DaemonNotRunning):
            list(client.generate("abc", stream=True))
        assert time.monotonic() - started < 2
    assert str(caught.value) == f"llmosd is not running on {path}; start it with: llmosd (or: make run)"
    shutil.rmtree(path)


def test_async_client(world: GatewayWorld) -> None:
    async def main() -> None:
        async with AsyncClient(world.path) as client:
            done = await client.generate("abc", max_tokens=5)
            assert done.text == "abcab"
            text = ""
            async for chunk in client.generate("xyz", max_tokens=200, stream=True):
                text += chunk.text
            assert text == ("xyz" * 67)[:200]
            many = [client.generate(f"n{i}", max_tokens=20) for i in range(8)]
            answers = [completion.text for completion in await asyncio.gather(*many)]
            assert answers == [(f"n{i}" * 10)[:20] for i in range(8)]
            assert (await client.ps()) == ()
            with pytest.raises(InvalidRequest, match="did you mean 'stop'"):
                client.generate("x", stopp="a")

    asyncio.run(main())


def test_async_stream_left_early_cancels(world: GatewayWorld) -> None:
    world.kernel.window = 6  # no sequence can end by itself

    async def read_all(client: AsyncClient) -> None:
        async for _ in client.generate("abc", stream=True):
            pass

    async def main() -> None:
        async with AsyncClient(world.path) as client:
            async with client.generate("abc", stream=True) as stream:
                await stream.__anext__()
            async for _ in client.generate("abc", stream=True):
                break
            gc.collect()
            await until(lambda: not world.kernel.sequences)
            task = asyncio.create_task(read_all(client))
            await until(lambda: world.kernel.sequences)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await until(lambda: not world.kernel.sequences)

    asyncio.run(main())
    assert sum(isinstance(message, m.SeqCancel) for message in world.kernel.seen) == 3


class ScriptedGateway:
    """Answers each Generate with what the test wrote. In a thread, on a private run directory."""

    def __init__(self, *answers: Callable[[m.Generate], m.Message]) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="llmos-sg-"))
        self.thread = LoopThread()
        self.answers = answers
        self.seen: list[Any] = []

    def __enter__(self) -> ScriptedGateway:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.do(self.listener.close)
        self.thread.stop()
        shutil.rmtree(self.path)

    def start(self) -> None:
        schema: Schema[Any] = Schema(m.ClientToGateway)
        roles = frozenset({"client"})
        self.listener = self.thread.do(lambda: AsyncListener(RunDir(self.path), "client", schema, roles))
        self.task = self.thread.spawn(self._serve())

    def die(self) -> None:
        async def die() -> None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
            self.listener.close()

        self.thread.call(die())

    async def _serve(self) -> None:
        while True:
            peer, message = await self.listener.receive()
            self.seen.append(message)
            if isinstance(message, m.Generate):
                self._answer(peer, message)

    def _answer(self, peer: Peer, message: m.Generate) -> None:
        for make in self.answers:
            self.listener.send(peer, make(message))


def accepted(request: m.Generate) -> m.Message:
    return m.Accepted(request.req, 70, "demo", 3)


def tokens(offset: int, text: str) -> Callable[[m.Generate], m.Message]:
    return lambda request: m.Tokens(request.req, offset, tuple(text.encode()), text)


def test_without_reconnection_a_gateway_that_dies_fails_all_waiters_and_a_new_one_serves() -> None:
    with ScriptedGateway(accepted, tokens(0, "ab")) as gateway, Client(gateway.path, reconnect_s=0) as client:
        streams = [client.generate("x", stream=True) for _ in range(3)]
        assert [next(stream).text for stream in streams] == ["ab"] * 3
        gateway.die()
        for stream in streams:
            with pytest.raises(Unavailable, match="was lost"):
                next(stream)
        with pytest.raises(DaemonNotRunning):
            client.generate("x")
        gateway.answers = (
            accepted,
            tokens(0, "new"),
            lambda request: m.Finished(request.req, 70, FinishReason.STOP, "", usage(1, 3)),
        )
        gateway.start()
        assert client.generate("x").text == "new"


def test_what_arrived_before_the_death_counts() -> None:
    def finished(request: m.Generate) -> m.Message:
        return m.Finished(request.req, 70, FinishReason.STOP, "!", usage(1, 2))

    with ScriptedGateway(accepted, tokens(0, "ab"), finished) as gateway, Client(gateway.path) as client:
        stream = client.generate("x", stream=True)
        assert next(stream).text == "ab"
        wait_until(lambda: stream._queue.qsize() == 2)  # the last chunk and the completion have arrived, unread
        gateway.die()
        assert [chunk.text for chunk in stream] == ["!"]
        assert stream.completion.text == "ab!"


def test_a_gap_from_the_gateway_is_a_protocol_error() -> None:
    with ScriptedGateway(accepted, tokens(0, "ab"), tokens(5, "c")) as gateway, Client(gateway.path) as client:
        with pytest.raises(ProtocolError, match="offset 5, expected 2"):
            client.generate("x")
        wait_until(lambda: any(isinstance(message, m.Cancel) for message in gateway.seen))


def test_a_failed_sequence_raises_typed() -> None:
    def finished(request: m.Generate) -> m.Message:
        return m.Finished(request.req, 70, FinishReason.EXECUTOR_LOST, "", usage(1, 2))

    with (
        ScriptedGateway(accepted, tokens(0, "ab"), finished) as gateway,
        Client(gateway.path) as client,
        pytest.raises(SequenceFailed, match="executor_lost after 2 tokens") as caught,
    ):
        client.generate("x")
    assert caught.value.rid == 70


def test_a_gateway_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedGateway() as gateway, Client(gateway.path) as client:
        monkeypatch.setattr("llmos.protocol.handshake.hello", lambda role, name: m.Hello(1, "0" * 16, role, name, 1))
        with pytest.raises(VersionMismatch, match="schema"):
            client.generate("x")
