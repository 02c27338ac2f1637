"""Damage to the journal's files: whatever byte is cut off or flipped, nothing is invented, and what is lost is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from journal_life import CORRUPT, KeptWorld, Truth, goes_on, lives
from kernel_world import GATEWAY

from llmos.microkernel import frames
from llmos.microkernel.frames import Damage
from llmos.microkernel.journal import Journal, Recovered
from llmos.microkernel.records import Record, SequenceRecord, TokensRecord
from llmos.protocol import messages as m
from llmos.protocol.codec import unpack_i64

# Some bytes in each run of the tests; every byte by `pytest -m soak tests/microkernel/test_journal_damage.py`.
STEPS = [61, pytest.param(1, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]
LIVES = ("one segment", "carrying", "after a gap", "next process")


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Truth]:
    folder = tmp_path_factory.mktemp("lives")
    return {name: Truth.read(directory) for name, directory in lives(folder)}


def recover(truth: Truth, directory: Path, segment: int, data: bytes) -> Recovered:
    """With other contents of one segment."""
    for number, (name, good) in enumerate(truth.files):
        (directory / name).write_bytes(data if number == segment else good)
    return Journal(directory, "process", 0.05).recover()


def kinds(truth: Truth) -> set[str]:
    records: list[Record | Damage] = [record for _, data in truth.files for record in frames.scan(data)]
    return {type(record).__name__ for record in records}


def test_the_lives_have_all_kinds_of_records(truths: dict[str, Truth]):
    everything = {
        "MetaRecord", "SequenceRecord", "ForkRecord", "TokensRecord", "AppendRecord", "TurnRecord", "EndRecord", "ChangeRecord",
        "ExecutorRecord",
    }  # fmt: skip
    assert kinds(truths["one segment"]) == everything
    assert [len(truth.files) for truth in truths.values()] == [1, 2, 2, 2]
    assert set(truths) == set(LIVES)


@pytest.mark.parametrize("name", LIVES)
def test_undamaged(truths: dict[str, Truth], tmp_path: Path, name: str):
    truth = truths[name]
    recovered = recover(truth, tmp_path, 0, truth.files[0][1])
    assert not recovered.fold.corrupt
    assert not recovered.fold.lost
    truth.judge(recovered, (len(truth.files), 0))
    goes_on(recovered)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", LIVES)
def test_flipped_bytes(truths: dict[str, Truth], tmp_path: Path, name: str, step: int):
    truth = truths[name]
    undamaged = recover(truth, tmp_path, 0, truth.files[0][1]).dropped
    for count, byte in enumerate(range(0, truth.num_bytes, step)):
        segment, at = truth.place(byte)
        data = bytearray(truth.files[segment][1])
        data[at] ^= 1 << (byte % 8)
        recovered = recover(truth, tmp_path, segment, bytes(data))
        assert recovered.dropped > undamaged or _is_torn(truth, segment, at), f"{name}: byte {byte} is not missed"
        truth.judge(recovered, (segment, at))
        if count % 9 == 0:
            goes_on(recovered)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", LIVES)
def test_cuts(truths: dict[str, Truth], tmp_path: Path, name: str, step: int):
    truth = truths[name]
    for count, byte in enumerate(range(0, truth.num_bytes, step)):
        segment, at = truth.place(byte)
        recovered = recover(truth, tmp_path, segment, truth.files[segment][1][:at])
        truth.judge(recovered, (segment, at))
        if count % 9 == 0:
            goes_on(recovered)


def _is_torn(truth: Truth, segment: int, at: int) -> bool:
    """Was the byte unreadable before?"""
    places = [found for found in frames.scan(truth.files[segment][1]) if isinstance(found, Damage)]
    return any(place.start <= at < place.end for place in places)


def test_what_was_lost_is_said_and_ends_as_corrupt(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """One record in the middle is damaged, with tokens of a stream and of an output of an open sequence, and one with a beginning."""
    world = KeptWorld(tmp_path / "j")
    world.start_executor()
    whole = world.submit([9], max_tokens=2, seed=1)
    world.run()
    stream, talk = world.submit([1, 2], max_tokens=30, seed=2), world.spawn([3, 4])
    world.continue_(talk, max_tokens=30, seed=3)
    for _ in range(5):
        world.step()
    before = len(world.streams[stream].ids)
    world.step()
    world.step()
    gone = world.submit([5, 6], max_tokens=30, seed=4)
    follower = world.submit([7], max_tokens=3, seed=5, after=(stream,))
    for _ in range(3):
        world.step()
    late = world.submit([8], max_tokens=4, seed=6)
    (path,) = (tmp_path / "j").glob("*.journal")
    path.write_bytes(_flip(path.read_bytes(), stream, before, gone))
    world.new_process()
    assert f"sequences that ended because of it: {stream}, {talk}" in caplog.text
    assert f"sequences of which nothing is left but later records: {gone}" in caplog.text
    assert world.keeper.summary.startswith("1 sequences from the journal; ")
    ended = world.kernel.state.ended
    reasons = {rid: ended[rid].reason.name for rid in (whole, stream, talk, follower)}
    assert reasons == {whole: "LENGTH", stream: CORRUPT.name, talk: CORRUPT.name, follower: "DEPENDENCY"}
    answer = world.ask(m.SeqAttach(world._next(), stream), GATEWAY)
    assert (len(answer.output) // 4, answer.end.reason) == (before, CORRUPT)
    assert list(world.kernel.state.sequences) == [late]
    assert world.kernel.state.next_rid() > late


def _flip(data: bytes, rid: int, offset: int, beginning: int) -> bytes:
    """Damage the record with a stream's token at this offset, and another with the beginning of a sequence."""
    found = bytearray(data)
    at = 0
    for record in frames.scan(data):
        end = at + len(frames.pack([record]))
        values = unpack_i64(record.columns) if isinstance(record, TokensRecord) else []
        is_token = (rid, offset) in zip(values[0::3], values[1::3])
        if is_token or (isinstance(record, SequenceRecord) and record.rid == beginning):
            found[end - 1] ^= 1
        at = end
    assert bytes(found) != data
    return bytes(found)
