"""Jobs: trees of sequences that belong together (`parent`), and who waits for whom (`after`).

A sequence without a parent is the root of a job of its own. A job is accounted as one: tokens, pages and sequences of all its members,
and inside a tenant its members queue with the job's arrival. Invariants: `waits_for` edges lead to live sequences only and form no
cycle; a job is known as long as one of its members is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmos.codes import FinishReason
from llmos.errors import InvalidRequest

if TYPE_CHECKING:
    from llmos.microkernel.sequence import Sequence

_GOOD_ENDS = frozenset({FinishReason.STOP, FinishReason.LENGTH, FinishReason.CLOSED})


@dataclass(slots=True, eq=False)
class Job:
    """`rid` is the root's. `members`: all whose records are still kept, live or ended."""

    rid: int
    owner: str
    sequences: int = 0
    tokens: int = 0  # computed for it, without what its rows compute now
    members: dict[int, Sequence] = field(default_factory=dict)


def ended_well(reason: FinishReason) -> bool:
    """May those that waited for it go on?"""
    return reason in _GOOD_ENDS


class JobTable:
    """Edges between sequences. Which sequences there are is the kernel's business."""

    def __init__(self) -> None:
        self._followers: dict[int, dict[int, Sequence]] = {}  # rid -> those that wait for it

    def enter(self, seq: Sequence) -> None:
        """A new sequence belongs to its job."""
        seq.job.sequences += 1
        seq.job.members[seq.rid] = seq

    def forget(self, seq: Sequence) -> None:
        """Its record is dropped."""
        del seq.job.members[seq.rid]

    def hold(self, seq: Sequence, predecessors: list[Sequence]) -> None:
        """`seq` waits for these live sequences instead of those it waited for. Raises `InvalidRequest` if it would wait for itself."""
        for other in predecessors:
            if self.waits(other, seq):
                text = f"after: sequence {seq.rid} would wait for itself through {other.rid}"
                raise InvalidRequest(text, field="after", rid=seq.rid)
        for rid in seq.waits_for:
            del self._followers[rid][seq.rid]
        seq.waits_for = {other.rid for other in predecessors}
        for other in predecessors:
            assert other.reason is None, f"nobody waits for sequence {other.rid}, which has ended"
            self._followers.setdefault(other.rid, {})[seq.rid] = seq

    def ended(self, seq: Sequence) -> list[Sequence]:
        """`seq` is over: those that waited for it and now wait for nobody, or all of them if it ended badly."""
        for rid in seq.waits_for:
            del self._followers[rid][seq.rid]
        seq.waits_for = set()
        followers = list(self._followers.pop(seq.rid, {}).values())
        for follower in followers:
            follower.waits_for.discard(seq.rid)
        assert seq.reason is not None
        return followers if not ended_well(seq.reason) else [each for each in followers if not each.waits_for]

    def waits(self, one: Sequence, other: Sequence) -> bool:
        """Does `one` wait for `other`, maybe through others, or is it the same? Looks at those that wait for `other`."""
        seen: set[int] = set()
        todo = [other.rid]
        while todo:
            rid = todo.pop()
            if rid == one.rid:
                return True
            if rid not in seen:
                seen.add(rid)
                todo += self._followers.get(rid, {})
        return False
