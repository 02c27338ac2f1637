"""From journal records back to a living microkernel. Pure.

`Fold` collects records in their order; `restore` puts what came out into a fresh `State`. Sequences come back blocked, waiting or
suspended, without rows and pages, and are computed again from their tokens when an executor registers. Invariant: whatever records come,
in whatever damaged order, the fold never fails; what it can not use is counted.

Where records are missing (`damage`, or a segment after a gap) every sequence known until then is in doubt, until it comes whole. In doubt
it goes on from what is known while nothing more is said of it: that was its state once. What a record adds counts if it proves to fit (the
next token of a sequence that has only one turn, its end behind tokens that are there, absolute values); if it does not, the sequence ends
as JOURNAL_CORRUPT with what it had. Nothing is guessed.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from llmos.codes import FinishReason, PageFate, SeqState
from llmos.microkernel.frames import MIN_BYTES
from llmos.microkernel.jobs import Job, ended_well
from llmos.microkernel.records import (
    AppendRecord,
    ChangeRecord,
    EndRecord,
    ExecutorRecord,
    ForkRecord,
    MetaRecord,
    Origin,
    Record,
    SequenceRecord,
    TokensRecord,
    TurnRecord,
)
from llmos.microkernel.scheduler import Scheduler
from llmos.microkernel.sequence import NOBODY, Sequence
from llmos.microkernel.state import State
from llmos.protocol.codec import unpack_i32, unpack_i64
from llmos.protocol.messages import ExecutorReady


@dataclass(slots=True)
class Fold:
    """See the module docstring. `ignored`: records about sequences that are not there, or that do not fit. `corrupt`: those that ended
    for damage; `lost`: numbers of which nothing but later records is known."""

    meta: MetaRecord | None = None
    executors: dict[str, ExecutorReady] = field(default_factory=dict)
    sequences: dict[int, Sequence] = field(default_factory=dict)
    after: dict[int, tuple[int, ...]] = field(default_factory=dict)
    suspended: set[int] = field(default_factory=set)
    jobs: dict[int, Job] = field(default_factory=dict)
    rids: int = 0
    seeds: int = 0
    ignored: int = 0
    doubtful: set[int] = field(default_factory=set)
    corrupt: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    is_damaged: bool = False

    def damage(self, num_bytes: int) -> None:
        """So much can not be read here. No number that may have been given out in it is given out again."""
        self.is_damaged = True
        self.skip(num_bytes // MIN_BYTES + 1)
        self._doubt()

    def skip(self, numbers: int) -> None:
        self.rids += numbers
        self.seeds += numbers

    def _doubt(self) -> None:
        self.doubtful.update(rid for rid, seq in self.sequences.items() if seq.reason is None)

    def add(self, record: Record) -> None:
        if isinstance(record, (SequenceRecord, TurnRecord)):
            self.seeds += 1  # at most: not each of them drew one
        if isinstance(record, TokensRecord):
            self._tokens(record)
        elif isinstance(record, MetaRecord):
            self._meta(record)
        elif isinstance(record, SequenceRecord):
            self._begin(record)
        elif isinstance(record, ExecutorRecord):
            self.executors[record.ready.model] = record.ready
        elif isinstance(record, ForkRecord):
            self._fork(record)
        else:
            self._change(record)

    def _meta(self, record: MetaRecord) -> None:
        self.meta = record
        self.rids, self.seeds = max(self.rids, record.rids), max(self.seeds, record.seeds)
        if record.origin == Origin.PROCESS:
            self.doubtful.clear()
        elif record.origin == Origin.GAP:
            self._doubt()

    def _begin(self, record: SequenceRecord) -> None:
        job = self.jobs.setdefault(record.job, Job(record.job, record.owner))
        seq = Sequence(
            rid=record.rid,
            owner=record.owner,
            model=record.model,
            reader=NOBODY,
            tokens=unpack_i32(record.tokens),
            prompt_len=record.prompt_len,
            max_len=record.max_len,
            params=record.params,
            accepted_at=record.accepted_at,
            job=job,
            parent=record.parent,
            is_open=record.is_open,
            client_request_id=record.client_request_id,
            nice=record.nice,
            deadline=record.deadline,
            generating=record.generating,
            wants_prefill=record.wants_prefill,
            request_digest=record.request_digest,
            attended=record.attended,
            second_at=record.second_at,
        )
        seq.forks, seq.turn_at, seq.started_at, seq.end = record.forks, record.turn_at, record.started_at, record.end
        if record.reason:
            seq.reason, seq.ended_at = FinishReason(record.reason), record.ended_at
            seq.state = SeqState.FINISHED
            seq.result = unpack_i32(record.result)
        self._enter(seq, record.after, record.suspended)

    def _fork(self, record: ForkRecord) -> None:
        parent = self.sequences.get(record.parent)
        if parent is None:
            self._unknown(record.rid, record.parent)
            return
        in_doubt = parent.rid in self.doubtful or parent.reason is not None
        child = Sequence(
            rid=record.rid,
            owner=parent.owner,
            model=parent.model,
            reader=NOBODY,
            tokens=array("i") if in_doubt else parent.tokens[:],
            prompt_len=0 if in_doubt else parent.prompt_len,
            max_len=0 if in_doubt else parent.max_len,
            params=record.params,
            accepted_at=record.accepted_at,
            job=parent.job,
            parent=parent.rid,
            is_open=parent.is_open,
            nice=parent.nice,
            deadline=parent.deadline,
            generating=parent.generating,
            wants_prefill=parent.wants_prefill,
        )
        parent.forks += 1
        self._enter(child, self.after.get(parent.rid, ()), suspended=False)
        if in_doubt:  # nobody knows what it was a copy of
            self._give_up(child)

    def _enter(self, seq: Sequence, after: tuple[int, ...], suspended: bool) -> None:
        self.sequences[seq.rid] = seq
        self.rids = max(self.rids, seq.rid)
        self.doubtful.discard(seq.rid)
        self.corrupt.discard(seq.rid)
        self.lost.discard(seq.rid)
        self._set(seq.rid, after, suspended)

    def _set(self, rid: int, after: tuple[int, ...], suspended: bool) -> None:
        self.after[rid] = after
        (self.suspended.add if suspended else self.suspended.discard)(rid)

    def _tokens(self, record: TokensRecord) -> None:
        values = unpack_i64(record.columns)
        find, doubtful = self.sequences.get, self.doubtful
        for rid, offset, token in zip(values[0::3], values[1::3], values[2::3]):
            seq = find(rid)
            fits = seq is not None and seq.generating and len(seq.tokens) == seq.prompt_len + offset
            if seq is None or not fits or (doubtful and seq.is_open and rid in doubtful):
                self._misfit(rid)
            else:
                seq.tokens.append(token)
                if seq.started_at is None:  # it had a row, or there would be no token; nobody knows any more since when
                    seq.started_at = seq.turn_at

    def _change(self, record: AppendRecord | TurnRecord | EndRecord | ChangeRecord) -> None:
        seq = self.sequences.get(record.rid)
        in_doubt = record.rid in self.doubtful
        if seq is None or seq.reason is not None:
            self._misfit(record.rid)
        elif isinstance(record, ChangeRecord):
            seq.nice, seq.deadline = record.nice, record.deadline
            self._set(seq.rid, record.after, record.suspended)
        elif isinstance(record, EndRecord):
            if in_doubt and not (record.reason and self._reaches(seq, record)):
                self._give_up(seq)
            else:
                self._end(seq, record)
        elif seq.generating or in_doubt:
            self._misfit(seq.rid)
        elif isinstance(record, TurnRecord):
            seq.begin_turn(record.params, record.max_len - len(seq.tokens), NOBODY, record.turn_at)
            seq.deadline = record.deadline
        else:
            seq.append(unpack_i32(record.tokens))

    def _reaches(self, seq: Sequence, record: EndRecord) -> bool:
        """Does a sequence in doubt have all that its end speaks of?"""
        return not seq.is_open and 0 <= record.num_output <= seq.num_output

    def _misfit(self, rid: int) -> None:
        """A record does not fit what is known. Without damage it is a leftover of a sequence that was forgotten."""
        seq = self.sequences.get(rid)
        if seq is not None and rid in self.doubtful:
            self._give_up(seq)
        elif seq is None:
            self._unknown(rid)
        else:
            self.ignored += 1

    def _unknown(self, *rids: int) -> None:
        self.ignored += 1
        if self.is_damaged:
            self.lost.update(rid for rid in rids if rid not in self.sequences)
            self.rids = max(self.rids, *rids)

    def _give_up(self, seq: Sequence) -> None:
        """What it was can not be known. When it ends is for the process to say that finds out."""
        seq.reason, seq.ended_at, seq.end = FinishReason.JOURNAL_CORRUPT, None, None
        seq.generating, seq.state = False, SeqState.FINISHED
        self.doubtful.discard(seq.rid)
        self.corrupt.add(seq.rid)

    def _end(self, seq: Sequence, record: EndRecord) -> None:
        seq.end = record.end
        if record.reason:
            del seq.tokens[seq.prompt_len + record.num_output :]
            seq.reason, seq.ended_at = FinishReason(record.reason), record.at
            seq.result = unpack_i32(record.result)
            seq.generating, seq.state = False, SeqState.FINISHED
        elif seq.generating:
            seq.end_turn(record.num_output)
        else:
            seq.cut_output(record.num_output)


def restore(state: State, fold: Fold, shift_s: float, now: float) -> None:
    """Bring back what `fold` found. `shift_s`: what to add to recorded times (0 while the machine was not started anew)."""
    state.continue_counting(fold.rids, fold.seeds, None if fold.meta is None else fold.meta.seed_root)
    for model, ready in fold.executors.items():
        if model in state.lanes:
            state.lanes[model].expect(ready, now)
    ended: list[Sequence] = []
    alive: dict[int, tuple[Sequence, Scheduler]] = {}
    for rid, seq in sorted(fold.sequences.items()):
        _shift(seq, shift_s, now)
        lane = state.lanes.get(seq.model)
        if seq.reason is not None or lane is None or lane.scheduler is None:
            ended.append(seq)
        else:
            alive[rid] = (seq, lane.scheduler)
    for seq in sorted(ended, key=lambda seq: now if seq.ended_at is None else seq.ended_at):
        state.restore_ended(seq, now)
    bad = {seq.rid for seq in ended if seq.reason is not None and not ended_well(seq.reason)}
    for seq, scheduler in alive.values():
        seq.wants_prefill = False  # its next turn computes what it needs; all at once now would only be in the way
        after = [alive[rid][0] for rid in fold.after[seq.rid] if rid in alive]
        # Where records are missing, what is left could say that two wait for each other.
        state.restore_live(seq, scheduler, [other for other in after if not state.jobs.waits(other, seq)], now)
        if seq.rid in fold.suspended:
            scheduler.residents.suspend(seq, PageFate.DROP, now)
    for rid, (seq, _) in alive.items():
        # What follows from the last record but could not be written any more.
        if seq.reason is None and not bad.isdisjoint(fold.after[rid]):
            state.finish(seq, FinishReason.DEPENDENCY, now)
        elif seq.generating and seq.num_output and (reason := seq.ends_with(seq.tokens[-1])) is not None:
            state.end_output(seq, reason, now)
    state.settle(now)
    state.outbox.drain()


def _shift(seq: Sequence, seconds: float, now: float) -> None:
    seq.accepted_at = min(now, seq.accepted_at + seconds)
    seq.turn_at = min(now, seq.turn_at + seconds)
    for name in ("started_at", "ended_at", "deadline"):
        moment = getattr(seq, name)
        if moment is not None:
            setattr(seq, name, moment + seconds if name == "deadline" else min(now, moment + seconds))
    seq.timeline = type(seq.timeline)(seq.accepted_at, seq.timeline.cause)
