"""`llmosctl top` on a terminal, as its user meets it: keys, signals, resizing, a daemon that goes away. And without a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from gateway_world import GatewayWorld, wait_until
from top_world import FakeClient
from typer.testing import CliRunner

from llmos import Client
from llmos.ctl.main import app
from llmos.ctl.top import app as top_app
from llmos.errors import Unavailable

SCRIPT = Path(__file__).parents[1] / "support" / "top_process.py"
DEADLINE_S = 30.0  # far above what is needed: the machine may be busy
HOME = "\x1b[H"
GIVEN_BACK = ("\x1b[?25h", "\x1b[?1049l")  # the cursor, and the screen that was there before


class Terminal:
    """A process on a pseudo terminal of a given size. `screen` is the newest whole frame as lines of text."""

    def __init__(self, *command: str, columns: int = 80, rows: int = 24, **environment: str) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(columns, rows, tell=False)
        self.before = termios.tcgetattr(self.slave)
        self.output = ""
        inherited = {
            key: value
            for key, value in os.environ.items()
            if key not in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")
        }
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=self.slave, stdout=self.slave, stderr=subprocess.PIPE, start_new_session=True,
            env={**inherited, "TERM": "xterm-256color", **environment},
        )  # fmt: skip

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        for fd in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(fd)

    @property
    def screen(self) -> list[str]:
        for drawn in reversed(self.output.split(HOME)[1:]):
            lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", drawn).replace("\r", "").split("\n")
            if len(lines) == self.rows:
                return [line.rstrip() for line in lines]
        return []

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def resize(self, columns: int, rows: int, *, tell: bool = True) -> None:
        self.rows = rows
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if tell:
            os.kill(self.process.pid, signal.SIGWINCH)

    def until(self, condition: Callable[[list[str]], object]) -> list[str]:
        """Read until the screen is as wanted."""
        deadline = time.monotonic() + DEADLINE_S
        while not (self.screen and condition(self.screen)):
            assert time.monotonic() < deadline, "\n".join(self.screen)
            assert self.process.poll() is None, self.end()[1]
            self._read(0.2)
        return self.screen

    def until_shown(self, text: str) -> list[str]:
        return self.until(lambda screen: any(text in line for line in screen))

    def until_asked(self, call: str) -> None:
        """Read until the scripted client got this verb."""
        assert self.process.stderr is not None
        assert self.process.stderr.readline().decode().strip() == call

    def end(self) -> tuple[int, str]:
        """Exit code and the rest of stderr, after reading everything."""
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "it does not end"
            self._read(0.05)
        self._read(0.0)
        assert self.process.stderr is not None
        return self.process.returncode, self.process.stderr.read().decode()

    def assert_given_back(self) -> None:
        assert termios.tcgetattr(self.slave) == self.before
        for sequence in GIVEN_BACK:
            assert sequence in self.output.rsplit(HOME, 1)[-1]

    def _read(self, seconds: float) -> None:
        readable, _, _ = select.select([self.master], [], [], seconds)
        while readable:
            self.output += os.read(self.master, 65536).decode(errors="replace")
            readable, _, _ = select.select([self.master], [], [], 0)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    with Terminal(str(SCRIPT), str(tmp_path)) as running:
        running.until_shown("▸ 1000 carol")
        yield running


@pytest.mark.slow
def test_keys_end_to_end(terminal: Terminal, tmp_path: Path) -> None:
    terminal.press("\x1b[B\x1bOB")
    terminal.until_shown("▸ 1007 carol")
    terminal.press("+")
    terminal.until_asked("nice 1007 6")
    terminal.until_shown("sequence 1007: nice 6")
    terminal.until(lambda screen: screen[7].split()[:5] == ["▸", "1007", "carol", "running", "6"])
    terminal.press("z")
    terminal.until_asked("suspend 1007")
    terminal.until_shown("▸ 1007 carol      suspended")
    terminal.press("z")
    terminal.until_asked("resume 1007")
    terminal.until_shown("▸ 1007 carol      waiting")
    terminal.press("e")
    terminal.until_shown("── sequence 1007, carol, waiting, nice 6, 10.0s old ─")
    terminal.until_shown("64 tokens from the cache")
    terminal.press("\x1b")
    terminal.until(lambda screen: not any("10.0s old" in line for line in screen))
    terminal.press("K")
    terminal.until_shown(" kill sequence 1007 of carol? y/n")
    terminal.press("y")
    terminal.until_asked("kill 1007")
    terminal.until_shown("39 sequences")
    (tmp_path / "refuse").write_text("nice below 0 is for administrators")
    terminal.press("-")
    terminal.until_shown(" nice below 0 is for administrators")
    (tmp_path / "refuse").unlink()
    terminal.press("t")
    terminal.until_shown("▸ alice               3       7      12     310/600")
    terminal.press("t/bob\r")
    terminal.until(lambda screen: "22 of 39 sequences" in screen[0])
    terminal.press("h")
    terminal.until_shown("  K         kill the sequence, after a question")
    terminal.press("q")
    assert terminal.end() == (0, "closed True\n")
    terminal.assert_given_back()


@pytest.mark.slow
def test_resizing_is_followed(terminal: Terminal) -> None:
    terminal.resize(150, 40)
    screen = terminal.until(lambda screen: "MODEL" in screen[4])
    assert screen[4].endswith("JOB")
    assert len(screen[4]) >= 145
    terminal.resize(60, 15)
    screen = terminal.until(lambda screen: screen[-1].endswith("q quit"))
    assert max(map(len, screen)) <= 60
    terminal.press("\x03")
    assert terminal.end() == (0, "closed True\n")
    terminal.assert_given_back()


@pytest.mark.slow
def test_a_daemon_that_goes_away_and_comes_back(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "down").touch()
    screen = terminal.until_shown("llmosd is not running, trying again")
    assert screen[5].startswith("▸ 1000 carol")
    terminal.press("z")
    terminal.until_shown(" llmosd is not running on nowhere")
    (tmp_path / "down").unlink()
    screen = terminal.until(lambda screen: screen[0].startswith("llmosd  0.1.0  up"))
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.end() == (128 + signal.SIGTERM, "closed True\n")
    terminal.assert_given_back()


@pytest.mark.slow
def test_ctrl_z_gives_the_terminal_back_until_it_is_continued(terminal: Terminal) -> None:
    terminal.press("j")
    terminal.until_shown("▸ 1002 bob")
    terminal.press("\x1a")
    deadline = time.monotonic() + DEADLINE_S
    while os.waitid(os.P_PID, terminal.process.pid, os.WSTOPPED | os.WNOHANG) is None:
        assert time.monotonic() < deadline, "it does not stop"
        terminal._read(0.05)
    terminal._read(0.0)
    terminal.assert_given_back()
    terminal.output = ""
    terminal.process.send_signal(signal.SIGCONT)
    terminal.until_shown("▸ 1002 bob")
    terminal.press("q")
    assert terminal.end()[0] == 0
    terminal.assert_given_back()


@pytest.mark.slow
def test_a_terminal_that_is_gone_ends_it_quietly(terminal: Terminal) -> None:
    os.close(terminal.slave)
    os.close(terminal.master)
    assert terminal.process.wait(DEADLINE_S) == 128 + signal.SIGHUP
    assert terminal.process.stderr is not None
    assert terminal.process.stderr.read() == b"closed True\n"


@pytest.mark.slow
def test_the_command_waits_for_a_daemon(tmp_path: Path) -> None:
    command = ("-P", "-m", "llmos.ctl.main", "top", "--run-dir", str(tmp_path / "no"), "--interval", "0.1")
    with Terminal(*command, NO_COLOR="1") as terminal:
        terminal.until_shown("llmosd is not running, trying again")
        terminal.until(lambda screen: "start it with: llmosd" in " ".join(" ".join(screen).split()))
        terminal.press("q")
        assert terminal.end() == (0, "")
        terminal.assert_given_back()
        assert not re.search(r"\x1b\[[\d;]*[34]\d[;m]", terminal.output.replace("\x1b[39m", "").replace("\x1b[49m", ""))


# Without a terminal


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """The next command's client; a second passes whenever somebody sleeps."""
    fake = FakeClient()
    monkeypatch.setattr(top_app, "Client", lambda *_, **__: fake)
    clock = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        fake.advance(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    return fake


def top(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["top", *arguments])


def test_without_a_terminal_one_frame_is_printed(client: FakeClient) -> None:
    result = top()
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "llmosd  0.1.0  up 3h07m  40 sequences                                  480 tok/s"
    assert lines[3:5] == [
        "microkernel               running    up 3h07m   0 restarts  pid 4321",
        "storage                   running    up 3h07m   0 restarts  pid 4321",
    ]
    assert lines[9] == "1000 carol        running      0      2      40/2000 ········   40.0   1.0s 1000"
    assert len(lines) == 49
    assert "\x1b" not in result.stdout
    assert all(line == line.rstrip() and len(line) <= 80 for line in lines)
    assert client.closed


def test_a_real_gateway_answers() -> None:
    with GatewayWorld() as world, Client(world.path) as sdk:
        world.kernel.paused = True
        with sdk.generate("abc", stream=True):
            wait_until(lambda: world.kernel.sequences)
            (rid,) = world.kernel.sequences
            result = top("--once", "-i", "0.1", "--run-dir", str(world.path))
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].split()[4:6] == ["1", "sequence"]
    assert lines[1].startswith("echo      3 running  1 waiting")
    assert lines[-1].split()[0] == str(rid)


def test_sort_and_filter_options(client: FakeClient) -> None:
    lines = top("--once", "--sort", "AGE", "--filter", "bob running", "-i", "0.5").stdout.splitlines()
    assert lines[0].split("  ")[3] == "7 of 40 sequences"
    assert [line.split()[0] for line in lines[9:]] == ["1037", "1032", "1022", "1020", "1017", "1010", "1002"]


def test_mistakes(client: FakeClient) -> None:
    for arguments, words in (
        (["--sort", "size"], "'size' is none of: rid, owner,"),
        (["--interval", "0.01"], "'--interval'"),
        (["--interval", "61"], "'--interval'"),
        (["--interval", "nan"], "interval"),
    ):
        result = top(*arguments)
        assert result.exit_code == 2
        assert words in result.stderr
    assert CliRunner().invoke(app, ["--json", "top"]).exit_code == 2


def test_without_a_terminal_errors_are_exit_codes(
    client: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.error = Unavailable("the gateway is starting")
    result = top("--once")
    assert (result.exit_code, result.stdout, result.stderr) == (5, "", "llmosctl: the gateway is starting\n")
    assert client.closed
    monkeypatch.undo()
    result = top("--run-dir", str(tmp_path))
    assert result.exit_code == 3
    assert result.stderr.startswith("llmosctl: llmosd is not running on ")
