"""A sequence: the process of llmos. Its tokens, its page table, its place in life.

State table (every other transition is a bug; `move` asserts it):

    from        to          when                                          holds pages   holds a row
    WAITING     RUNNING     admitted by the scheduler                     maybe -> yes  no -> yes
    WAITING     SUSPENDED   its owner suspends it                         maybe         no
    WAITING     FINISHED    cancelled, killed, deadline, executor lost    maybe -> no   no
    RUNNING     PREEMPTED   the pool is full or the executor died         yes -> no     yes -> no
    RUNNING     SUSPENDED   its owner suspends it                         yes -> maybe  yes -> no
    RUNNING     FINISHED    stop, length, cancel, kill, failure           yes -> no     yes -> no
    PREEMPTED   RUNNING     admitted again, recomputes                    no -> yes     no -> yes
    PREEMPTED   SUSPENDED   its owner suspends it                         no            no
    PREEMPTED   FINISHED    as WAITING, or its last token came            no            no
    SUSPENDED   WAITING     its owner resumes it                          maybe         no
    SUSPENDED   FINISHED    as PREEMPTED                                  maybe -> no   no

A sequence without a row that holds pages ("maybe") keeps them only until somebody else needs them.

Prefill, chunked prefill, decode and resume are one rule: the tokens computed chase the tokens known. While a sequence runs, that
accounting is kept in the row table (rows.py); what is here is valid in every state.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from llmos.codes import FinishReason, SeqState
from llmos.microkernel.timeline import Cause, Timeline
from llmos.protocol.messages import Usage
from llmos.protocol.params import SamplingParams

TRANSITIONS: dict[SeqState, frozenset[SeqState]] = {
    SeqState.WAITING: frozenset({SeqState.RUNNING, SeqState.SUSPENDED, SeqState.FINISHED}),
    SeqState.RUNNING: frozenset({SeqState.PREEMPTED, SeqState.SUSPENDED, SeqState.FINISHED}),
    SeqState.PREEMPTED: frozenset({SeqState.RUNNING, SeqState.SUSPENDED, SeqState.FINISHED}),
    SeqState.SUSPENDED: frozenset({SeqState.WAITING, SeqState.FINISHED}),
    SeqState.FINISHED: frozenset(),
}
NO_ROW = -1


_CAUSE_OF = {
    SeqState.WAITING: Cause.QUEUE,
    SeqState.RUNNING: Cause.PREFILL,  # decode begins with the first token of this stay in a row
    SeqState.PREEMPTED: Cause.PREEMPTED,
    SeqState.SUSPENDED: Cause.SUSPENDED,
    SeqState.FINISHED: Cause.FINISHED,
}


@dataclass(slots=True, eq=False)
class Sequence:
    """See the module docstring. `gateway` is the peer that gets its tokens."""

    rid: int
    owner: str
    model: str
    gateway: int
    client_request_id: str | None
    tokens: array[int]
    prompt_len: int
    max_len: int  # prompt plus the most output tokens it may get
    params: SamplingParams
    accepted_at: float
    stop_ids: frozenset[int] = field(init=False)
    state: SeqState = SeqState.WAITING
    reason: FinishReason | None = None
    row: int = NO_ROW
    page_table: list[int] = field(default_factory=list)
    page_hashes: list[bytes] = field(default_factory=list)  # chain over full pages of `tokens`
    num_pending: int = (
        0  # without a row: samples still on their way from steps that were in flight when it lost the row
    )
    cached_tokens: int = 0
    preemptions: int = 0
    suspensions: int = 0
    kept_tokens: int = 0  # without a row: tokens whose KV is in the pages it kept
    nice: int = 0
    deadline: float | None = None  # absolute, by the same clock as `accepted_at`
    acked: int = 0  # output tokens that the client has read
    started_at: float | None = None
    timeline: Timeline = field(init=False)

    def __post_init__(self) -> None:
        self.stop_ids = frozenset(self.params.stop_token_ids)
        self.timeline = Timeline(self.accepted_at)

    def move(self, state: SeqState, now: float) -> None:
        assert state in TRANSITIONS[self.state], f"sequence {self.rid}: {self.state.name} -> {state.name}"
        self.state = state
        self.timeline.enter(_CAUSE_OF[state], now)

    @property
    def num_output(self) -> int:
        """Committed output tokens."""
        return len(self.tokens) - self.prompt_len

    def ends_with(self, token: int) -> FinishReason | None:
        """Why the sequence ends now that `token` was appended, or None."""
        if token in self.stop_ids and self.num_output > self.params.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.max_len else None

    def usage(self, now: float) -> Usage:
        started = self.started_at if self.started_at is not None else now
        return Usage(
            prompt_tokens=self.prompt_len,
            cached_tokens=self.cached_tokens,
            output_tokens=self.num_output,
            preemptions=self.preemptions,
            queue_ms=(started - self.accepted_at) * 1e3,
            total_ms=(now - self.accepted_at) * 1e3,
        )
