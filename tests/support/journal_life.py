"""A scripted life of a microkernel with a journal in real files, and the judge of what is read of them after damage.

`lives()` gives folders as a crash would leave them: one segment; two, of which the newer is being carried into; segments after a gap; a
new process that is carrying what it found. All kinds of records are in them.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kernel_world import GATEWAY, SUPERVISOR, World, token_at

from llmos.codes import FinishReason, PageFate
from llmos.microkernel import frames
from llmos.microkernel import journal as journal_module
from llmos.microkernel.frames import Damage
from llmos.microkernel.journal import Journal, Recovered
from llmos.microkernel.keeper import Keeper
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.records import Record, TokensRecord
from llmos.microkernel.recovery import Fold, restore
from llmos.microkernel.sequence import Sequence
from llmos.protocol import messages as m
from llmos.protocol.codec import unpack_i64

CORRUPT = FinishReason.JOURNAL_CORRUPT


class KeptWorld(World):
    """A world whose microkernel keeps a journal as its process does: written before anybody hears of anything."""

    def __init__(self, directory: Path, sync: str = "process", reserve_bytes: int = 0, **options: object) -> None:
        super().__init__(**options)
        self.directory = directory
        self.sync = sync
        self.reserve_bytes = reserve_bytes
        self.keeper = self._open()

    def _open(self) -> Keeper:
        return Keeper(self.kernel, Journal(self.directory, self.sync, 0.05, reserve_bytes=self.reserve_bytes), self.now)

    def _deliver(self, sends: list) -> None:
        self.keeper.write(self.now)
        super()._deliver(sends)

    def new_process(self) -> None:
        """The microkernel dies; the next one has read its journal, and has no executor yet."""
        self.keeper.close()
        self.kernel = Kernel(self.limits, self.kernel.state.scheduling, ("demo",), 2, self.now)
        self.executor = None
        self.keeper = self._open()


def live(world: KeptWorld) -> None:
    """Something of everything: all verbs that are recorded, forks, jobs, cut outputs, swaps, a death, ends of many kinds."""
    one, two, three = (world.submit([index, 2, 3], max_tokens=7 + 4 * index, seed=index) for index in range(3))
    talk = world.spawn([4, 5, 6, 7, 8])
    _steps(world, 4)
    world.append(talk, [9, 10])
    world.continue_(talk, max_tokens=6, seed=11)
    _steps(world, 3)
    kids = world.fork(talk, 2)
    copy = world.fork(two)[0]
    for rid in (*kids, copy):
        world.attach(rid)
    after = world.submit([7], max_tokens=1, parent=talk, after=(kids[0],))
    world.ask(m.Suspend(world._next(), kids[1], PageFate.SWAP))
    world.ask(m.Nice(world._next(), three, 5))
    _steps(world, 3)
    world.executor = None
    world.send(SUPERVISOR, m.ServiceDown("executor", "executor.demo", 1, replaced=True, asked=True))
    world.start_executor()
    world.ask(m.Kill(world._next(), copy))
    _steps(world, 8)
    world.ask(m.Resume(world._next(), kids[1]))
    _cut(world, kids[1], 3)
    world.append(talk, [12])
    world.continue_(talk, max_tokens=40, seed=13)
    _steps(world, 9)
    assert one in world.kernel.state.ended
    world.ask(m.Close(world._next(), kids[0]))
    world.submit([1] * 9, max_tokens=25, seed=20)
    _steps(world, 8)
    assert after in world.kernel.state.ended


def _steps(world: World, count: int) -> None:
    for _ in range(count):
        world.step()


def _cut(world: World, rid: int, upto: int) -> None:
    """A stop string was found."""
    _steps(world, 6)
    stream = world.streams[rid]
    world.send(GATEWAY, m.SeqFinish(rid, upto))
    del stream.ids[upto:]


def lives(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, folder) of journals as they lie there in the middle of things."""
    for name in ("one segment", "carrying", "after a gap", "next process"):
        directory = folder / name.replace(" ", "-")
        world = KeptWorld(directory, num_pages=30, host_pages=20, max_rows=6, retention_s=600.0)
        world.start_executor()
        live(world)
        carry, journal_module.CARRY_BYTES = journal_module.CARRY_BYTES, 0
        mend, journal_module.MEND_BYTES = journal_module.MEND_BYTES, 0
        try:
            _MOMENTS[name](world)
        finally:
            journal_module.CARRY_BYTES, journal_module.MEND_BYTES = carry, mend
        world.keeper.close()
        yield name, directory


def _carrying(world: KeptWorld) -> None:
    world.keeper._journal._renew(world.kernel.state, 0)
    _go_on(world)


def _after_a_gap(world: KeptWorld) -> None:
    def write(file: int, content: memoryview) -> int:
        real(file, content[: len(content) // 2])
        raise OSError(errno.EIO, "input/output error")

    real = os.write
    journal_module.os.write = write
    try:
        world.step()
        world.step()
    finally:
        journal_module.os.write = real
    world.now += 2.0
    _go_on(world)


def _next_process(world: KeptWorld) -> None:
    (path,) = world.directory.glob("*.journal")
    world.keeper.close()
    with path.open("ab") as file:
        file.write(b"\x40\x00\x00\x00torn")
    world.new_process()
    world.start_executor()
    for rid, seq in world.kernel.state.sequences.items():
        if seq.generating:
            world.attach(rid)
    _go_on(world)


def _go_on(world: KeptWorld) -> None:
    """A few turns, in which part of the sequences are carried; then the process is killed."""
    _steps(world, 3)
    if world.kernel.state.refusal is None:  # it is while the journal is being mended
        world.submit([2, 2], max_tokens=9, seed=30)
    journal_module.CARRY_BYTES = 1
    _steps(world, 2)
    assert world.keeper._journal.is_carrying


_MOMENTS = {
    "one segment": lambda world: None,
    "carrying": _carrying,
    "after a gap": _after_a_gap,
    "next process": _next_process,
}


# ------------------------------------------------------------ judging


Snapshot = tuple[list[int], int, bool, FinishReason | None]  # tokens, prompt_len, generating, reason


def snapshot(seq: Sequence) -> Snapshot:
    return list(seq.tokens), seq.prompt_len, seq.generating, seq.reason


@dataclass
class Truth:
    """What undamaged files say. `history[rid]`: (place, snapshot) after each record; a place is (segment, end of the record)."""

    files: list[tuple[str, bytes]]
    history: dict[int, list[tuple[tuple[int, int], Snapshot]]] = field(default_factory=lambda: defaultdict(list))

    @staticmethod
    def read(directory: Path) -> Truth:
        paths = sorted(directory.glob("*.journal"))
        truth = Truth([(path.name, path.read_bytes()) for path in paths])
        fold = Fold()
        for segment, (_, data) in enumerate(truth.files):
            at = 0
            for record in frames.scan(data):
                if isinstance(record, Damage):
                    fold.damage(record.end - record.start)
                    at = record.end
                    continue
                at += len(frames.pack([record]))
                fold.add(record)
                for rid in _rids(record):
                    if rid in fold.sequences:
                        truth.history[rid].append(((segment, at), snapshot(fold.sequences[rid])))
        return truth

    @property
    def num_bytes(self) -> int:
        return sum(len(data) for _, data in self.files)

    def place(self, byte: int) -> tuple[int, int]:
        """Which segment, and where in it."""
        for segment, (_, data) in enumerate(self.files):
            if byte < len(data):
                return segment, byte
            byte -= len(data)
        raise ValueError("behind the end")

    def judge(self, recovered: Recovered, damage: tuple[int, int]) -> None:
        """Every sequence is as it once was, not before what stands in front of the damage, or it ended for the damage; none is new."""
        found = recovered.fold.sequences
        for rid, history in self.history.items():
            before = [number for number, (place, _) in enumerate(history) if place <= damage]
            if rid not in found:
                assert not before, f"sequence {rid} was there before the damage, and is gone"
                continue
            allowed = [state for _, state in history[before[-1] if before else 0 :]]
            state = snapshot(found[rid])
            if state[3] is CORRUPT and state not in allowed:
                assert rid in recovered.fold.corrupt
                assert not state[0] or any(tokens == state[0] for tokens, *_ in allowed), (
                    f"sequence {rid} has others' tokens"
                )
            else:
                assert state in allowed, f"sequence {rid} was never so: {state}"
        assert found.keys() <= self.history.keys(), "sequences that never were"


def _rids(record: Record) -> list[int]:
    if isinstance(record, TokensRecord):
        return list(dict.fromkeys(unpack_i64(record.columns)[0::3]))
    rid = getattr(record, "rid", None)
    return [] if rid is None else [rid]


def goes_on(recovered: Recovered) -> None:
    """A microkernel is made of it, runs to the end of all outputs, and adds nothing but right tokens."""
    world = World(num_pages=60, host_pages=20)
    world.now = 1000.0
    world.kernel = Kernel(world.limits, world.kernel.state.scheduling, ("demo",), 2, world.now)
    before = {rid: snapshot(seq) for rid, seq in recovered.fold.sequences.items()}
    state = world.kernel.state
    restore(state, recovered.fold, 0.0, world.now)
    world.kernel.check()
    world.start_executor()
    world._deliver = lambda sends: World._deliver(
        world, [send for send in sends if not isinstance(send.message, m.SeqTokens)]
    )
    for rid, seq in list(state.sequences.items()):
        if seq.state.name == "SUSPENDED":
            world.ask(m.Resume(world._next(), rid))
    world.run()
    world.kernel.check()
    for rid, seq in {**state.sequences, **state.ended}.items():
        tokens, _, generating, _ = before[rid]
        assert list(seq.tokens[: len(tokens)]) == tokens
        if generating:
            more = range(len(tokens), len(seq.tokens))
            assert list(seq.tokens[len(tokens) :]) == [token_at(seq.params.seed, at) for at in more]
            assert not seq.generating or seq.waits_for, f"sequence {rid} does not go on"
    if recovered.fold.sequences:
        assert state.next_rid() > max(recovered.fold.sequences)
