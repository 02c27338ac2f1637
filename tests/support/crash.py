"""Kill and recover the microkernel of a `World`: what its journal says is all that is left."""

from __future__ import annotations

from kernel_world import GATEWAY, World

from llmos.microkernel import records, transcript
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.recovery import Fold, restore
from llmos.protocol import messages as m
from llmos.protocol.codec import unpack_i32


class Journaled:
    """Collects what the world's microkernel notes, as frames; `crash` makes a new one from them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.frames = [records.encode(world.kernel.state.meta(world.now, 0.0, ""))]
        world.kernel.state.notes = []

    def take(self) -> None:
        """What was noted so far is on disk."""
        notes = self.world.kernel.state.notes
        assert notes is not None
        self.frames += map(records.encode, notes)
        notes.clear()

    def crash(self, *, carried: bool = False) -> None:
        """The microkernel dies and comes back; then its executor registers and its gateway reads on.

        `carried`: from a segment that begins with everything whole instead of all records.
        """
        world = self.world
        self.take()
        old = world.kernel.state
        if carried:
            whole = [old.meta(world.now, 0.0, "")]
            ready = old.lanes["demo"].capabilities
            whole += [records.ExecutorRecord(ready)] if ready is not None else []
            known = sorted((*old.sequences.values(), *old.ended.values()), key=lambda seq: seq.rid)
            whole += [transcript.whole(seq) for seq in known]
            self.frames = [records.encode(record) for record in whole]
        fold = Fold()
        for frame in self.frames:
            fold.add(records.decode(frame))
        assert fold.ignored == 0
        world.kernel = Kernel(world.limits, old.scheduling, ("demo",), 2, world.now)
        restore(world.kernel.state, fold, 0.0, world.now)
        world.kernel.check()
        self._compare(old)
        world.kernel.state.notes = []
        world.executor = None
        world.start_executor()
        self._read_on()

    def _compare(self, old) -> None:
        """Everything that was promised to anybody is the same."""
        new = self.world.kernel.state
        assert new.sequences.keys() == old.sequences.keys()
        assert new.ended.keys() == old.ended.keys()
        for before, after in ((old.sequences, new.sequences), (old.ended, new.ended)):
            for rid, seq in before.items():
                self._same(seq, after[rid])

    def _same(self, seq, copy) -> None:
        same = (
            "owner model tokens prompt_len max_len params is_open parent generating reason nice deadline waits_for end"
            " client_request_id request_digest forks accepted_at turn_at ended_at"
        )
        for name in same.split():
            assert getattr(seq, name) == getattr(copy, name), f"sequence {seq.rid}: {name}"
        assert seq.job.rid == copy.job.rid
        assert (seq.state.name == "SUSPENDED") == (copy.state.name == "SUSPENDED")

    def _read_on(self) -> None:
        """As a gateway does: attach to all that generate, and check that nothing is lost or changed."""
        world = self.world
        for rid, seq in list(world.kernel.state.sequences.items()):
            stream = world.streams[rid]
            if seq.generating and stream.end is None:
                answer = world.ask(m.SeqAttach(world._next(), rid), GATEWAY)
                assert isinstance(answer, m.SeqAttached), answer
                ids = list(unpack_i32(answer.output))
                assert ids[: len(stream.ids)] == stream.ids, f"rid {rid}: delivered tokens changed"
                stream.ids = ids
