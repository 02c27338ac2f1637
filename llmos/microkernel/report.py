"""What the microkernel tells people: lines of `ps`, where a sequence's time went, tenants. Reads, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from llmos.codes import SeqState
from llmos.microkernel.jobs import Job
from llmos.microkernel.lane import Lane
from llmos.microkernel.sequence import Sequence
from llmos.microkernel.tenants import Tenant
from llmos.microkernel.timeline import Cause
from llmos.protocol.messages import Explained, JobRow, SeqRow, Stats, TenantRow


def row(seq: Sequence, now: float) -> SeqRow:
    """One line of `ps`; the rate is over the time in rows."""
    spent = seq.timeline.spent(now)
    computing = spent[Cause.PREFILL] + spent[Cause.DECODE] + spent[Cause.CLIENT]
    return SeqRow(
        rid=seq.rid,
        owner=seq.owner,
        model=seq.model,
        state=int(seq.state),
        prompt_tokens=seq.prompt_len,
        output_tokens=seq.num_output,
        max_tokens=seq.max_len - seq.prompt_len,
        pages=len(seq.page_table),
        cached_tokens=seq.cached_tokens,
        preemptions=seq.preemptions,
        age_ms=(now - seq.accepted_at) * 1e3,
        tokens_per_s=seq.num_output / computing if computing > 0 else 0.0,
        nice=seq.nice,
        job=seq.job.rid,
        host_pages=len(seq.host_pages),
        is_open=seq.is_open,
    )


def stats(req: int, seq: Sequence, now: float) -> Stats:
    """Everything about one sequence, live or ended."""
    now = now if seq.ended_at is None else seq.ended_at
    return Stats(
        req=req,
        row=row(seq, now),
        job=job(seq.job),
        num_tokens=len(seq.tokens),
        parent=seq.parent,
        after=tuple(sorted(seq.waits_for)),
        children=seq.forks,
        deadline_ms=None if seq.deadline is None else (seq.deadline - now) * 1e3,
        reason=0 if seq.reason is None else int(seq.reason),
        usage=seq.end.usage if seq.end is not None else seq.usage(now),
    )


def job(of: Job) -> JobRow:
    """What a job's sequences use together; `tokens` lags behind by what rows compute now."""
    live = [seq for seq in of.members.values() if seq.reason is None]
    return JobRow(of.rid, of.sequences, len(live), sum(len(seq.page_table) for seq in live), of.tokens)


def explain(req: int, seq: Sequence, tenant: Tenant, now: float) -> Explained:
    """A sequence's time by cause, to now or to its end."""
    now = now if seq.ended_at is None else seq.ended_at
    spent = [seconds * 1e3 for seconds in seq.timeline.spent(now)]
    if seq.state is SeqState.WAITING:  # what is known of the wait that goes on
        limited = (tenant.limited_s(now) - seq.limited_from) * 1e3
        spent[Cause.QUEUE] -= limited
        spent[Cause.QUOTA] += limited
    return Explained(
        req=req,
        rid=seq.rid,
        state=int(seq.state),
        age_ms=(now - seq.accepted_at) * 1e3,
        queue_ms=spent[Cause.QUEUE],
        prefill_ms=spent[Cause.PREFILL],
        decode_ms=spent[Cause.DECODE],
        preempted_ms=spent[Cause.PREEMPTED],
        suspended_ms=spent[Cause.SUSPENDED],
        client_ms=spent[Cause.CLIENT],
        preemptions=seq.preemptions,
        suspensions=seq.suspensions,
        cached_tokens=seq.cached_tokens,
        nice=seq.nice,
        quota_ms=spent[Cause.QUOTA],
        swapped_ms=spent[Cause.SWAPPED],
        blocked_ms=spent[Cause.BLOCKED],
        swaps=seq.swaps,
    )


def tenants(lanes: Iterable[Lane], name: str | None) -> tuple[TenantRow, ...]:
    """Limits and use of all tenants, or of one, on every model."""
    return tuple(
        TenantRow(
            tenant=tenant.name,
            model=lane.model,
            weight=tenant.limits.weight,
            max_pages=tenant.limits.max_pages,
            guaranteed_pages=tenant.limits.guaranteed_pages,
            max_running=tenant.limits.max_running,
            max_waiting=tenant.limits.max_waiting,
            tokens_per_s=tenant.limits.tokens_per_s,
            pages=tenant.pages,
            running=tenant.running,
            waiting=tenant.waiting,
            tokens=tenant.tokens,
        )
        for lane in lanes
        for tenant in lane.tenants.all
        if name in (None, tenant.name)
    )
