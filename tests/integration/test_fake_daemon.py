"""The whole daemon with the fake executor: every stream's right answer is known beforehand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from daemon import FAKE, running, wait_until

from llmos import AsyncClient, Client
from llmos.codes import ErrorCode
from llmos.errors import (
    ContextTooLong,
    InvalidRequest,
    LlmosError,
    NotFound,
    ProtocolError,
    VersionMismatch,
    WrongState,
)
from llmos.ports.endpoint import RunDir
from llmos.ports.sync import Dialer
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema
from llmos.protocol.handshake import hello
from llmos.services.executor.fake import fake_token

pytestmark = pytest.mark.slow
VOCAB = json.loads((Path(__file__).parents[2] / "llmos/assets/demo-model/config.json").read_text())["vocab_size"]


def expected(seed: int, prompt_len: int, count: int) -> tuple[int, ...]:
    return tuple(fake_token(seed, prompt_len + i, VOCAB) for i in range(count))


@pytest.fixture(scope="module")
def daemon():
    with running(FAKE) as found:
        yield found


async def one_stream(client: AsyncClient, index: int, count: int) -> None:
    prompt = [index % VOCAB + 1] * (index % 40 + 1)
    stream = client.generate(prompt, stream=True, seed=index, max_tokens=count, ignore_eos=True)
    ids: list[int] = []
    async for chunk in stream:
        assert chunk.offset == len(ids)
        ids += chunk.token_ids
    assert tuple(ids) == expected(index, len(prompt), count)
    assert stream.completion.usage.output_tokens == count


def test_32_concurrent_streams_are_complete_and_correct(daemon):
    async def all_streams() -> None:
        async with AsyncClient(daemon.run_dir) as client:
            await asyncio.gather(*(one_stream(client, index, 100 + index) for index in range(32)))

    asyncio.run(all_streams())


def test_same_seed_same_request_is_the_same_alone_and_in_company(daemon):
    with Client(daemon.run_dir) as client:
        first = client.generate([1, 2, 3], seed=5, max_tokens=30)
        again = client.generate([1, 2, 3], seed=5, max_tokens=30)
        other = client.generate([1, 2, 3], seed=6, max_tokens=30)
    assert first.token_ids == again.token_ids != other.token_ids


def test_ps_and_kill(daemon):
    with Client(daemon.run_dir) as client, client.generate([1, 2, 3], stream=True, max_tokens=8000) as stream:
        next(iter(stream))
        (row,) = client.ps()
        assert (row.prompt_tokens, row.model, row.rid) == (3, "demo", stream.rid)
        client.kill(row.rid)
        for _ in stream:
            pass
        assert stream.completion.finish_reason == "killed"
        wait_until(lambda: not client.ps(), "the killed sequence leaves ps")
        with pytest.raises(WrongState, match=rf"sequence {row.rid} has ended \(killed\)"):
            client.kill(row.rid)


def test_leaving_a_stream_early_cancels_it(daemon):
    with Client(daemon.run_dir) as client:
        for _ in client.generate([1, 2, 3], stream=True, max_tokens=8000):
            break
        wait_until(lambda: not client.ps(), "the abandoned sequence leaves ps")


def test_status_and_models(daemon):
    with Client(daemon.run_dir) as client:
        status, (model,) = client.status(), client.models()
    assert {service.name for service in status.services} == {
        "microkernel",
        "storage",
        "tokenizer",
        "gateway",
        "executor.demo",
    }
    (lane,) = status.lanes
    assert (lane.model, lane.ready, lane.pages_total, lane.device) == ("demo", True, 512, "fake")
    assert (model.name, model.state, model.architecture) == ("demo", "serving", "LlamaForCausalLM")


@pytest.mark.parametrize("name", ["microkernel", "gateway", "storage", "executor.demo", "tokenizer"])
def test_no_torch_where_no_tensors_are(daemon, name):
    maps = Path(f"/proc/{daemon.children()[name].pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "libpython" in maps or "python" in maps  # the map was readable at all


@pytest.mark.parametrize(
    ("arguments", "error", "field"),
    [
        ({"prompt": "hi", "model": "nope"}, NotFound, "model"),
        ({"prompt": ""}, InvalidRequest, "prompt"),
        ({"prompt": []}, InvalidRequest, "prompt"),
        ({"prompt": [1] * 5000}, ContextTooLong, "prompt"),
        ({"prompt": [VOCAB]}, InvalidRequest, "prompt"),
        ({"prompt": "a", "temperature": float("nan")}, InvalidRequest, "temperature"),
        ({"prompt": "a", "top_p": 2}, InvalidRequest, "top_p"),
        ({"prompt": "a", "max_tokens": 0}, InvalidRequest, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**12}, InvalidRequest, "max_tokens"),
        ({"prompt": "a" * 5_000_000}, InvalidRequest, "prompt"),
        ({"prompt": "\ud800"}, InvalidRequest, "prompt"),
        ({"prompt": "a", "tempratur": 1}, InvalidRequest, "tempratur"),
    ],
)
def test_bad_requests_name_their_field_and_disturb_nobody(daemon, arguments, error, field):
    with (
        Client(daemon.run_dir) as client,
        client.generate([7], stream=True, seed=3, max_tokens=200, ignore_eos=True) as stream,
    ):
        chunks = [next(iter(stream))]
        with pytest.raises(error) as caught:
            client.generate(**arguments)
        assert caught.value.field == field
        chunks += list(stream)
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == expected(3, 1, 200)


def next_but_probes(dialer: Dialer[m.Message]) -> m.Message:
    """A gateway that lost a client sends a Welcome to all, to see who else is gone."""
    while isinstance(answer := dialer.expect(10.0), m.Welcome):
        pass
    return answer


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\x92\xcd\x03\xe7\x01", ErrorCode.PROTOCOL),  # type 999
        (b"\x97\x0a\x01", ErrorCode.PROTOCOL),  # cut off
        (b"", ErrorCode.PROTOCOL),
        (b"\xc1" * 100, ErrorCode.PROTOCOL),
        (b"\x93\x0c\x01\xa1x", ErrorCode.PROTOCOL),  # a gateway's own message type
    ],
)
def test_bad_frames_get_a_typed_error_and_the_connection_lives(daemon, frame, code):
    dialer: Dialer[m.Message] = Dialer(RunDir(daemon.run_dir), "client", Schema(m.GatewayToClient))
    try:
        dialer.greet("client", "test", 5.0)
        dialer.socket.send(frame)
        answer = next_but_probes(dialer)
        assert isinstance(answer, m.Error)
        assert answer.code == code
        dialer.send(m.Tokenize(9, None, "hello", None))
        assert isinstance(next_but_probes(dialer), m.Tokenized)
    finally:
        dialer.close()


def test_wrong_schema_hash_is_refused_at_connect(daemon):
    dialer: Dialer[m.Message] = Dialer(RunDir(daemon.run_dir), "client", Schema(m.GatewayToClient))
    try:
        dialer.socket.poll(5000, 2)
        dialer.send(m.Hello(hello("client", "x").protocol, "0" * 16, "client", "x", 1))
        answer = dialer.expect(5.0)
    finally:
        dialer.close()
    assert (answer.code, answer.field) == (ErrorCode.VERSION_MISMATCH, "schema_hash")
    assert issubclass(VersionMismatch, ProtocolError)


def ctl(daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("llmosctl"), "--run-dir", str(daemon.run_dir), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_llmosctl_against_the_daemon(daemon):
    answer = ctl(daemon, "run", "hello", "--max-tokens", "5", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["usage"]["output_tokens"] == 5
    assert "demo" in ctl(daemon, "status").stdout
    missing = ctl(daemon, "kill", "123456")
    assert missing.returncode == 4
    assert "123456" in missing.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_leaves_nothing_behind(number):
    shared = set(Path("/dev/shm").iterdir())
    with running(FAKE) as daemon:
        family = [psutil.Process(daemon.process.pid), *daemon.children().values()]
        assert len(family) == 6
        with Client(daemon.run_dir) as client, client.generate([1], stream=True, max_tokens=8000) as stream:
            next(iter(stream))
            assert daemon.stop(number) == 0
            with contextlib.suppress(LlmosError):  # the stream ends with a typed reason, never with a hang
                list(stream)
        assert not psutil.wait_procs(family, 0)[1]
        assert list(daemon.run_dir.glob("*")) == []
        assert set(Path("/dev/shm").iterdir()) <= shared


def test_kill_9_of_the_executor_is_a_pause():
    # Nobody reads the streams on, so the window keeps their sequences alive until the executor is killed.
    with running(FAKE + "\n[microkernel]\nclient_window_tokens = 512\n") as daemon, Client(daemon.run_dir) as client:
        streams = [
            client.generate([index + 1], stream=True, seed=index, max_tokens=1500, ignore_eos=True)
            for index in range(4)
        ]
        begun = [list(next(iter(stream)).token_ids) for stream in streams]
        executor = daemon.children()["executor.demo"]
        executor.kill()
        for index, (stream, ids) in enumerate(zip(streams, begun)):
            for chunk in stream:
                ids += chunk.token_ids
            assert tuple(ids) == expected(index, 1, 1500)
        assert client.status().lanes[0].ready
        assert daemon.children()["executor.demo"].pid != executor.pid
        assert "executor.demo" in daemon.log


def test_kill_9_of_llmosd_takes_every_child_along():
    with running(FAKE) as daemon:
        children = list(daemon.children().values())
        daemon.process.kill()
        assert not psutil.wait_procs(children, 10)[1]


def test_second_start_is_refused_with_the_pid_of_the_first():
    with running(FAKE) as daemon:
        command = [Path(sys.executable).with_name("llmosd"), "--config", daemon.config, "--run-dir", daemon.run_dir]
        second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 73
        assert str(daemon.process.pid) in second.stderr


def test_without_configuration_there_is_no_network_port(daemon):
    assert daemon.listening() == set()
