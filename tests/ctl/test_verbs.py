"""llmosctl nice, suspend, resume, explain and tenant, in process with typer's runner."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from gateway_world import GatewayWorld, wait_until
from typer.testing import CliRunner

from llmos import Client
from llmos.ctl.main import app
from llmos.protocol import messages as m


@pytest.fixture
def world() -> Iterator[GatewayWorld]:
    with GatewayWorld() as running:
        running.kernel.paused = True
        yield running


@pytest.fixture
def rid(world: GatewayWorld) -> Iterator[int]:
    """A sequence that waits."""
    with Client(world.path) as client, client.generate("abc", stream=True):
        wait_until(lambda: world.kernel.sequences)
        yield next(iter(world.kernel.sequences))


def ctl(world: GatewayWorld, *arguments: object) -> Any:
    return CliRunner().invoke(app, ["--run-dir", str(world.path), *map(str, arguments)])


def json_of(world: GatewayWorld, *arguments: object) -> Any:
    return json.loads(ctl(world, *arguments, "--json").stdout)


@pytest.mark.parametrize("value", [["5"], ["-5"], ["--", "-5"], ["-15"], ["-20"], ["19"]])
def test_nice_takes_negative_values(world: GatewayWorld, rid: int, value: list[str]) -> None:
    result = ctl(world, "nice", rid, *value)
    assert (result.exit_code, result.stdout) == (0, f"sequence {rid}: nice {value[-1]}\n")
    assert world.kernel.sequences[rid].nice == int(value[-1])
    assert json_of(world, "nice", "--json", rid, *value[-1:]) == {"rid": rid, "nice": int(value[-1])}


def test_suspend_and_resume(world: GatewayWorld, rid: int) -> None:
    assert ctl(world, "suspend", rid).stdout == f"suspended {rid}\n"
    shown = ctl(world, "ps").stdout.splitlines()[2].split()
    assert (shown[0], shown[3], shown[4]) == (str(rid), "suspended", "0")
    assert json_of(world, "ps")[0]["state"] == "suspended"
    assert json_of(world, "suspend", rid, "--drop-pages") == {"rid": rid, "suspended": True, "keep_pages": False}
    assert ctl(world, "resume", rid).stdout == f"resumed {rid}\n"
    assert json_of(world, "resume", rid) == {"rid": rid, "suspended": False}
    suspends = [message for message in world.kernel.controls if isinstance(message, m.Suspend)]
    assert [message.keep_pages for message in suspends] == [True, False]


def test_explain(world: GatewayWorld, rid: int) -> None:
    result = ctl(world, "explain", rid)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == f"sequence {rid}, running, nice 0, 10.0s old"
    found = json_of(world, "explain", rid)
    assert (found["rid"], found["state"], found["suspended_ms"], found["suspensions"]) == (rid, "running", 4000.0, 1)


def test_tenants(world: GatewayWorld) -> None:
    assert [line.split()[0] for line in ctl(world, "tenant", "list").stdout.splitlines()[2:]] == ["alice", "bob"]
    options = "--weight 3 --max-pages 100 --guaranteed-pages 10 --max-running 4 --max-waiting 50 --tokens-per-s 0.5"
    (row,) = json_of(world, "tenant", "set", "alice", *options.split())
    limits = ("weight", "max_pages", "guaranteed_pages", "max_running", "max_waiting", "tokens_per_s")
    assert [row[name] for name in limits] == [3.0, 100, 10, 4, 50, 0.5]
    result = ctl(world, "tenant", "set", "alice", "--max-pages", "unlimited")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[2].split() == ["alice", "echo", "3", "0/4", "0/50", "0", "10", "0.5", "0"]
    assert json_of(world, "--json", "tenant", "list")[0]["max_pages"] == 2**31 - 1
    assert [row["tenant"] for row in json_of(world, "tenant", "list")] == ["alice", "bob"]


def test_run_takes_nice_and_deadline(world: GatewayWorld) -> None:
    world.kernel.paused = False
    result = ctl(world, "run", "--raw", "abc", "-n", "4", "--nice", "-5", "--deadline", "60")
    assert (result.exit_code, result.stdout) == (0, "abca\n")
    submit = world.kernel.seen[0]
    assert submit.nice == -5
    assert 0 < submit.deadline_ms <= 60_000


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("nice 4711 5", 4, "no sequence 4711"),
        ("suspend 4711", 4, "no sequence 4711"),
        ("resume 4711", 4, "no sequence 4711"),
        ("explain 4711", 4, "no sequence 4711"),
        ("nice 1 20", 2, "nice: 20 is outside [-20, 19]"),
        ("nice 1 -21", 2, "nice: -21 is outside"),
        ("nice 1 -x", 2, "Invalid value for 'VALUE'"),
        ("nice 1 5 --jsno", 2, "unexpected extra argument"),
        ("nice 1", 2, "Missing argument 'VALUE'"),
        ("suspend -1", 2, "No such option"),
        ("resume 0", 2, "rid: 0 is not a sequence number"),
        ("explain abc", 2, "Invalid value for 'RID'"),
        ("tenant set alice", 2, "nothing to change"),
        ("tenant set alice --weight 0", 2, "weight: 0.0 is outside (0, 1000]"),
        ("tenant set alice --weight nan", 2, "weight: nan is outside"),
        ("tenant set alice --max-pages -1", 2, "max_pages: -1 is outside"),
        ("tenant set alice --max-running many", 2, "neither a number nor 'unlimited'"),
        ("tenant set alice --tokens-per-s inf", 2, "tokens_per_s: inf is outside"),
        ("tenant nonsense", 2, "No such command"),
        ("run x --nice 20", 2, "nice: 20 is outside"),
        ("run x --deadline 0", 2, "deadline_s: 0.0 is outside (0, 604800]"),
        ("run x --deadline nan", 2, "deadline_s: nan"),
    ],
)
def test_mistakes(world: GatewayWorld, arguments: str, code: int, words: str) -> None:
    result = ctl(world, *arguments.split())
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stdout == ""


def test_without_the_right_it_is_a_failed_request(world: GatewayWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmos.services.gateway.service.is_administrator", lambda _: False)
    monkeypatch.setattr("llmos.services.gateway.router.is_administrator", lambda _: False)
    for arguments in ("nice 1 -1", "tenant set alice --weight 2", "run x --nice -1"):
        result = ctl(world, *arguments.split())
        assert result.exit_code == 1
        assert "administrators only" in result.stderr
        assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments", ["nice 1 -5", "suspend 1", "resume 1", "explain 1", "tenant list", "tenant set a --weight 1"]
)
def test_without_a_daemon(arguments: str) -> None:
    result = CliRunner().invoke(app, [*arguments.split(), "--run-dir", "/nowhere/at/all"])
    assert result.exit_code == 3
    assert "llmosd is not running on /nowhere/at/all" in result.stderr


@pytest.mark.parametrize("arguments", ["nice", "suspend", "resume", "explain", "tenant", "tenant list", "tenant set"])
def test_help_documents_the_exit_codes(arguments: str) -> None:
    shown = " ".join(CliRunner().invoke(app, [*arguments.split(), "-h"]).stdout.split())
    assert "3 llmosd not running" in shown
