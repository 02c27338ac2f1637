"""From journal records back to a living microkernel. Pure.

`Fold` collects records in their order; `restore` puts what came out into a fresh `State`. Sequences come back blocked, waiting or
suspended, without rows and pages, and are computed again from their tokens when an executor registers. Invariant: whatever records come,
in whatever damaged order, the fold never fails; what it can not use is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmos.codes import FinishReason, PageFate, SeqState
from llmos.microkernel.jobs import Job
from llmos.microkernel.records import (
    AppendRecord,
    ChangeRecord,
    EndRecord,
    ExecutorRecord,
    ForkRecord,
    MetaRecord,
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
    """See the module docstring. `ignored`: records about sequences that are not there, or that do not fit."""

    meta: MetaRecord | None = None
    executors: dict[str, ExecutorReady] = field(default_factory=dict)
    sequences: dict[int, Sequence] = field(default_factory=dict)
    after: dict[int, tuple[int, ...]] = field(default_factory=dict)
    suspended: set[int] = field(default_factory=set)
    jobs: dict[int, Job] = field(default_factory=dict)
    rids: int = 0
    seeds: int = 0
    ignored: int = 0

    def add(self, record: Record) -> None:
        if isinstance(record, (SequenceRecord, TurnRecord)):
            self.seeds += 1  # at most: not each of them drew one
        if isinstance(record, TokensRecord):
            self._tokens(record)
        elif isinstance(record, MetaRecord):
            self.meta = record
            self.rids, self.seeds = max(self.rids, record.rids), max(self.seeds, record.seeds)
        elif isinstance(record, SequenceRecord):
            self._begin(record)
        elif isinstance(record, ExecutorRecord):
            self.executors[record.ready.model] = record.ready
        elif isinstance(record, ForkRecord):
            self._fork(record)
        else:
            self._change(record)

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
        )
        seq.forks, seq.turn_at, seq.started_at, seq.end = record.forks, record.turn_at, record.started_at, record.end
        if record.reason:
            seq.reason, seq.ended_at = FinishReason(record.reason), record.ended_at
            seq.state = SeqState.FINISHED
        self._enter(seq, record.after, record.suspended)

    def _fork(self, record: ForkRecord) -> None:
        parent = self.sequences.get(record.parent)
        if parent is None:
            self.ignored += 1
            return
        child = Sequence(
            rid=record.rid,
            owner=parent.owner,
            model=parent.model,
            reader=NOBODY,
            tokens=parent.tokens[:],
            prompt_len=parent.prompt_len,
            max_len=parent.max_len,
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

    def _enter(self, seq: Sequence, after: tuple[int, ...], suspended: bool) -> None:
        self.sequences[seq.rid] = seq
        self.rids = max(self.rids, seq.rid)
        self.after[seq.rid] = after
        (self.suspended.add if suspended else self.suspended.discard)(seq.rid)

    def _tokens(self, record: TokensRecord) -> None:
        values = unpack_i64(record.columns)
        for rid, offset, token in zip(values[0::3], values[1::3], values[2::3]):
            seq = self.sequences.get(rid)
            if seq is None or not seq.generating or offset != seq.num_output:
                self.ignored += 1
            else:
                seq.tokens.append(token)
                if seq.started_at is None:  # it had a row, or there would be no token; nobody knows any more since when
                    seq.started_at = seq.turn_at

    def _change(self, record: AppendRecord | TurnRecord | EndRecord | ChangeRecord) -> None:
        seq = self.sequences.get(record.rid)
        if seq is None or seq.reason is not None:
            self.ignored += 1
        elif isinstance(record, AppendRecord):
            seq.append(unpack_i32(record.tokens))
        elif isinstance(record, TurnRecord) and not seq.generating:
            seq.begin_turn(record.params, record.max_len - len(seq.tokens), NOBODY, record.turn_at)
            seq.deadline = record.deadline
        elif isinstance(record, ChangeRecord):
            seq.nice, seq.deadline = record.nice, record.deadline
            self._enter(seq, record.after, record.suspended)
        elif isinstance(record, EndRecord):
            self._end(seq, record)
        else:
            self.ignored += 1

    def _end(self, seq: Sequence, record: EndRecord) -> None:
        seq.end = record.end
        if record.reason:
            del seq.tokens[seq.prompt_len + record.num_output :]
            seq.reason, seq.ended_at = FinishReason(record.reason), record.at
            seq.generating, seq.state = False, SeqState.FINISHED
        elif seq.generating:
            seq.end_turn(record.num_output)
        else:
            seq.cut_output(record.num_output)


def restore(state: State, fold: Fold, shift_s: float, now: float) -> None:
    """Bring back what `fold` found. `shift_s`: what to add to recorded times (0 while the machine was not started anew)."""
    if fold.meta is not None:
        state.continue_counting(fold.rids, fold.seeds, fold.meta.seed_root)
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
    for seq, scheduler in alive.values():
        seq.wants_prefill = False  # its next turn computes what it needs; all at once now would only be in the way
        after = [alive[rid][0] for rid in fold.after[seq.rid] if rid in alive]
        # Where records are missing, what is left could say that two wait for each other.
        state.restore_live(seq, scheduler, [other for other in after if not state.jobs.waits(other, seq)], now)
        if seq.rid in fold.suspended:
            scheduler.residents.suspend(seq, PageFate.DROP, now)
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
