"""The flight recorder: bounded, complete while it records, honest about its pauses; and the shell that writes it to files."""

from __future__ import annotations

import itertools
import logging
import os
import random
import stat
import tempfile
from pathlib import Path

import pytest
import zmq
from flight_world import Recorded, flight_file, live, make_world, recorded_world, records
from kernel_world import GATEWAY, SUPERVISOR, World, params

from llmos.codes import ErrorCode
from llmos.config import Config
from llmos.microkernel import main, recorder
from llmos.microkernel.keeper import Keeper
from llmos.microkernel.recorder import Call, Recorder
from llmos.microkernel.replay import replay
from llmos.ports.endpoint import RunDir
from llmos.ports.sync import Dialer
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, pack_i32
from llmos.protocol.handshake import hello
from llmos.services.base import ServiceContext

KINDS = {1: "header", 2: "snapshot", 3: "known", 4: "called", 5: "paused", 6: "end", 7: "refusing"}


def kinds(data):
    """The kinds of records in a file, runs of one kind as one."""
    return [kind for kind, _ in itertools.groupby(KINDS[fields[0]] for fields, _ in records(data))]


def kept(flight: Recorder) -> int:
    return sum(len(piece) for segment in flight._segments for piece in segment.pieces)


def test_the_effects_are_the_kernels_own():
    plain, watched = make_world(1), make_world(1)
    watched.kernel = Recorded(watched.kernel, 1 << 24)
    live(plain, random.Random(1), 200)
    live(watched, random.Random(1), 200)
    assert plain.plans == watched.plans
    assert plain.replies == watched.replies
    assert watched.kernel.recorder.calls > 300


def test_every_call_is_in_the_file():
    world = make_world(2)
    world.kernel = Recorded(world.kernel, 1 << 24)
    flight = world.kernel.recorder
    flight.greet(SUPERVISOR, 0.5)
    world.submit([1, 2, 3])
    flight.peer_down(GATEWAY, 0.7)
    flight.check(0.8)
    calls = [(fields[1], fields[2], fields[3]) for fields, _ in records(world.kernel.file()) if fields[0] == 4]
    handle, tick = int(Call.HANDLE), int(Call.TICK)
    assert calls == [(3, 0.5, 4), (handle, 0.0, 1), (tick, 0.0, 0), (4, 0.7, 1), (5, 0.8, 0)]
    assert flight.calls == 5
    assert kinds(world.kernel.file()) == ["header", "snapshot", "known", "called", "known", "called", "end"]


def test_the_shells_word_that_nothing_new_is_taken_is_replayed():
    world = make_world(2, window=10**6)
    world.kernel = Recorded(world.kernel, 1 << 24)
    world.kernel.state.notes = []
    submit = m.SeqSubmit(1, "demo", pack_i32([1, 2]), params(), "alice")
    answers = []
    for refusal in (None, "the disk is full", "the disk is full", None):
        world.kernel.state.refusal = refusal
        answers += [type(send.message) for send in world.kernel.handle(GATEWAY, submit, 0.0)]
    assert answers == [m.SeqAccepted, m.Error, m.Error, m.SeqAccepted]
    data = world.kernel.file()
    assert [fields[1] for fields, _ in records(data) if fields[0] == 7] == ["the disk is full", None]
    assert replay(data).verdict == "same"
    without = flight_file([record for record in records(data) if record[0][0] != 7])
    assert replay(without).difference.recorded == "another message"


def test_old_segments_make_room(monkeypatch):
    monkeypatch.setattr(recorder, "RETRY_S", 0.0)
    budget = 300_000
    world = make_world(3, window=10**6)
    world.kernel = Recorded(world.kernel, budget)
    flight = world.kernel.recorder
    rng = random.Random(3)
    seen = set()
    for _ in range(120):
        live(world, rng, 20)
        assert kept(flight) < budget
        seen.add(len(flight._segments))
    assert seen == {1, 2}
    report = replay(world.kernel.file())
    assert report.verdict == "same"
    assert report.segments == 2
    assert report.records == flight.calls
    first = next(fields for fields, _ in records(world.kernel.file()) if fields[0] == 2)
    assert first[1] > 0.0  # the segment of the start is gone


def test_it_goes_on_without_a_snapshot_then_pauses_and_comes_back(monkeypatch):
    budget = 100_000
    world = make_world(4, window=10**6)
    world.kernel = Recorded(world.kernel, budget)
    flight = world.kernel.recorder
    rng = random.Random(4)
    monkeypatch.setattr(recorder, "BUSY_COST", 10)
    while flight._recording:
        live(world, rng, 10)
        assert kept(flight) < budget
    assert flight._segments[0].size > 0.9 * budget
    calls = flight.calls
    live(world, rng, 30)
    assert flight.calls == calls
    assert kinds(world.kernel.file())[-2:] == ["paused", "end"]
    report = replay(world.kernel.file())
    assert (report.verdict, report.pauses, report.records) == ("same", 1, calls)

    monkeypatch.undo()
    flight.roll(world.now + 5.0, idle=False)
    assert not flight._recording, "tries of snapshots are far apart"
    flight.roll(world.now + 20.0, idle=False)
    live(world, rng, 30)
    report = replay(world.kernel.file())
    assert report.verdict == "same"
    assert report.records == flight.calls > 40


def test_an_idle_machine_may_take_a_dearer_snapshot(monkeypatch):
    monkeypatch.setattr(recorder, "BUSY_COST", 10)
    flight = Recorder(make_world(1).kernel, 1 << 24)
    flight.roll(0.0, idle=False)
    assert not flight._recording
    flight.roll(10.0, idle=True)
    assert flight._recording


@pytest.mark.parametrize("budget", [0, 1000])
def test_without_memory_there_is_nothing_to_write(budget):
    world = recorded_world(1, 50, budget)
    assert world.kernel.recorder.calls == 0
    assert kinds(world.kernel.file()) == ["header", "end"]
    assert world.streams


def test_what_can_not_be_frozen_ends_the_snapshots_not_the_kernel(caplog):
    world = make_world(1)
    world.kernel.state.oops = iter(())
    with caplog.at_level(logging.ERROR):
        world.kernel = Recorded(world.kernel, 1 << 24)
        live(world, random.Random(1), 50)
    assert world.kernel.recorder.calls == 0
    assert [record.getMessage() for record in caplog.records] == [
        "the flight recorder can not take snapshots any more: kernel.state.oops: objects of builtins.tuple_iterator can not be frozen"
    ]


def test_the_call_that_raised_is_the_last_record(monkeypatch):
    world = recorded_world(5, 40)
    monkeypatch.setattr(type(world.kernel.state), "settle", lambda *_: [][1])
    with pytest.raises(IndexError):
        world.send(GATEWAY, m.PsGet(1))
    fields, message = records(world.kernel.file())[-2]
    assert fields[6] == "IndexError: list index out of range"
    assert Schema(m.ToKernel).decode(message) == m.PsGet(1)


# ------------------------------------------------------------ files


def flights(path):
    return sorted(found.name for found in path.iterdir())


def test_files_are_private_named_by_time_and_few(tmp_path):
    folder = tmp_path / "state" / "flight"
    old = os.umask(0o022)
    try:
        for second in range(7):
            path, size = main.write_flight(folder, [b"ab", b"c"], 1_700_000_000.0 + second)
        assert path == folder / "20231114T221326Z.flight"
        assert size == 3
        assert path.read_bytes() == b"abc"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "notes.txt").write_text("mine")
        for _ in range(3):
            path, _ = main.write_flight(folder, [b"d"], 1_700_000_006.0)
    finally:
        os.umask(old)
    assert path.name == "20231114T221326Z_003.flight"
    assert flights(folder) == [
        *(f"20231114T22132{second}Z.flight" for second in (2, 3, 4, 5, 6)),
        *(f"20231114T221326Z_00{number}.flight" for number in (1, 2, 3)),
        "notes.txt",
    ]


class Hall:
    """A shell with its sockets in a short folder, and a client of each role. One thread: `ask` serves the shell itself."""

    def __init__(self, path: Path, budget: int = 1 << 24) -> None:
        self.run_dir = RunDir(path)
        self.run_dir.create()
        self.state = path / "state"
        context = ServiceContext(Config(), self.run_dir, "microkernel", "microkernel", None)
        self.recorder = Recorder(World().kernel, budget)
        self.recorder.roll(0.0, idle=True)
        keeper = Keeper(self.recorder.kernel, None, 0.0)
        self.shell = main.Shell(context, self.recorder, keeper, self.state / "flight")

    def serve(self) -> None:
        control = self.shell.listeners[0]
        assert control.socket.poll(5000)
        self.shell.serve(control)
        self.shell.flush(0.0)

    def dial(self, role: str) -> Dialer:
        dialer: Dialer = Dialer(self.run_dir, "kernel-control", Schema(m.FromKernel))
        assert dialer.socket.poll(5000, zmq.POLLOUT)
        dialer.send(hello(role, role))
        self.serve()
        assert isinstance(dialer.wait(5.0), m.Welcome)
        return dialer

    def ask(self, dialer: Dialer, message: m.Message) -> m.Message:
        dialer.send(message)
        self.serve()
        return dialer.wait(5.0)


@pytest.fixture
def short_dir():
    """A unix socket's path must be short; pytest's own folders are not."""
    with tempfile.TemporaryDirectory(prefix="llmos-") as path:
        yield Path(path)


def test_a_gateway_and_the_supervisor_may_ask_for_a_file(short_dir):
    hall = Hall(short_dir)
    with hall.shell:
        for count, role in enumerate(("gateway", "supervisor"), 1):
            dialer = hall.dial(role)
            assert isinstance(hall.ask(dialer, m.PsGet(1)), m.PsReply)
            answer = hall.ask(dialer, m.RecordWrite(7))
            assert isinstance(answer, m.RecordWritten)
            assert (answer.req, answer.records) == (7, 2 * count)  # a greeting and a question each
            data = Path(answer.path).read_bytes()
            assert len(data) == answer.bytes
            assert replay(data).reason == f"on request of {role}"
            dialer.close()
        for role in ("executor", "storage"):
            dialer = hall.dial(role)
            answer = hall.ask(dialer, m.RecordWrite(8))
            assert (answer.req, answer.code) == (8, ErrorCode.PERMISSION)
            dialer.close()
    assert len(flights(hall.state / "flight")) == 2


def test_a_request_that_can_not_be_met_is_answered(short_dir):
    hall = Hall(short_dir, budget=0)
    with hall.shell:
        dialer = hall.dial("gateway")
        answer = hall.ask(dialer, m.RecordWrite(1))
        assert (answer.code, answer.field) == (ErrorCode.UNAVAILABLE, "recorder_mib")
        hall.shell.recorder = Recorder(World().kernel, 1 << 24)
        hall.shell.recorder.roll(0.0, idle=True)
        assert isinstance(hall.ask(dialer, m.PsGet(1)), m.PsReply)
        hall.state.write_text("a file where the folder should be")
        answer = hall.ask(dialer, m.RecordWrite(2))
        assert (answer.req, answer.code) == (2, ErrorCode.UNAVAILABLE)
        assert f"cannot write to {hall.state}/flight: " in answer.message
        assert isinstance(hall.ask(dialer, m.PsGet(3)), m.PsReply)
        dialer.close()


def crash(hall):
    with hall.shell:
        dialer = hall.dial("gateway")
        hall.ask(dialer, m.PsGet(1))
        dialer.close()
        raise ZeroDivisionError("the bug")


def test_a_crash_leaves_a_file(short_dir):
    hall = Hall(short_dir)
    with pytest.raises(ZeroDivisionError):
        crash(hall)
    [path] = (hall.state / "flight").iterdir()
    report = replay(path.read_bytes())
    assert (report.verdict, report.reason, report.records) == ("same", "ZeroDivisionError: the bug", 2)
    assert all(listener.socket.closed for listener in hall.shell.listeners)


def test_a_crash_whose_file_can_not_be_written_is_still_that_crash(short_dir, caplog):
    hall = Hall(short_dir)
    hall.state.write_text("")
    with caplog.at_level(logging.ERROR), pytest.raises(ZeroDivisionError, match="the bug") as caught:
        crash(hall)
    assert caught.value.__context__ is None
    assert "the flight recorder could not be written" in caplog.text


def test_a_good_end_leaves_no_file(short_dir):
    hall = Hall(short_dir)
    with hall.shell:
        hall.dial("gateway").close()
    assert not hall.state.exists()
