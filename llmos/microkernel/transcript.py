"""What the journal is told of a sequence as it is now. The way back is recovery.py."""

from __future__ import annotations

from llmos.codes import SeqState
from llmos.microkernel.records import ChangeRecord, SequenceRecord
from llmos.microkernel.sequence import Sequence
from llmos.protocol.codec import pack_i32


def whole(seq: Sequence) -> SequenceRecord:
    """All that is to be known of a sequence, live or ended."""
    return SequenceRecord(
        rid=seq.rid,
        owner=seq.owner,
        model=seq.model,
        tokens=pack_i32(seq.tokens),
        prompt_len=seq.prompt_len,
        max_len=seq.max_len,
        params=seq.params,
        accepted_at=seq.accepted_at,
        job=seq.job.rid,
        parent=seq.parent,
        is_open=seq.is_open,
        client_request_id=seq.client_request_id,
        nice=seq.nice,
        deadline=seq.deadline,
        generating=seq.generating,
        wants_prefill=seq.wants_prefill,
        suspended=seq.state is SeqState.SUSPENDED,
        after=tuple(sorted(seq.waits_for)),
        forks=seq.forks,
        turn_at=seq.turn_at,
        started_at=seq.started_at,
        reason=0 if seq.reason is None else int(seq.reason),
        ended_at=seq.ended_at,
        end=seq.end,
        request_digest=seq.request_digest,
        attended=seq.attended,
        second_at=seq.second_at,
        result=b"" if seq.reason is None else seq.result.tobytes(),
    )


def change(seq: Sequence) -> ChangeRecord:
    """What its owner can change while it lives."""
    suspended = seq.state is SeqState.SUSPENDED
    return ChangeRecord(seq.rid, seq.nice, seq.deadline, suspended, tuple(sorted(seq.waits_for)))
