"""The child's end of the supervisor port: both lifelines against a real listener, and without a supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

from llmos.errors import DaemonNotRunning, ModelError, ProtocolError
from llmos.ports import lifeline
from llmos.ports.async_lifeline import AsyncLifeline
from llmos.ports.endpoint import RunDir
from llmos.ports.lifeline import Lifeline
from llmos.ports.sync import Listener
from llmos.protocol.codec import Schema
from llmos.protocol.messages import Heartbeat, ServiceFailed, ServiceReady, Stop, ToSupervisor

DEADLINE_S = 30.0


@pytest.fixture
def run_dir():
    """A short folder: socket paths are limited."""
    with tempfile.TemporaryDirectory(prefix="llmos-") as folder:
        yield RunDir(Path(folder))


@pytest.fixture
def _own_signals():
    """Lifelines take over SIGTERM and SIGINT; give them back."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


class FakeSupervisor:
    """A supervisor port served by a thread; answers ServiceFailed with Stop, as the real one does."""

    def __init__(self, run_dir, *, stop_on=(ServiceFailed,)):
        self.listener = Listener(run_dir, "supervisor", Schema(ToSupervisor), frozenset({"storage"}))
        self.got = []
        self._stop_on = stop_on
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._end.set()
        self._thread.join()
        self.listener.close()

    def _serve(self):
        while not self._end.is_set():
            self.listener.socket.poll(10)
            while (received := self.listener.receive()) is not None:
                peer, message = received
                self.got.append(message)
                if isinstance(message, self._stop_on):
                    self.listener.send(peer, Stop())

    def wait_for(self, kind):
        return wait_until(lambda: next((message for message in self.got if isinstance(message, kind)), None))


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError("nothing came in time")


@pytest.mark.usefixtures("_own_signals")
def test_ready_beats_and_stop(run_dir):
    with FakeSupervisor(run_dir, stop_on=(ServiceReady,)) as supervisor:
        line = Lifeline(run_dir, "storage", "storage")
        line.connect(DEADLINE_S)
        line.beat(1, 100.0)
        line.beat(2, 100.2)  # too early
        line.beat(3, 100.25)
        assert line.stopping is False
        line.ready("3 models")
        wait_until(lambda: line.poll() or line.stopping)
        supervisor.wait_for(ServiceReady)
        line.close()
    expected = [Heartbeat("storage", 1), Heartbeat("storage", 3), ServiceReady("storage", os.getpid(), "3 models")]
    assert supervisor.got == expected


@pytest.mark.usefixtures("_own_signals")
def test_poll_reads_stop(run_dir):
    with FakeSupervisor(run_dir, stop_on=(Heartbeat,)):
        line = Lifeline(run_dir, "storage", "storage")
        line.connect(DEADLINE_S)
        line.beat(1, 0.0)
        wait_until(lambda: line.poll() or line.stopping)
        line.close()


@pytest.mark.usefixtures("_own_signals")
def test_a_failure_arrives_before_the_process_goes(run_dir, monkeypatch):
    monkeypatch.setattr(lifeline, "FAILED_ACK_S", 1000.0)
    with FakeSupervisor(run_dir) as supervisor:
        line = Lifeline(run_dir, "storage", "storage")
        line.connect(DEADLINE_S)
        line.failed(ModelError("no weights", field="models.path"))  # returns by the acknowledgement
        line.close()
        assert supervisor.got == [ServiceFailed("storage", 13, "no weights", "models.path")]


@pytest.mark.usefixtures("_own_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_ask_to_stop(run_dir, number):
    line = Lifeline(run_dir, "storage", "storage", supervised=False)
    line.connect(0)
    os.kill(os.getpid(), number)
    assert line.stopping is True
    line.close()


@pytest.mark.usefixtures("_own_signals")
def test_without_a_supervisor(run_dir, capsys):
    line = Lifeline(run_dir, "storage", "s1", supervised=False)
    line.connect(0)
    line.ready("anything")
    line.beat(1, 0.0)
    line.poll()
    line.failed(ModelError("x"))
    line.close()
    assert capsys.readouterr().out == "ready s1\n"


@pytest.mark.usefixtures("_own_signals")
def test_connect_fails_with_a_type(run_dir):
    line = Lifeline(run_dir, "storage", "storage")
    with pytest.raises(DaemonNotRunning):
        line.connect(0.05)
    line.close()
    with FakeSupervisor(run_dir):
        line = Lifeline(run_dir, "client", "stranger")
        with pytest.raises(ProtocolError, match="role 'client' is not accepted"):
            line.connect(DEADLINE_S)
        line.close()


def run_async(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, DEADLINE_S))


def test_async_ready_beats_and_stop(run_dir):
    async def life():
        line = AsyncLifeline(run_dir, "storage", "storage")
        await line.connect(DEADLINE_S)
        line.ready("listening")
        await line.stop.wait()
        assert line.stopping
        await line.close()

    with FakeSupervisor(run_dir, stop_on=(ServiceReady,)) as supervisor:
        run_async(life())
        assert supervisor.wait_for(ServiceReady) == ServiceReady("storage", os.getpid(), "listening")
        assert supervisor.wait_for(Heartbeat) == Heartbeat("storage", 1)


def test_async_failure_arrives_before_the_process_goes(run_dir):
    async def life():
        line = AsyncLifeline(run_dir, "storage", "storage")
        await line.connect(DEADLINE_S)
        await line.failed(ModelError("no tokenizer.json"))
        await line.close()

    with FakeSupervisor(run_dir) as supervisor:
        run_async(life())
        assert supervisor.wait_for(ServiceFailed) == ServiceFailed("storage", 13, "no tokenizer.json", None)


def test_async_signals_ask_to_stop(run_dir, capsys):
    async def life():
        line = AsyncLifeline(run_dir, "storage", "s1", supervised=False)
        await line.connect(0)
        line.ready("x")
        os.kill(os.getpid(), signal.SIGTERM)
        await line.stop.wait()
        await line.close()

    run_async(life())
    assert capsys.readouterr().out == "ready s1\n"
