"""What the microkernel tells people: lines of `ps`, where a sequence's time went, tenants. Reads, changes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from llmos.microkernel.lane import Lane
from llmos.microkernel.sequence import Sequence
from llmos.microkernel.timeline import Cause
from llmos.protocol.messages import Explained, SeqRow, TenantRow


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
    )


def explain(req: int, seq: Sequence, now: float) -> Explained:
    """A live sequence's time by cause."""
    spent = [seconds * 1e3 for seconds in seq.timeline.spent(now)]
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
