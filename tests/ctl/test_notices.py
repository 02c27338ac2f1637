"""Outages on the terminal: short ones are no news, long ones are told once, and stdout never hears of them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_world import CrashWorld
from ctl import ctl
from loop_thread import wait_until
from typer.testing import CliRunner

from llmos import Client
from llmos.ctl import arguments, notices
from llmos.ctl.main import app
from llmos.ctl.notices import OutageNotices


@pytest.fixture
def world() -> Iterator[CrashWorld]:
    with CrashWorld() as running:
        yield running


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outages are told after a hundredth of a second."""
    monkeypatch.setattr(notices.OutageNotices.__init__, "__defaults__", (0.01,))


def test_a_short_outage_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    notice = OutageNotices(60.0)
    for _ in range(3):
        notice("the gateway is being restarted")
        assert notice._timer is not None
        notice(None)
        assert notice._timer is None
    assert capsys.readouterr() == ("", "")


def test_a_long_outage_is_told_twice(capsys: pytest.CaptureFixture[str]) -> None:
    notice = OutageNotices(0.01)
    notice("the gateway\x1b[2J is being restarted")
    wait_until(lambda: notice._is_told)
    notice(None)
    notice("again")
    wait_until(lambda: notice._is_told)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "llmosctl: the gateway\N{REPLACEMENT CHARACTER}[2J is being restarted; waiting for it"
    assert lines[1].startswith("llmosctl: the wait is over after 0.")
    assert lines[2:] == ["llmosctl: again; waiting for it"]
    notice(None)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("crash", [1, 8, 14])
def test_an_interrupted_answer_is_whole_on_stdout(world: CrashWorld, crash: int) -> None:
    world.start_after_s = 0.3
    world.crash_after(crash)
    result = ctl(world, "run", "--raw", "aéb漢c", "--max-tokens", 12)
    assert (result.exit_code, result.stdout) == (0, "aéb漢caéb\n")
    lines = result.stderr.splitlines()
    assert world.deaths == 1
    assert lines[0] == "llmosctl: the gateway is being restarted; waiting for it"
    assert lines[1].startswith("llmosctl: the wait is over after 0.")
    assert lines[2].startswith("12 tokens")


@pytest.mark.parametrize("words", [("attach", "RID"), ("generate", "RID", "--max-tokens", 4)])
def test_short_interruptions_leave_no_trace(world: CrashWorld, words: tuple[object, ...]) -> None:
    rid = ctl(world, "spawn", "abc").stdout.strip()
    assert ctl(world, "generate", rid, "--max-tokens", 4).stdout == "abca\n"
    world.crash_after(8)
    result = ctl(world, *(rid if word == "RID" else word for word in words))
    assert (result.exit_code, result.stdout) == (0, "abca\n")
    assert len(result.stderr.splitlines()) == 1
    assert world.deaths == 1


def test_a_gateway_that_is_away_at_first_is_waited_for(world: CrashWorld) -> None:
    world.start_after_s = 0.3
    world.crash_after(1)
    assert ctl(world, "ps", "--json").stdout == "[]\n"
    world.crash_after(1)
    assert ctl(world, "tokenize", "ab", "--json").exit_code == 0
    assert world.deaths == 2


@pytest.mark.parametrize("lock", ["", "4194305\n", "nonsense"])
def test_without_a_daemon_nobody_waits(lock: str, tmp_path: Path) -> None:
    """Whatever a daemon left behind that was killed."""
    (tmp_path / "llmosd.lock").write_text(lock)
    result = CliRunner().invoke(app, ["ps", "--run-dir", str(tmp_path)])
    assert result.exit_code == 3
    assert result.stderr == f"llmosctl: llmosd is not running on {tmp_path}; start it with: llmosd (or: make run)\n"


def test_a_daemon_without_a_gateway_is_another_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llmosd.lock").write_text(f"{os.getpid()}\n")
    monkeypatch.setattr(arguments, "Client", functools.partial(Client, reconnect_s=0.2))
    result = CliRunner().invoke(app, ["ps", "--run-dir", str(tmp_path)])
    assert result.exit_code == 5
    assert result.stderr.startswith(f"llmosctl: llmosd runs on {tmp_path}, but its gateway does not")
