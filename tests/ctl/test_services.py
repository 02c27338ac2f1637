"""`llmosctl restart`: what it asks, what it waits for, what it says. The client is scripted."""

from __future__ import annotations

import contextlib
import json

import pytest
from typer.testing import CliRunner

from llmos.codes import ServiceState
from llmos.ctl import services
from llmos.ctl.main import app
from llmos.errors import LlmosError, NotFound, PermissionRefused, Unavailable
from llmos.protocol.messages import ServiceStatus, StatusReply

RUNNING, STARTING, STOPPING, FATAL = (
    ServiceState.RUNNING,
    ServiceState.STARTING,
    ServiceState.STOPPING,
    ServiceState.FATAL,
)


class Script:
    """Answers `status` with the next of `states` (the last one for ever): (state, pid) of the gateway, or an error."""

    def __init__(self, *states, restart=None):
        self.states = list(states)
        self.restart = restart
        self.asked = []

    def status(self):
        now = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(now, LlmosError):
            raise now
        found = [ServiceStatus("gateway", int(now[0]), now[1], 0, 0.0, "gone")] if now else []
        return StatusReply(1, "0", 0.0, (), (ServiceStatus("storage", int(RUNNING), 7, 0, 0.0, ""), *found))

    def restart_service(self, name):
        self.asked.append(name)
        if self.restart is not None:
            raise self.restart


@pytest.fixture
def ctl(monkeypatch):
    monkeypatch.setattr(services, "_POLL_S", 0.0)

    def run(script, *words):
        monkeypatch.setattr(services, "connect", lambda *_: contextlib.nullcontext(script))
        return CliRunner().invoke(app, ["restart", *words])

    return run


def test_it_waits_until_another_process_is_ready(ctl):
    script = Script((RUNNING, 5), (RUNNING, 5), (STOPPING, 5), (STARTING, 6), (RUNNING, 6))
    done = ctl(script, "gateway")
    assert done.exit_code == 0, done.output
    assert done.stdout == "gateway: pid 5 -> pid 6, ready after 0.0 s\n"
    assert script.asked == ["gateway"]


def test_json(ctl):
    done = ctl(Script((RUNNING, 5), (RUNNING, 6)), "gateway", "--json")
    answer = json.loads(done.stdout)
    assert answer.pop("seconds") >= 0
    assert answer == {"service": "gateway", "old_pid": 5, "pid": 6}


def test_one_without_a_process(ctl):
    assert ctl(Script((FATAL, 0), (FATAL, 0), (RUNNING, 6)), "gateway").stdout.startswith(
        "gateway: no process -> pid 6"
    )


def test_what_is_lost_on_the_way_is_asked_again(ctl):
    away = Unavailable("the gateway is gone")
    done = ctl(Script((RUNNING, 5), away, None, (RUNNING, 6), restart=away), "gateway")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("script", "words", "code", "text"),
    [
        (Script(None), ["gateway"], 4, "no service 'gateway'; there are: storage"),
        (Script((RUNNING, 5), restart=NotFound("no service")), ["gateway"], 4, "no service"),
        (Script((RUNNING, 5), restart=PermissionRefused("administrators only")), ["gateway"], 1, "administrators only"),
        (Script((RUNNING, 5), restart=Unavailable("away")), ["storage"], 5, "away"),
        (Script((RUNNING, 5), (FATAL, 0)), ["gateway"], 1, "gateway is down and stays down: gone"),
        (Script((RUNNING, 5), (STARTING, 6)), ["gateway", "--timeout", "0.05"], 1, "not ready in time; it is starting"),
        (Script((RUNNING, 5)), ["gateway", "--timeout", "0"], 2, "a time above 0 is needed"),
    ],
)
def test_what_can_go_wrong_is_one_line(ctl, script, words, code, text):
    done = ctl(script, *words)
    assert (done.exit_code, done.stderr.count("\n")) == (code, 1), done.output
    assert text in done.stderr
