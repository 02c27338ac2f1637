"""What the service manager is told: the datagrams, with a real socket."""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
from standin_daemon import start, wait_for

from llmos.codes import ServiceState
from llmos.protocol.messages import ServiceStatus
from llmos.supervisor.notify import Notifier, status_line

__all__ = ["start"]


class Manager:
    """The manager's end. It reads at once, as a manager does: few datagrams fit into the socket."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self._words = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self):
        while word := self.socket.recv(4096):
            self._words.put(word.decode())

    def heard(self, *, beats=True):
        """What came since the last call."""
        words = []
        while not self._words.empty():
            words.append(self._words.get())
        return [word for word in words if beats or word != "WATCHDOG=1"]

    def all_words(self, **options):
        """The rest, when nobody says anything any more."""
        self.close()
        return self.heard(**options)

    def close(self):
        """Everything that was sent before has been read."""
        if not self._thread.is_alive():
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self.socket.getsockname())
        self._thread.join()
        self.socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    name = f"\0llmos-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    found = Manager(name)
    found.name = name.replace("\0", "@")
    yield found
    found.close()


def test_what_is_said(manager):
    environment = {
        "NOTIFY_SOCKET": manager.name,
        "WATCHDOG_USEC": "3000000",
        "WATCHDOG_PID": str(os.getpid()),
        "A": "b",
    }
    notifier = Notifier(environment)
    assert environment == {"A": "b"}  # children get none of it
    assert notifier.interval_s == 1.5
    notifier.status("starting\n demo")
    notifier.status("starting demo")
    notifier.ready()
    for now in (10.0, 10.1, 11.4, 11.5, 11.6):
        notifier.beat(now)
    notifier.stopping()
    notifier.close()
    notifier.ready()
    assert manager.all_words() == ["STATUS=starting demo", "READY=1", "WATCHDOG=1", "WATCHDOG=1", "STOPPING=1"]


@pytest.mark.parametrize("limits", [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"}])
def test_no_signs_of_life_unless_asked_for(manager, limits):
    notifier = Notifier({"NOTIFY_SOCKET": manager.name, **limits})
    notifier.beat(10.0)
    notifier.ready()
    notifier.close()
    assert manager.all_words() == ["READY=1"]


@pytest.mark.parametrize("environment", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1234"}])
def test_without_a_socket_nothing_happens(environment):
    notifier = Notifier({**environment, "WATCHDOG_USEC": "1000000"})
    assert notifier.interval_s == float("inf")
    notifier.ready()
    notifier.beat(1.0)
    notifier.status("x")
    notifier.close()


def test_a_manager_that_is_gone_harms_nobody(tmp_path, caplog):
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    notifier.ready()
    notifier.stopping()
    notifier.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]  # once


def test_the_line_of_status():
    def service(name, state=ServiceState.RUNNING):
        return ServiceStatus(name, int(state), 1, 0, 0.0, "")

    everybody = [service("microkernel"), service("executor.demo"), service("executor.big"), service("gateway")]
    assert status_line("serving", everybody) == "serving demo, big"
    assert (
        status_line("serving", [*everybody, service("storage", ServiceState.BACKOFF)])
        == "serving demo, big; storage is backoff"
    )
    assert status_line("starting", []) == "starting"


@pytest.mark.slow
def test_the_daemon_says_how_it_is(start, manager):
    daemon = start(environment={"NOTIFY_SOCKET": manager.name, "WATCHDOG_USEC": "400000"})
    daemon.serving_line()
    heard: list[str] = []
    wait_for(lambda: heard.extend(manager.heard(beats=False)) or "READY=1" in heard, "ready")
    assert heard[-2:] == ["STATUS=serving demo", "READY=1"]
    assert any(line.startswith("STATUS=starting") and "microkernel is starting" in line for line in heard)
    for child in daemon.children().values():
        names = {entry.partition("=")[0] for entry in Path(f"/proc/{child.pid}/environ").read_text().split("\0")}
        assert names.isdisjoint({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"})
    wait_for(lambda: manager.heard().count("WATCHDOG=1"), "a sign of life")
    daemon.children()["storage"].suspend()  # a child that hangs is not the daemon
    wait_for(lambda: manager.heard().count("WATCHDOG=1"), "another one")
    daemon.children()["storage"].resume()
    daemon.process.send_signal(signal.SIGSTOP)
    wait_for(lambda: psutil.Process(daemon.process.pid).status() == psutil.STATUS_STOPPED, "stop")
    manager.heard()
    time.sleep(1.0)  # five times its interval
    assert manager.heard() == []  # a loop that does not turn gives none
    daemon.process.send_signal(signal.SIGCONT)
    wait_for(lambda: manager.heard().count("WATCHDOG=1"), "life again")
    daemon.children()["gateway"].kill()
    heard = []
    wait_for(lambda: heard.extend(manager.heard()) or "STATUS=serving demo; gateway is starting" in heard, "change")
    wait_for(lambda: heard.extend(manager.heard(beats=False)) or heard[-1] == "STATUS=serving demo", "recovery")
    daemon.process.terminate()
    assert daemon.end() == 0
    heard = manager.all_words(beats=False)
    assert heard.index("STOPPING=1") < heard.index("STATUS=stopping demo")
    assert heard[-1] == "STATUS=stopped"


@pytest.mark.slow
def test_a_failed_start_leaves_its_reason(start, manager):
    daemon = start(environment={"NOTIFY_SOCKET": manager.name}, executor__demo="typed_failure")
    assert daemon.end() == 72
    heard = manager.all_words()
    assert "READY=1" not in heard
    assert heard[-1] == "STATUS=executor.demo failed to start: model directory /nowhere has no config.json"
