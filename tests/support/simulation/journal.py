"""The microkernel's journal, without files: what was noted, folded at once, so that the microkernel could die at any moment.

Invariant, checked after every event: the fold of all notes says of every live sequence what the microkernel itself says.
"""

from __future__ import annotations

from llmos.codes import SeqState
from llmos.microkernel import records, transcript
from llmos.microkernel.kernel import Kernel
from llmos.microkernel.recovery import Fold, restore
from llmos.microkernel.sequence import Sequence
from simulation.ledger import Known

_SAME = (
    "owner", "model", "prompt_len", "params", "is_open", "parent", "generating", "reason", "nice", "deadline", "end",
    "client_request_id", "request_digest", "forks", "accepted_at", "turn_at", "ended_at",
)  # fmt: skip


class Journal:
    """Of one process of the microkernel."""

    def __init__(self, kernel: Kernel, now: float) -> None:
        self.kernel = kernel
        state = kernel.state
        state.notes = []
        self.fold = Fold()
        self._add(state.meta(now, 0.0, ""))
        for lane in state.lanes.values():
            if lane.capabilities is not None:
                self._add(records.ExecutorRecord(lane.capabilities))
        for seq in sorted((*state.sequences.values(), *state.ended.values()), key=lambda seq: seq.rid):
            self._add(transcript.whole(seq))

    def take(self) -> None:
        """What was noted is on disk from now on."""
        notes = self.kernel.state.notes
        assert notes is not None
        for record in notes:
            self._add(record)
        notes.clear()

    def _add(self, record: records.Record) -> None:
        self.fold.add(records.decode(records.encode(record)))

    def compare(self, live: dict[int, Known]) -> None:
        """Assert the invariant, but for the contents of tokens."""
        assert self.fold.ignored == 0, "the journal has records that do not fit"
        fold, sequences = self.fold, self.kernel.state.sequences
        for rid, seq in sequences.items():
            copy = fold.sequences[rid]
            assert (len(copy.tokens), copy.generating, copy.prompt_len, copy.nice, copy.deadline) == (
                len(seq.tokens), seq.generating, seq.prompt_len, seq.nice, seq.deadline,
            ), f"{live[rid].label if rid in live else rid}: the journal says something else"  # fmt: skip
            assert copy.max_len >= seq.max_len  # it may have less room since, and will find out again
            assert copy.reason is None
            assert (rid in fold.suspended) == (seq.state is SeqState.SUSPENDED)
            assert {other for other in fold.after[rid] if other in sequences} == seq.waits_for

    def recover(self, kernel: Kernel, now: float) -> None:
        """Make `kernel`, which is new, what the dead one was."""
        old = self.kernel.state
        restore(kernel.state, self.fold, 0.0, now)
        kernel.check()
        new = kernel.state
        assert new.sequences.keys() == old.sequences.keys()
        assert new.ended.keys() >= old.ended.keys()
        for before, after in ((old.sequences, new.sequences), (old.ended, new.ended)):
            for rid, seq in before.items():
                _compare(seq, after[rid])


def _compare(seq: Sequence, copy: Sequence) -> None:
    for name in _SAME:
        was, found = getattr(seq, name), getattr(copy, name)
        assert was == found, f"sequence {seq.rid}: {name} was {was}, after the crash {found}"
    assert seq.tokens == copy.tokens
    assert seq.waits_for == copy.waits_for
    assert seq.job.rid == copy.job.rid
    assert (seq.state is SeqState.SUSPENDED) == (copy.state is SeqState.SUSPENDED)
