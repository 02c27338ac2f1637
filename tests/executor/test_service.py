"""The executor process against a stand-in microkernel: registration, plans, generations, restart, stop, typed failure."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_models import make_model

from llmos.ports.endpoint import RunDir
from llmos.ports.sync import Listener
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, pack_i32, unpack_i32
from llmos.protocol.params import SamplingParams
from llmos.services.executor.fake import fake_token

pytestmark = pytest.mark.slow

DEADLINE_S = 60.0
EXIT_FAILED = 72


class Kernel:
    """The `kernel` socket, driven by the test."""

    def __init__(self, run_dir: RunDir) -> None:
        self.listener = Listener(run_dir, "kernel", Schema(m.ToKernel), frozenset({"executor"}))
        self.peer = None

    def receive(self) -> m.Message:
        deadline = time.monotonic() + DEADLINE_S
        while (found := self.listener.receive()) is None:
            assert time.monotonic() < deadline, "nothing came from the executor"
            self.listener.socket.poll(50)
        self.peer, message = found
        return message

    def send(self, message: m.Message) -> None:
        assert self.listener.send(self.peer, message)

    def welcome(self, generation: int) -> m.ExecutorReady:
        ready = self.receive()
        assert isinstance(ready, m.ExecutorReady)
        self.send(m.ExecutorWelcome(generation))
        return ready


@contextmanager
def run_dir():
    directory = Path(tempfile.mkdtemp(prefix="x"))
    try:
        yield RunDir(directory)
    finally:
        shutil.rmtree(directory)


@contextmanager
def executor(where: RunDir, config: str):
    """The process; killed at the end if it still runs."""
    path = where.path / "llmosd.toml"
    path.write_text(config)
    command = [
        sys.executable,
        "-P",
        "-m",
        "llmos.services.executor",
        "--run-dir",
        str(where.path),
        "--config",
        str(path),
    ]
    child = subprocess.Popen(
        [*command, "--model", "m", "--no-supervisor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def fake_config(where: RunDir) -> str:
    return f'[[models]]\nname = "m"\npath = "{where.path}/none"\nbackend = "fake"\nnum_pages = 64\n'


def plan(generation: int, step: int, adds=(), prefill=(), decode=(), frees=()) -> m.StepPlan:
    return m.StepPlan(generation, step, pack_i32(frees), tuple(adds), b"", pack_i32(prefill), pack_i32(decode))


def add(row: int, tokens: list[int], **params) -> m.RowAdd:
    return m.RowAdd(row, 1, pack_i32(tokens), len(tokens), 0, pack_i32([0, 1]), SamplingParams(**{"seed": 9} | params))


def test_fake_executor_serves_plans_and_survives_a_new_microkernel():
    with run_dir() as where:
        kernel = Kernel(where)
        with executor(where, fake_config(where)) as child:
            ready = kernel.welcome(7)
            assert (ready.model, ready.num_pages, ready.page_size, ready.device) == ("m", 64, 16, "fake")
            assert child.stdout.readline() == "ready executor.m\n"
            kernel.send(plan(6, 1, [add(0, [1, 2, 3])], [0, 0, 3, 1]))  # an old generation: dropped
            kernel.send(plan(7, 1, [add(0, [1, 2, 3])], [0, 0, 3, 1]))
            kernel.send(plan(7, 2, decode=[0]))  # one step ahead
            for step in (1, 2):
                result = kernel.receive()
                assert (result.generation, result.step) == (7, step)
                position = step + 2
                token = fake_token(9, position, ready.vocab_size)
                assert list(unpack_i32(result.samples)) == [0, position, token]
                assert result.busy_us >= 0
                assert result.idle_us >= 0
            peer = kernel.peer
            kernel.listener.core.forget(peer)  # as a restarted microkernel does not know it
            kernel.send(plan(7, 3, decode=[0]))
            again = kernel.welcome(8)
            assert again == ready
            kernel.send(plan(8, 1, [add(0, [5])], [0, 0, 1, 1]))
            assert list(unpack_i32(kernel.receive().samples)) == [0, 1, fake_token(9, 1, ready.vocab_size)]
            child.send_signal(signal.SIGTERM)
            assert child.wait(DEADLINE_S) == 0
        kernel.listener.close()


def test_cpu_executor_serves_a_model():
    with run_dir() as where:
        make_model("llama-tied", where.path / "model")
        config = (
            f'[[models]]\nname = "m"\npath = "{where.path}/model"\nnum_pages = 9\nthreads = 1\nhost_cache_gib = 0.001\n'
        )
        kernel = Kernel(where)
        with executor(where, config) as child:
            ready = kernel.welcome(1)
            assert (ready.num_pages, ready.max_context, ready.vocab_size) == (9, 9 * 16, 160)
            assert (ready.dtype, ready.device) == ("float32", "cpu")
            assert ready.host_pages == int(0.001 * 2**30) // (3 * 2 * 2 * 16 * 16 * 4)
            assert ready.swap_us > 0
            kernel.send(plan(1, 1, [add(0, [1, 2, 3], logprobs=2)], [0, 0, 3, 1]))
            result = kernel.receive()
            row, position, token = unpack_i32(result.samples)
            assert (row, position) == (0, 3)
            assert 0 <= token < 160
            assert len(result.logprobs[0].logprobs.top_ids) == 2
            assert result.busy_us > 0
            child.send_signal(signal.SIGINT)
            assert child.wait(DEADLINE_S) == 0
            log = child.stderr.read()
        assert "of 30 tensors" in log or "of 29 tensors" in log, "a progress line while loading"
        kernel.listener.close()


def test_a_broken_model_directory_ends_the_process_with_a_typed_error():
    with run_dir() as where:
        make_model("llama-tied", where.path / "model")
        (where.path / "model" / "model.safetensors").unlink()
        with executor(where, f'[[models]]\nname = "m"\npath = "{where.path}/model"\n') as child:
            _, log = child.communicate(timeout=DEADLINE_S)
            assert child.returncode == EXIT_FAILED
            assert "neither model.safetensors nor model.safetensors.index.json is there" in log
            assert "Traceback" not in log


def test_no_microkernel_is_a_typed_error():
    with run_dir() as where, executor(where, "[daemon]\nstart_timeout_s = 0.2\n" + fake_config(where)) as child:
        _, log = child.communicate(timeout=DEADLINE_S)
        assert child.returncode == EXIT_FAILED
        assert "nobody listens on" in log
