"""A sequence: the process of llmos. Its tokens, its page table, its place in life.

State table (every other transition is a bug; `move` asserts it). "Pages": device pages in its page table.

    from        to          when                                               pages           row
    WAITING     RUNNING     admitted by the scheduler                          maybe -> yes    no -> yes
    WAITING     BLOCKED     its turn is cancelled; its prefix was all cached   maybe           no
    RUNNING     PREEMPTED   the pool is full or the executor died              yes -> no       yes -> no
    RUNNING     SWAPPED     as PREEMPTED, its KV was copied to host pages      yes -> no       yes -> no
    RUNNING     BLOCKED     an open sequence has nothing more to compute       yes             yes -> no
    PREEMPTED   RUNNING     admitted again, recomputes                         no -> yes       no -> yes
    SWAPPED     RUNNING     admitted again, its KV is copied back              no -> yes       no -> yes
    BLOCKED     WAITING     it got input or a turn; who it waited for is done  maybe           no
    SUSPENDED   WAITING     its owner resumes it and it has work               maybe           no
    SUSPENDED   BLOCKED     its owner resumes it and it has none               maybe           no
    any live    SUSPENDED   its owner suspends it                              maybe           no
    any live    FINISHED    stop, length, cancel, kill, close, failure         no              no
    PREEMPTED, SWAPPED -> BLOCKED: as WAITING -> BLOCKED

A sequence without a row that holds pages ("maybe") keeps them only until somebody else needs them; then they are swapped to the host
or dropped.

A one-shot sequence has one turn: it generates and ends. One that is `silent` has no output at all: it is a text for an encoder, or a
prompt that is only scored, and ends when all its tokens are computed; what comes of it is `result` (results.py). An open sequence has
any number of turns: each `begin_turn` continues it by output whose offsets count from 0, and between turns it is BLOCKED with
`max_len == len(tokens)`. Prefill, chunked prefill, decode, resume and the prefill of new input are one rule: the tokens computed chase
the tokens known. While a sequence runs, that accounting is kept in the row table (rows.py); what is here is valid in every state.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from llmos.codes import FinishReason, SeqState
from llmos.microkernel.jobs import Job
from llmos.microkernel.timeline import Cause, Timeline
from llmos.protocol.messages import SeqEnd, Usage
from llmos.protocol.params import SamplingParams

_LEAVES = frozenset({SeqState.SUSPENDED, SeqState.FINISHED})
TRANSITIONS: dict[SeqState, frozenset[SeqState]] = {
    SeqState.WAITING: frozenset({SeqState.RUNNING, SeqState.BLOCKED}) | _LEAVES,
    SeqState.RUNNING: frozenset({SeqState.PREEMPTED, SeqState.SWAPPED, SeqState.BLOCKED}) | _LEAVES,
    SeqState.PREEMPTED: frozenset({SeqState.RUNNING, SeqState.BLOCKED}) | _LEAVES,
    SeqState.SWAPPED: frozenset({SeqState.RUNNING, SeqState.BLOCKED, SeqState.PREEMPTED}) | _LEAVES,
    SeqState.BLOCKED: frozenset({SeqState.WAITING}) | _LEAVES,
    SeqState.SUSPENDED: frozenset({SeqState.WAITING, SeqState.BLOCKED, SeqState.FINISHED}),
    SeqState.FINISHED: frozenset(),
}
QUEUED = frozenset({SeqState.WAITING, SeqState.PREEMPTED, SeqState.SWAPPED})
NO_ROW = -1
GENERATES = -1  # as `second_at`
_MOST_BAD_TIMES = 3  # in one turn: each time all of it is computed again
NOBODY = 0  # no peer has this number

# What an open sequence is given to the executor with while it only prefills: nothing is sampled.
PREFILL_ONLY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=0)

_CAUSE_OF = {
    SeqState.WAITING: Cause.QUEUE,
    SeqState.RUNNING: Cause.PREFILL,  # decode begins with the first token of this stay in a row
    SeqState.PREEMPTED: Cause.PREEMPTED,
    SeqState.SWAPPED: Cause.SWAPPED,
    SeqState.SUSPENDED: Cause.SUSPENDED,
    SeqState.BLOCKED: Cause.BLOCKED,
    SeqState.FINISHED: Cause.FINISHED,
}


@dataclass(slots=True, eq=False)
class Sequence:
    """See the module docstring. `reader` is the peer that gets its tokens, or NOBODY."""

    rid: int
    owner: str
    model: str
    reader: int
    tokens: array[int]
    prompt_len: int  # where the output of the newest turn begins
    max_len: int  # `prompt_len` plus the most output tokens of this turn
    params: SamplingParams
    accepted_at: float
    job: Job
    parent: int | None = None
    is_open: bool = False
    client_request_id: str | None = None
    request_digest: bytes = b""  # of what the client asked for under that id
    attended: bool = False  # somebody has read it: if nobody does any more, it is an orphan
    nice: int = 0
    deadline: float | None = None  # absolute, by the same clock as `accepted_at`
    second_at: int = GENERATES  # of a text for an encoder: where its second part begins, 0 = it has none

    state: SeqState = SeqState.BLOCKED
    reason: FinishReason | None = None
    generating: bool = False  # a turn is under way
    wants_prefill: bool = False  # an open sequence got input that is to be computed ahead of its next turn
    waits_for: set[int] = field(default_factory=set)  # sequences that have to end before it may run
    awaits_reader: bool = (
        False  # others needed what it had in a row, and its reader is too far behind for it to run anyway
    )
    heir_of: Sequence | None = None  # it was forked from this one, which still computes what both need
    heirs: list[Sequence] = field(default_factory=list)

    row: int = NO_ROW
    page_table: array[int] = field(default_factory=lambda: array("i"))
    host_pages: array[int] = field(default_factory=lambda: array("i"))  # its KV, if it is swapped out
    bad_at: int = -1  # how long it was when its numbers went bad last
    bad_times: int = 0  # in this turn
    page_hashes: list[bytes] = field(default_factory=list)  # chain over full pages of `tokens`
    result: array[int] = field(default_factory=lambda: array("i"))  # what was computed beside tokens, in 4-byte words
    kept_tokens: int = 0  # without a row: tokens whose KV is in `page_table` or `host_pages`
    num_pending: int = 0  # without a row: samples on their way from steps in flight when it lost the row
    num_void: int = 0  # how many of those are not wanted any more: the turn they belong to is over

    stop_ids: frozenset[int] = field(init=False)
    cached_tokens: int = 0
    preemptions: int = 0
    suspensions: int = 0
    swaps: int = 0
    forks: int = 0
    acked: int = 0  # output tokens that the reader has read
    limited_from: float = 0.0  # in the queue: its tenant's `limited_s` when it came
    turn_at: float = field(init=False)
    started_at: float | None = None  # when this turn got its first row
    ended_at: float | None = None
    last_reader: int = NOBODY  # of the turn that is over
    end: SeqEnd | None = None  # of the newest turn that is over
    timeline: Timeline = field(init=False)

    def __post_init__(self) -> None:
        self.stop_ids = frozenset(self.params.stop_token_ids)
        self.turn_at = self.accepted_at
        self.timeline = Timeline(self.accepted_at, Cause.BLOCKED)

    def move(self, state: SeqState, now: float) -> None:
        assert state in TRANSITIONS[self.state], f"sequence {self.rid}: {self.state.name} -> {state.name}"
        self.state = state
        waits_for_client = state is SeqState.BLOCKED and self.awaits_reader
        self.timeline.enter(Cause.CLIENT if waits_for_client else _CAUSE_OF[state], now)

    @property
    def num_output(self) -> int:
        """Committed output tokens of the newest turn."""
        return len(self.tokens) - self.prompt_len

    @property
    def encodes(self) -> bool:
        """Is it a text for an encoder?"""
        return self.second_at != GENERATES

    @property
    def silent(self) -> bool:
        """Does it have a turn without output?"""
        return self.generating and self.max_len == self.prompt_len

    @property
    def has_work(self) -> bool:
        """Is there anything to compute?"""
        return self.generating or self.wants_prefill

    @property
    def held_back(self) -> bool:
        """Does it wait for other sequences, or for its reader?"""
        return bool(self.waits_for) or self.heir_of is not None or self.awaits_reader

    def append(self, tokens: array[int]) -> None:
        """More input between turns."""
        assert not self.generating
        self.tokens.extend(tokens)
        self.prompt_len = self.max_len = len(self.tokens)
        self.end, self.wants_prefill = None, len(self.tokens) > 1

    def begin_turn(self, params: SamplingParams, max_output: int, reader: int, now: float) -> None:
        """From here on it generates up to `max_output` tokens for `reader`."""
        assert not self.generating
        self.generating, self.wants_prefill = True, False
        self.params = params
        self.stop_ids = frozenset(params.stop_token_ids)
        self.prompt_len = len(self.tokens)
        self.max_len = self.prompt_len + max_output
        self.reader, self.acked, self.end = reader, 0, None
        self.turn_at, self.started_at = now, None
        self.bad_at, self.bad_times = -1, 0

    def end_turn(self, num_output: int) -> None:
        """The turn is over with its first `num_output` tokens; what is still on its way does not count."""
        assert self.generating
        self.generating = False
        self.deadline = None
        self.num_void = self.num_pending
        self.cut_output(num_output)

    def cut_output(self, num_output: int) -> None:
        """Only the first `num_output` tokens of a turn that is over count."""
        del self.tokens[self.prompt_len + num_output :]
        self.max_len = len(self.tokens)

    def ends_with(self, token: int) -> FinishReason | None:
        """Why the turn ends now that `token` was appended, or None."""
        if token in self.stop_ids and self.num_output > self.params.least_output:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.max_len else None

    def may_try_again(self) -> bool:
        """Its numbers went bad. True: it may compute everything again once, in other pages; a few times if it got further since."""
        again = len(self.tokens) == self.bad_at
        self.bad_at = len(self.tokens)
        self.bad_times += 1
        return not again and self.bad_times <= _MOST_BAD_TIMES

    def usage(self, now: float, num_output: int | None = None) -> Usage:
        """Of the newest turn; `num_output`: if not all of its tokens count."""
        started = self.started_at if self.started_at is not None else now
        return Usage(
            prompt_tokens=self.prompt_len,
            cached_tokens=self.cached_tokens,
            output_tokens=self.num_output if num_output is None else num_output,
            preemptions=self.preemptions,
            queue_ms=(started - self.turn_at) * 1e3,
            total_ms=(now - self.turn_at) * 1e3,
        )
