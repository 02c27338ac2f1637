"""llmosctl record and replay: what is asked of the daemon, what is shown, how it ends."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from flight_world import Recorded, flight_file, make_world, recorded_world, records
from typer.testing import CliRunner, Result

from llmos.client.types import RecordWritten
from llmos.ctl import flight
from llmos.errors import PermissionRefused

host = typer.Typer()


@host.callback()
def options(context: typer.Context) -> None:
    context.obj = {"run_dir": None, "as_json": False}


host.add_typer(flight.app)
WALL = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1_700_000_000.0))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(host, list(map(str, arguments)))


class FakeClient:
    def __init__(self, answer: RecordWritten | Exception) -> None:
        self.answer = answer

    def write_record(self) -> RecordWritten:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    client = FakeClient(RecordWritten(1, "/state/flight/20260101T000000Z.flight", 1234, 56_789))

    @contextlib.contextmanager
    def connect(context: typer.Context, run_dir: Path | None) -> Iterator[FakeClient]:
        yield client

    monkeypatch.setattr(flight, "connect", connect)
    return client


def test_record_says_where_and_how_much(daemon: FakeClient) -> None:
    result = run("record")
    assert (result.exit_code, result.stdout) == (0, "/state/flight/20260101T000000Z.flight: 1234 records, 56.8 KB\n")
    result = run("record", "--json")
    assert json.loads(result.stdout) == {
        "path": "/state/flight/20260101T000000Z.flight",
        "records": 1234,
        "bytes": 56_789,
    }


def test_a_refusal_is_one_line(daemon: FakeClient) -> None:
    daemon.answer = PermissionRefused("the flight recorder is for administrators only")
    result = run("record")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "llmosctl: the flight recorder is for administrators only\n"


def test_help_warns_and_documents_the_exit_codes() -> None:
    assert "token ids of prompts" in " ".join(run("record", "--help").stdout.split())
    assert "1 a difference was found, 2 usage" in " ".join(run("replay", "--help").stdout.split())


@pytest.mark.slow
def test_the_same_decisions(tmp_path: Path) -> None:
    world = recorded_world(9, 60)
    file = tmp_path / "-x.flight"  # looks like an option
    file.write_bytes(world.kernel.file("on request of gateway"))
    result = run("replay", file)
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert first == f"{file}: the same decisions"
    assert second.startswith(f"  {world.kernel.recorder.calls} records, {len(world.plans)} steps, 0.")
    assert second.endswith(f"s compared; written {WALL}: on request of gateway")
    report = json.loads(run("replay", "--json", file).stdout)
    assert (report["verdict"], report["records"]) == ("same", world.kernel.recorder.calls)


@pytest.mark.slow
def test_a_difference(tmp_path: Path) -> None:
    world = make_world(1)
    world.kernel = Recorded(world.kernel, 1 << 24)
    world.submit([1, 2, 3], owner="\x1b[31mred")
    found = records(world.kernel.file())
    next(fields for fields, _ in found if fields[0] == 4)[4] = [7]
    file = tmp_path / "x.flight"
    file.write_bytes(flight_file(found[:-1]))
    result = run("replay", file)
    assert result.exit_code == 1, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{file}: a difference at record 1, 0.0s after the start (")
    assert lines[1].startswith("  call      SeqSubmit(req=1, model='demo', prompt=[1, 2, 3], ")
    assert lines[2:4] == ["  effect    SeqAccepted to gateway", "  recorded  another message"]
    assert lines[4].startswith("  replayed  SeqAccepted(req=1, rid=1")
    assert "\x1b" not in result.stdout
    assert run("replay", "--json", file).exit_code == 1


@pytest.mark.slow
def test_what_a_recording_lacks_is_said(tmp_path: Path) -> None:
    file = tmp_path / "x.flight"
    data = recorded_world(9, 60).kernel.file()
    file.write_bytes(data[:-5])
    result = run("replay", file)
    assert result.exit_code == 0
    assert (
        result.stdout.splitlines()[2]
        == f"  the file is cut off at byte {len(data) - 5}: nothing behind that was compared"
    )


@pytest.mark.slow
def test_a_file_that_can_not_be_used(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for name, text in (("text", "not a flight file"), ("none", "No such file or directory")):
        result = run("replay", tmp_path / name)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("llmosctl: ")
        assert text in result.stderr
        assert result.stderr.count("\n") == 1
