"""A disk that fails: whatever call it is, no token leaves before its record, what runs goes on, and all is written when it works again."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path

import pytest
from bad_disk import BadDisk
from journal_life import KeptWorld, live
from kernel_world import GATEWAY, params

from llmos.codes import ErrorCode, FinishReason, SeqState
from llmos.microkernel import frames
from llmos.microkernel import reserve as reserve_module
from llmos.microkernel.frames import Damage
from llmos.microkernel.records import SequenceRecord, TokensRecord
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32, unpack_i32, unpack_i64

ERRORS = (errno.EIO, errno.ENOSPC, errno.EFBIG)
# Some calls in each run of the tests; every call by `pytest -m soak tests/microkernel/test_journal_io.py`.
STEPS = [11, pytest.param(1, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])]


class Watched(KeptWorld):
    """Asserts that each token is in a file before anybody gets it, unless the microkernel says that it can not write."""

    def __init__(self, directory: Path, *, sync: str = "process", reserve_bytes: int = 0) -> None:
        self._written: set[tuple[int, int, int]] = set()
        self._read_upto: dict[Path, int] = {}
        self.unwritten = 0
        super().__init__(directory, sync, reserve_bytes, num_pages=30, host_pages=20, max_rows=6)
        self.start_executor()

    def _tokens(self, message: m.SeqTokens) -> None:
        self._look()
        values = unpack_i64(message.columns)
        missing = set(zip(values[0::3], values[1::3], values[2::3])) - self._written
        assert not missing or self.kernel.state.refusal is not None, f"told before it was written: {missing}"
        self.unwritten += len(missing)
        super()._tokens(message)

    def _look(self) -> None:
        """What is in the files now."""
        for path in self.directory.glob("*.journal"):
            start = self._read_upto.get(path, 0)
            data = path.read_bytes()[start:]
            for record in frames.scan(data):
                if isinstance(record, Damage):
                    break
                self._read_upto[path] = self._read_upto.get(path, 0) + len(frames.pack([record]))
                if isinstance(record, TokensRecord):
                    values = unpack_i64(record.columns)
                    self._written.update(zip(values[0::3], values[1::3], values[2::3]))
                elif isinstance(record, SequenceRecord):
                    output = unpack_i32(record.tokens)[record.prompt_len :]
                    self._written.update((record.rid, at, token) for at, token in enumerate(output))

    def known(self) -> dict[int, tuple]:
        """Of every sequence what has to survive."""
        state = self.kernel.state
        everything = {**state.sequences, **state.ended}.items()
        return {
            rid: (
                list(seq.tokens),
                seq.prompt_len,
                seq.generating,
                seq.reason,
                seq.end,
                seq.nice,
                seq.state is SeqState.SUSPENDED,
            )
            for rid, seq in everything
        }


def count_calls(directory: Path, sync: str) -> int:
    with BadDisk(directory) as disk:
        world = Watched(directory, sync=sync)
        live(world)
        world.keeper.close()
    assert {"open", "write"} <= set(disk.calls)
    assert ("fdatasync" in disk.calls) == (sync == "always")
    return len(disk.calls)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("sync", ["process", "always"])
def test_one_call_fails(tmp_path: Path, sync: str, number: int, step: int):
    """The journal takes a new segment at once and has everything in it: nothing is refused, nobody notices."""
    for nth in range(2, count_calls(tmp_path / "count", sync) + 1, step):
        directory = tmp_path / f"j{nth}"
        with BadDisk(directory) as disk:
            disk.error = number
            disk.fails = lambda name, count, nth=nth: count == nth
            world = Watched(directory, sync=sync)
            live(world)
        assert (disk.failed, world.unwritten) == (1, 0), f"call {nth}: {disk.calls[nth - 1]}"
        assert world.kernel.state.refusal is None
        known = world.known()
        world.new_process()
        assert world.known() == known, f"call {nth}: {disk.calls[nth - 1]}"
        world.keeper.close()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("number", ERRORS)
def test_from_one_call_on_everything_fails_for_a_while(tmp_path: Path, number: int, step: int):
    """New work is refused, what runs goes on to its end, and when the disk works again all of it is in the journal."""
    for nth in range(2, 60, step):
        directory = tmp_path / f"j{nth}"
        with BadDisk(directory) as disk:
            disk.error = number
            world = Watched(directory)
            disk.calls.clear()
            disk.fails = lambda name, count, nth=nth: count >= nth
            rids = []
            for index in itertools.count():
                try:
                    rids.append(world.submit([index], max_tokens=20, seed=index))
                except AssertionError as error:
                    assert str(error).startswith("refused: ")  # noqa: PT017
                    break
                world.step()
            world._pending_submits.clear()
            answer = world.replies[-1]
            assert answer.code == ErrorCode.UNAVAILABLE
            assert "the journal can not be written" in answer.message
            assert os.strerror(number).lower() in answer.message.lower()
            world.run()
            assert all(world.kernel.state.ended[rid].reason is FinishReason.LENGTH for rid in rids)
            world.now += 1.0
            tried = len(disk.calls)
            world._deliver(world.kernel.tick(world.now))
            assert tried < len(disk.calls) <= tried + 5, "it tries again now and then, and not more"
            disk.fails = lambda name, count: False
            world.now += 1.0
            world._deliver(world.kernel.tick(world.now))
        assert world.kernel.state.refusal is None
        rids.append(world.submit([1], max_tokens=3, seed=1))
        assert len(list(directory.glob("*.journal"))) <= 3, "failed attempts leave no files"
        known = world.known()
        world.new_process()
        assert world.known() == known
        world.keeper.close()


def test_a_full_disk_takes_the_reserve_for_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Room for new segments is kept back: running sequences stay durable, new ones wait until there is room for a reserve again."""
    size = 1 << 20
    free = 10 * size
    monkeypatch.setattr(reserve_module.Reserve, "_free", lambda self: free)
    directory = tmp_path / "j"
    with BadDisk(directory) as disk:
        disk.error = errno.ENOSPC
        world = Watched(directory, reserve_bytes=size)
        reserve = directory / "reserve"
        world._deliver(world.kernel.tick(world.now))
        assert reserve.stat().st_size == size
        rid = world.submit([1, 2], max_tokens=40, seed=3)
        world.step()
        free = 0
        disk.fails = lambda name, count: name == "write" and reserve.exists()
        for _ in range(10):
            world.step()
        assert not reserve.exists()
        assert (disk.failed, world.unwritten) == (1, 0)
        world.now += 1.0
        world.step()
        refused = world.ask(m.SeqSubmit(world._next(), "demo", pack_i32([1]), params(max_tokens=2), "alice"), GATEWAY)
        assert refused.code == ErrorCode.UNAVAILABLE
        assert refused.message == f"disk space is low: 0 MiB are free in {directory}, 2 are needed"
        world.run()
        assert world.streams[rid].ids == world.streams[rid].expected(40)
        free = 2 * size - 1
        world.now += 1.0
        world._deliver(world.kernel.tick(world.now))
        assert world.kernel.state.refusal is not None
        free = 2 * size
        world.now += 1.0
        world._deliver(world.kernel.tick(world.now))
        assert reserve.exists()
        assert world.kernel.state.refusal is None
        assert world.unwritten == 0


def test_without_room_nothing_is_taken_before_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reserve_module.Reserve, "_free", lambda self: (1 << 20) - 1)
    world = Watched(tmp_path / "j", reserve_bytes=1 << 20)
    world._deliver(world.kernel.tick(world.now))
    refused = world.ask(m.SeqSpawn(world._next(), "demo", pack_i32([1]), "alice"), GATEWAY)
    assert (refused.code, refused.message.partition(":")[0]) == (ErrorCode.UNAVAILABLE, "disk space is low")
    assert not (tmp_path / "j" / "reserve").exists()


@pytest.mark.parametrize("name", ["open", "write"])
def test_a_microkernel_that_comes_back_to_a_full_disk_serves_what_it_had(tmp_path: Path, name: str):
    directory = tmp_path / "j"
    world = Watched(directory)
    rid = world.submit([1, 2], max_tokens=30, seed=3)
    for _ in range(5):
        world.step()
    with BadDisk(directory) as disk:
        disk.error = errno.ENOSPC
        disk.fails = lambda called, count: called == name
        world.new_process()
        assert "the journal can not be written" in (world.kernel.state.refusal or "")
        world.start_executor()
        world.attach(rid)
        world.run()
        assert world.streams[rid].ids == world.streams[rid].expected(30)
        disk.fails = lambda called, count: False
        world.now += 1.0
        world._deliver(world.kernel.tick(world.now))
    assert world.kernel.state.refusal is None
    world.new_process()
    assert world.kernel.state.ended[rid].reason is FinishReason.LENGTH


def test_old_segments_that_can_not_be_deleted_stay_in_order_and_do_no_harm(tmp_path: Path):
    directory = tmp_path / "j"
    world = Watched(directory)
    live(world)
    known = world.known()
    with BadDisk(directory) as disk:
        disk.error = errno.EIO
        disk.fails = lambda name, count: name == "unlink"
        for _ in range(3):
            world.keeper._journal._renew(world.kernel.state, 0)
            world.now += 5.0
            world._deliver(world.kernel.tick(world.now))
        assert world.kernel.state.refusal is None
        assert [path.stem for path in sorted(directory.glob("*.journal"))] == [f"{number:08}" for number in range(1, 5)]
        world.new_process()
    assert world.known() == known
    world.now += 5.0
    world._deliver(world.kernel.tick(world.now))
    assert len(list(directory.glob("*.journal"))) == 1
