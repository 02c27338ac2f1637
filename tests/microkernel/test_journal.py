"""The journal's files: every cut, every flipped byte, every failing write; carrying; what is left on disk."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from pathlib import Path

import msgspec
import pytest
from kernel_world import World

from llmos.codes import FinishReason
from llmos.errors import Unavailable
from llmos.microkernel import journal as journal_module
from llmos.microkernel import state as state_module
from llmos.microkernel.journal import Journal
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.records import Origin
from llmos.microkernel.recovery import Fold, restore
from llmos.protocol import messages as m


def make_world(directory: Path, **options: object) -> tuple[World, Journal]:
    world = World()
    journal = Journal(directory, "process", 0.05, **options)
    journal.recover()
    journal.start(world.kernel.state)
    world.kernel.state.notes = []
    world.start_executor()
    flush(world, journal)
    return world, journal


def flush(world: World, journal: Journal) -> None:
    notes = world.kernel.state.notes
    assert notes is not None
    journal.write(notes)
    notes.clear()
    journal.turn(world.kernel.state, world.now)


def live_a_little(world: World, journal: Journal) -> None:
    for index in range(3):
        world.submit([index, 2, 3], max_tokens=5 + index, seed=index)
        flush(world, journal)
    rid = world.spawn([4, 5, 6])
    for _ in range(5):
        world.step()
        flush(world, journal)
    world.append(rid, [7])
    world.ask(m.Nice(1, rid, 3))
    flush(world, journal)


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.journal"))


def streams_of(fold: Fold) -> dict[int, list[int]]:
    return {rid: list(seq.tokens) for rid, seq in fold.sequences.items()}


def test_what_was_written_is_read(tmp_path: Path):
    world, journal = make_world(tmp_path / "j")
    live_a_little(world, journal)
    journal.close()
    recovered = Journal(tmp_path / "j", "process", 0.05).recover()
    state = world.kernel.state
    everything = {**state.sequences, **state.ended}
    assert streams_of(recovered.fold) == {rid: list(seq.tokens) for rid, seq in everything.items()}
    assert (recovered.shift_s, recovered.dropped, recovered.fold.ignored) == (0.0, 0, 0)
    assert stat.S_IMODE((tmp_path / "j").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in segments(tmp_path / "j")} == {0o600}


def test_damage_in_an_older_segment_does_not_hide_the_newer_one(tmp_path: Path):
    world, journal = make_world(tmp_path / "j")
    live_a_little(world, journal)
    (old,) = segments(tmp_path / "j")
    size = old.stat().st_size
    journal._renew(world.kernel.state, Origin.SEGMENT)
    journal.turn(world.kernel.state, 0.0)
    journal.close()
    assert not old.exists()
    damaged = tmp_path / "j" / "00000001.journal"
    damaged.write_bytes(b"\xff" * size)
    recovered = Journal(tmp_path / "j", "process", 0.05).recover()
    assert (recovered.dropped, recovered.places) == (size, 1)
    assert len(recovered.fold.sequences) == 4


def test_a_new_segment_takes_everything_over_a_bit_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(journal_module, "CARRY_BYTES", 1)
    world, journal = make_world(tmp_path / "j")
    live_a_little(world, journal)
    journal._renew(world.kernel.state, Origin.SEGMENT)
    before = segments(tmp_path / "j")
    assert len(before) == 2
    turns = 0
    while journal.is_carrying and turns < 10:
        world.step()
        flush(world, journal)
        turns += 1
        journal_at_each_turn = Journal(tmp_path / "j", "process", 0.05).recover()
        everything = {**world.kernel.state.sequences, **world.kernel.state.ended}
        assert streams_of(journal_at_each_turn.fold) == {rid: list(seq.tokens) for rid, seq in everything.items()}
    assert turns == 4
    assert segments(tmp_path / "j") == before[-1:]


def test_what_is_forgotten_is_in_no_file(tmp_path: Path):
    world, journal = make_world(tmp_path / "j")
    secret = world.submit([777, 778, 779], max_tokens=1)
    other = world.spawn([3, 4, 5])
    world.run()
    flush(world, journal)
    needle = bytes([0x09, 0x03, 0, 0, 0x0A, 0x03, 0, 0])
    assert needle in b"".join(path.read_bytes() for path in (tmp_path / "j").iterdir())
    world.now += 601.0
    world._deliver(world.kernel.tick(world.now))
    assert secret not in world.kernel.state.ended
    flush(world, journal)
    world.now += 60.0
    flush(world, journal)  # a new segment
    flush(world, journal)  # carried and deleted
    assert needle not in b"".join(path.read_bytes() for path in (tmp_path / "j").iterdir())
    assert len(segments(tmp_path / "j")) == 1
    assert other in Journal(tmp_path / "j", "process", 0.05).recover().fold.sequences
    flush(world, journal)
    assert len(segments(tmp_path / "j")) == 1  # nothing more was forgotten: it stays


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.write
    monkeypatch.setattr(journal_module.os, "write", lambda file, data: real(file, bytes(data)[:7]))
    world, journal = make_world(tmp_path / "j")
    live_a_little(world, journal)
    journal.close()
    assert Journal(tmp_path / "j", "process", 0.05).recover().dropped == 0


@pytest.mark.parametrize(("sync", "flushes"), [("process", 0), ("interval", 1), ("always", 5)])
def test_when_it_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: str, flushes: int):
    world = World()
    journal = Journal(tmp_path / "j", sync, 0.05)
    journal.recover()
    journal.start(world.kernel.state)
    journal._delete_old(0.0)
    count = 0

    def fdatasync(file: int) -> None:
        nonlocal count
        count += 1

    monkeypatch.setattr(journal_module.os, "fdatasync", fdatasync)
    for turn in range(5):
        journal.write([world.kernel.state.meta(0.0, 0.0, "")])
        journal.turn(world.kernel.state, 100.0 + turn * 0.01)
    assert count == flushes


@pytest.mark.parametrize("version", [0, journal_module.VERSION + 1])
def test_another_version_is_refused_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int):
    world, journal = make_world(tmp_path / "j")
    live_a_little(world, journal)
    monkeypatch.setattr(state_module, "VERSION", version)
    journal._renew(world.kernel.state, Origin.SEGMENT)
    journal.close()
    before = {path: path.read_bytes() for path in segments(tmp_path / "j")}
    with pytest.raises(Unavailable, match=f"is of version {version}, this llmosd reads 1 to 2"):
        Journal(tmp_path / "j", "process", 0.05).recover()
    assert {path: path.read_bytes() for path in segments(tmp_path / "j")} == before


def test_the_version_before_is_read(tmp_path: Path):
    old = msgspec.msgpack.encode([1, 1, 7, 2, b"r" * 16, 1.0, 2.0, "boot"])
    (tmp_path / "00000001.journal").write_bytes(struct.pack("<II", len(old), zlib.crc32(old)) + old)
    recovered = Journal(tmp_path, "always", 0.05).recover()
    assert (recovered.records, recovered.dropped, recovered.fold.rids) == (1, 0, 7)


def test_a_second_life_goes_on_in_the_next_segment(tmp_path: Path):
    world, journal = make_world(tmp_path / "j")
    live_a_little(world, journal)
    journal.close()
    again = Journal(tmp_path / "j", "process", 0.05)
    recovered = again.recover()
    kernel = Kernel(world.limits, world.kernel.state.scheduling, ("demo",), 2, world.now)
    restore(kernel.state, recovered.fold, 0.0, world.now)
    again.start(kernel.state)
    again.turn(kernel.state, 0.0)
    assert [path.name for path in segments(tmp_path / "j")] == ["00000002.journal"]
    victim = next(iter(kernel.state.sequences.values()))
    kernel.state.notes = []
    kernel.state.finish(victim, FinishReason.KILLED, world.now)
    again.write(kernel.state.notes)
    third = Journal(tmp_path / "j", "process", 0.05).recover()
    assert third.fold.sequences[victim.rid].reason is FinishReason.KILLED
