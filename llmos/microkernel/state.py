"""What the microkernel knows, and the few operations through which all verbs change it.

Sequences are live (in exactly one lane) or ended; ended ones keep their record for a retention time, bounded in number and tokens, so
that a client can still collect. Invariants: a sequence ends once; its reader gets exactly one end per turn; who waits for a sequence
(`Wait`, `after`) hears of its end in the same event.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from heapq import heappush

from msgspec import structs

from llmos.codes import FinishReason, SeqState
from llmos.errors import NotFound, Unavailable, WrongState
from llmos.microkernel import transcript
from llmos.microkernel.archive import Archive
from llmos.microkernel.expiry import Expiry
from llmos.microkernel.jobs import Job, JobTable, ended_well
from llmos.microkernel.lane import Lane
from llmos.microkernel.limits import KernelLimits, SchedulerLimits
from llmos.microkernel.outbox import Outbox
from llmos.microkernel.records import (
    VERSION,
    EndRecord,
    ForkRecord,
    MetaRecord,
    Origin,
    Record,
)
from llmos.microkernel.scheduler import Scheduler
from llmos.microkernel.sequence import NOBODY, Sequence
from llmos.microkernel.tenants import TenantLimits
from llmos.protocol import messages as m

_DRAIN_RETRY_S = 1.0  # a client that is told so asks the llmosd that is started next
_GENERATION_BITS = 128 - 40  # of the root: 40 bits make the numbers of two processes differ


class State:
    """See the module docstring. `seed_root`: where the seeds of sequences that bring none come from."""

    def __init__(
        self, limits: KernelLimits, scheduling: SchedulerLimits, models: Iterable[str], seed_root: int, now: float
    ) -> None:
        self.limits = limits
        self.scheduling = scheduling
        self.started_at = now
        self.tenant_limits: dict[str, TenantLimits] = {}
        self.lanes: dict[str, Lane] = {}
        self._first_generation = seed_root >> _GENERATION_BITS
        for model in models:
            self._add_lane(model)
        self.sequences: dict[int, Sequence] = {}  # live
        self.ended = Archive(limits.retention_s)
        self.jobs = JobTable()
        self.services: tuple[m.ServiceStatus, ...] = ()
        self.storage = NOBODY
        self.storage_pid = 0
        self.supervisor = NOBODY
        self.outbox = Outbox()
        self.deadlines: list[tuple[float, int]] = []  # heap; entries that no longer hold stay until they surface
        self._idle = Expiry()  # open sequences
        self._waiters: dict[int, list[tuple[int, int]]] = {}  # rid -> (peer, its req)
        self.relayed: dict[int, tuple[int, int]] = {}  # our request to storage -> (asking peer, its req)
        self._relays = 0
        self.notes: list[Record] | None = None  # for the journal, since they were last taken; None = nobody wants them
        self.refusal: str | None = None  # why no new work is taken
        self.draining = False  # nor any more, because the daemon will stop
        self.quiet_since = now  # when an output ended last
        self._orphans = Expiry()  # one-shot sequences whose reader is gone
        self._requests: dict[tuple[str, str], int] = {}  # (owner, client_request_id) -> rid
        self._followers: list[tuple[Sequence, bool]] = []
        self.num_forgotten = 0  # records that were dropped, ever
        self._rids = 0
        self._seed_root = seed_root
        self._seeds = 0

    # ------------------------------------------------------------ looking up

    def live(self, rid: int, owner: str | None) -> tuple[Sequence, Scheduler]:
        """A live sequence that `owner` (None: anybody) may touch, and its scheduler. A foreign one is answered like an unknown one."""
        seq = self.known(rid, owner)
        if seq.reason is not None:
            raise WrongState(f"sequence {rid} has ended ({seq.reason.name.lower()})", field="rid", rid=rid)
        scheduler = self.lanes[seq.model].scheduler
        assert scheduler is not None, "sequences live only in lanes that are up"
        return seq, scheduler

    def known(self, rid: int, owner: str | None, field: str = "rid") -> Sequence:
        """A sequence, live or ended."""
        seq = self.sequences.get(rid) or self.ended.get(rid)
        if seq is None or owner not in (None, seq.owner):
            raise NotFound(f"no sequence {rid}", field=field, rid=rid)
        return seq

    def lane(self, model: str) -> Lane:
        lane = self.lanes.get(model)
        if lane is None:
            raise NotFound(f"no model {model!r}; served: {', '.join(sorted(self.lanes))}", field="model")
        return lane

    def _add_lane(self, model: str) -> None:
        lane = self.lanes[model] = Lane(model, self.scheduling, self.limits_of, self._first_generation)
        lane.tenants.meet(self.tenant_limits)

    def limits_of(self, tenant: str) -> TenantLimits:
        return self.tenant_limits.get(tenant) or TenantLimits()

    def relay(self, peer: int, req: int) -> int:
        """Our own number for a request that storage answers."""
        self._relays += 1
        self.relayed[self._relays] = (peer, req)
        return self._relays

    def requested(self, owner: str, client_request_id: str | None) -> Sequence | None:
        """The sequence that was made for this id, if its record is still kept."""
        rid = self._requests.get((owner, client_request_id)) if client_request_id is not None else None
        return None if rid is None else self.known(rid, owner)

    def check_accepting(self) -> None:
        """Raise `Unavailable` while no new work is taken."""
        if self.refusal is not None:
            raise Unavailable(self.refusal)
        if self.draining:
            raise Unavailable("llmosd is stopping and takes no new work", retry_after_s=_DRAIN_RETRY_S)

    # ------------------------------------------------------------ the journal

    def note(self, record: Record) -> None:
        """This happened: to be written down before anybody hears of it."""
        if self.notes is not None:
            self.notes.append(record)

    def note_change(self, seq: Sequence) -> None:
        self.note(transcript.change(seq))

    def meta(
        self, monotonic_s: float, wall_s: float, boot: str, origin: int = Origin.SEGMENT, previous_bytes: int = 0
    ) -> MetaRecord:
        root = self._seed_root.to_bytes(16, "little")
        return MetaRecord(VERSION, self._rids, self._seeds, root, monotonic_s, wall_s, boot, origin, previous_bytes)

    def continue_counting(self, rids: int, seeds: int, seed_root: bytes | None) -> None:
        """Numbers and seeds go on where an earlier process left off. Without its root there are other seeds."""
        self._rids, self._seeds = rids, seeds
        if seed_root is not None:
            self._seed_root = int.from_bytes(seed_root, "little")

    def restore_live(self, seq: Sequence, scheduler: Scheduler, predecessors: list[Sequence], now: float) -> None:
        """A sequence of an earlier process goes on."""
        self._register(seq, predecessors, now)
        if seq.attended and not seq.is_open:
            self._orphans.touch(seq.rid, now)
        scheduler.residents.enter(seq, now)

    def restore_ended(self, seq: Sequence, now: float) -> None:
        """The record of a sequence that ended in an earlier process; a live one whose model is not served any more ends now."""
        if seq.reason is None:
            seq.reason = FinishReason.EXECUTOR_LOST
            seq.generating, seq.state = False, SeqState.FINISHED
        if seq.ended_at is None:
            seq.ended_at = now
            seq.end = m.SeqEnd(seq.rid, int(seq.reason), seq.usage(now))
        self.jobs.enter(seq)
        self._keep_record(seq)

    # ------------------------------------------------------------ life

    def next_rid(self) -> int:
        self._rids += 1
        return self._rids

    def draw_seed(self) -> int:
        """63 bits that nobody can tell from the ones before."""
        self._seeds += 1
        digest = blake2b(self._seeds.to_bytes(8, "little"), key=self._seed_root.to_bytes(16, "little"), digest_size=8)
        return int.from_bytes(digest.digest(), "little") >> 1

    def job_for(self, rid: int, owner: str, parent: int | None) -> Job:
        """The parent's job, or one of its own. Raises `NotFound` naming `parent`."""
        return Job(rid, owner) if parent is None else self.known(parent, owner, "parent").job

    def predecessors(self, rids: tuple[int, ...], owner: str | None) -> list[Sequence]:
        """The live ones of those that a sequence is to wait for. Raises `NotFound`, or `WrongState` if one ended badly."""
        found = [self.known(rid, owner, "after") for rid in rids]
        for seq in found:
            if seq.reason is not None and not ended_well(seq.reason):
                text = f"after: sequence {seq.rid} has ended with {seq.reason.name.lower()}"
                raise WrongState(text, field="after", rid=seq.rid)
        return [seq for seq in found if seq.reason is None]

    def enter(self, seq: Sequence, scheduler: Scheduler, predecessors: list[Sequence], now: float) -> None:
        """A new sequence begins its life."""
        self._register(seq, predecessors, now)
        if self.notes is not None:
            self.note(transcript.whole(seq))
        scheduler.residents.enter(seq, now)

    def enter_fork(self, seq: Sequence, parent: Sequence, scheduler: Scheduler, now: float) -> None:
        """A new sequence begins as a copy of a live one."""
        self._register(seq, [self.sequences[rid] for rid in parent.waits_for], now)
        self.note(ForkRecord(seq.rid, parent.rid, seq.params, now))
        scheduler.residents.fork(parent, seq, now)

    def _register(self, seq: Sequence, predecessors: list[Sequence], now: float) -> None:
        self.sequences[seq.rid] = seq
        if seq.client_request_id is not None:
            self._requests[seq.owner, seq.client_request_id] = seq.rid
        self.jobs.enter(seq)
        self.jobs.hold(seq, predecessors)
        self.note_deadline(seq)
        self.touch(seq, now)

    def note_deadline(self, seq: Sequence) -> None:
        if seq.deadline is not None:
            heappush(self.deadlines, (seq.deadline, seq.rid))

    def touch(self, seq: Sequence, now: float) -> None:
        """Somebody used an open sequence."""
        if seq.is_open:
            self._idle.touch(seq.rid, now)

    def read_by(self, seq: Sequence, reader: int, now: float) -> None:
        """The sequence's tokens go to `reader` from now on. Whoever read it before is told, unless nobody follows: then it left itself."""
        if seq.reader not in (NOBODY, reader) and reader != NOBODY:
            self.outbox.send(seq.reader, m.SeqReplaced(seq.rid))
        seq.reader = reader
        if reader != NOBODY:
            seq.attended = True
            self._orphans.drop(seq.rid)
        scheduler = self.lanes[seq.model].scheduler
        if scheduler is not None and seq.reason is None:
            scheduler.residents.note_read(seq, now)

    def orphan(self, seq: Sequence, now: float) -> None:
        """The reader of a one-shot sequence died. Somebody else may go on reading for a while."""
        self.read_by(seq, NOBODY, now)
        self._orphans.touch(seq.rid, now)

    def forget_requests(self, peer: int) -> None:
        """Nobody is there any more to be answered."""
        for rid, waiting in list(self._waiters.items()):
            self._waiters[rid] = [(other, req) for other, req in waiting if other != peer]
            if not self._waiters[rid]:
                del self._waiters[rid]
        self.relayed = {number: asked for number, asked in self.relayed.items() if asked[0] != peer}

    def wait(self, seq: Sequence, peer: int, req: int) -> None:
        """Answer `peer` when the sequence ends."""
        if seq.reason is not None:
            self.outbox.send(peer, _waited(req, seq))
        else:
            self._waiters.setdefault(seq.rid, []).append((peer, req))

    def end_output(self, seq: Sequence, reason: FinishReason, now: float, num_output: int | None = None) -> None:
        """A turn is over: an open sequence rests, another one ends. `num_output`: how many of its tokens count."""
        if not seq.is_open:
            self.finish(seq, reason, now, num_output)
            return
        scheduler = self.lanes[seq.model].scheduler
        assert scheduler is not None
        count = seq.num_output if num_output is None else num_output
        self._tell_end(seq, reason, now, count)
        self.note(EndRecord(seq.rid, count, seq.end, 0, now))
        scheduler.residents.end_turn(seq, count, now)
        self.touch(seq, now)

    def refit(self, lane: Lane, now: float) -> None:
        """Pages or limits changed without asking. Who can not become as long as it was told ends earlier, at once if it is too long."""
        scheduler = lane.scheduler
        assert scheduler is not None
        for seq in scheduler.residents.live():
            if seq.generating and seq.encodes != bool(scheduler.output_size):
                self.end_output(seq, FinishReason.EXECUTOR_LOST, now)  # the model is of another kind now
                continue
            most = lane.capacity(seq.owner)
            if seq.max_len <= most:
                continue
            if not seq.generating:
                scheduler.residents.rest(seq, now)  # it can not be computed, only looked at, forked and closed
            elif len(seq.tokens) >= most:
                self.end_output(seq, FinishReason.LENGTH, now)
            else:
                scheduler.residents.shorten(seq, most)

    def cut_output(self, seq: Sequence, num_output: int, now: float) -> None:
        """An open sequence's turn is over, and now it turns out that a stop string had ended it before `num_output`."""
        scheduler = self.lanes[seq.model].scheduler
        assert scheduler is not None
        assert seq.end is not None
        usage = structs.replace(seq.end.usage, output_tokens=num_output)
        seq.end = m.SeqEnd(seq.rid, int(FinishReason.STOP), usage)
        self.note(EndRecord(seq.rid, num_output, seq.end, 0, now))
        seq.cut_output(num_output)
        scheduler.residents.forget_cut(seq)

    def finish(self, seq: Sequence, reason: FinishReason, now: float, num_output: int | None = None) -> None:
        """End a live sequence of a lane that is up."""
        scheduler = self.lanes[seq.model].scheduler
        assert scheduler is not None
        scheduler.residents.finish(seq, reason, now)
        self.close_record(seq, reason, now, num_output)

    def close_record(self, seq: Sequence, reason: FinishReason, now: float, num_output: int | None = None) -> None:
        """The one terminal record of a sequence that left its lane."""
        seq.reason, seq.ended_at = reason, now
        count = seq.num_output if num_output is None else num_output
        if seq.generating:
            self._tell_end(seq, reason, now, count)
            seq.generating = False
        self.note(EndRecord(seq.rid, count, seq.end, int(reason), now, seq.result.tobytes()))
        del self.sequences[seq.rid]
        self._idle.drop(seq.rid)
        self._orphans.drop(seq.rid)
        self._keep_record(seq)
        for peer, req in self._waiters.pop(seq.rid, ()):
            self.outbox.send(peer, _waited(req, seq))
        self._followers += [(each, ended_well(reason)) for each in self.jobs.ended(seq)]

    def _keep_record(self, seq: Sequence) -> None:
        self.ended.keep(seq)
        if seq.client_request_id is not None:
            self._requests[seq.owner, seq.client_request_id] = seq.rid

    def settle(self, now: float) -> None:
        """Last act of every event: those that waited for a sequence that ended go on, or end too."""
        while self._followers:
            seq, may_go_on = self._followers.pop()
            scheduler = self.lanes[seq.model].scheduler
            if seq.reason is not None or scheduler is None:
                continue
            if may_go_on:
                scheduler.residents.wake(seq, now)
            else:
                self.finish(seq, FinishReason.DEPENDENCY, now)

    def _tell_end(self, seq: Sequence, reason: FinishReason, now: float, num_output: int) -> None:
        seq.end = m.SeqEnd(seq.rid, int(reason), seq.usage(now, num_output))
        self.outbox.end(seq.reader, seq.end)
        self.lanes[seq.model].measures.turn_ended(int(reason))
        self.quiet_since = now
        seq.last_reader, seq.reader = seq.reader, NOBODY
        if not seq.is_open:
            del seq.tokens[seq.prompt_len + num_output :]

    def expire(self, now: float) -> None:
        """Drop old records and end open sequences that nobody uses."""
        while (forgotten := self.ended.next_to_forget(now)) is not None:
            self._forget(forgotten)
        while (rid := self._orphans.older_than(now - self.limits.linger_s)) is not None:
            self.finish(self.sequences[rid], FinishReason.CANCELLED, now)
        while (rid := self._idle.older_than(now - self.limits.idle_timeout_s)) is not None:
            seq = self.sequences[rid]
            if seq.has_work or seq.held_back:
                self._idle.touch(rid, now)
            else:
                self.finish(seq, FinishReason.IDLE, now)

    def _forget(self, seq: Sequence) -> None:
        self.num_forgotten += 1
        self.jobs.forget(seq)
        if seq.client_request_id is not None and self._requests.get((seq.owner, seq.client_request_id)) == seq.rid:
            del self._requests[seq.owner, seq.client_request_id]

    def check(self) -> None:
        """Assert all invariants; O(everything)."""
        assert not self._followers
        for lane in self.lanes.values():
            if lane.scheduler is not None:
                lane.scheduler.check()
        live = [seq for lane in self.lanes.values() if lane.scheduler for seq in lane.scheduler.residents.live()]
        assert sorted(seq.rid for seq in live) == sorted(self.sequences), "a sequence is lost or held twice"
        assert all(seq.reason is None for seq in live)
        self.ended.check()
        for seq in live:
            assert all(rid in self.sequences for rid in seq.waits_for), f"sequence {seq.rid} waits for one that ended"
            assert seq.job.members[seq.rid] is seq


def _waited(req: int, seq: Sequence) -> m.Waited:
    assert seq.reason is not None
    assert seq.ended_at is not None
    usage = seq.end.usage if seq.end is not None else seq.usage(seq.ended_at)
    return m.Waited(req, seq.rid, int(seq.reason), usage)
