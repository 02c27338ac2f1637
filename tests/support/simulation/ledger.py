"""What the outside knows: every sequence with the answer it must give, every tenant's limits, and what requests must be refused.

Written from the contract (protocol/messages) only. What chance or timing decides inside the microkernel (the length of a fork's
inheritance, a drawn seed) is looked up there once and then holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from kernel_world import token_at

from llmos.codes import ErrorCode, FinishReason
from llmos.microkernel.jobs import ended_well
from llmos.microkernel.tenants import TenantLimits
from llmos.protocol.messages import SeqEnd
from llmos.protocol.params import SamplingParams

Problem = tuple[ErrorCode, str | None]  # a refusal and the field that it names
NOT_FOUND, WRONG, INVALID = ErrorCode.NOT_FOUND, ErrorCode.WRONG_STATE, ErrorCode.INVALID_REQUEST


@dataclass(slots=True, eq=False)
class Known:
    """One sequence as the outside knows it."""

    label: str
    rid: int
    owner: str
    model: str
    is_open: bool
    job: str  # label of its root
    born: float
    before: list[int]  # tokens in front of the newest output
    nice: int = 0
    parent: int | None = None

    output: list[int] = field(default_factory=list)  # all that the newest output can become
    natural: FinishReason = FinishReason.LENGTH  # how it ends by itself
    params: SamplingParams | None = None  # of the newest output
    generating: bool = False
    inherited: int = 0  # output tokens that a fork began with
    reader: int = 0
    last_reader: int = 0  # of the turn that is over
    read: int = 0  # the next offset for the reader
    acked: int = 0
    unread: int = 0  # what it may have without being read: it came while it had no reader
    appended: tuple[int, list[int]] | None = None  # the newest input and where it went
    last_end: SeqEnd | None = None  # of the newest output, once it is over
    turn_at: float = 0.0

    after: set[int] = field(default_factory=set)
    deadline: float | None = None
    suspended: bool = False
    children: int = 0
    touched: float = 0.0
    resting_since: float | None = None
    attended: bool = False  # somebody has read it
    orphan_since: float | None = None  # its reader died
    request: tuple[str, bytes] | None = None  # the client's own id, and what was asked under it
    reason: FinishReason | None = None
    ended_at: float = 0.0

    seen: int = 0  # tokens that were compared with the microkernel's
    where: str = "BLOCKED"  # its state; in a row prefill or decode, or client where it waits for that
    since: float = 0.0  # there
    row_tokens: int = 0  # known when it got its row
    started: bool = False  # this turn has had a row
    deaths: int = 0  # of executors while it was in flight, since it last got a token
    length_at_death: int = -1
    spent: dict[str, float] = field(default_factory=dict)  # seconds by where
    times_lost: bool = False  # the microkernel died meanwhile, and with it where time went

    def begin(self, params: SamplingParams, room: int, head: list[int], now: float) -> None:
        """A turn: the answer is known from here on. `head`: what a fork has of it already."""
        assert params.seed is not None
        self.params = params
        self.generating, self.last_end, self.inherited = True, None, len(head)
        self.acked, self.unread, self.turn_at, self.started = 0, len(head), now, False
        self.output, self.natural = _answer(params, len(self.before), room, head)
        self.seen = len(self.before) + len(head)

    def give_room(self, room: int) -> None:
        """The turn may become so long, with what it has."""
        assert self.params is not None
        head = self.output[: self.seen - len(self.before)]
        self.output, self.natural = _answer(self.params, len(self.before), room, head)

    def move(self, where: str, now: float) -> None:
        """It is somewhere else from now on."""
        self.spent[self.where] = self.spent.get(self.where, 0.0) + now - self.since
        self.where, self.since = where, now

    def end_turn(self, num_output: int) -> None:
        """It is over with so many tokens."""
        del self.output[num_output:]
        self.last_reader = self.reader
        self.generating, self.reader, self.deadline = False, 0, None
        self.seen = len(self.before) + len(self.output)


def _answer(params: SamplingParams, start: int, room: int, head: list[int]) -> tuple[list[int], FinishReason]:
    output = list(head)
    while len(output) < room:
        token = token_at(params.seed, start + len(output))
        output.append(token)
        if token in params.stop_token_ids and len(output) > params.min_tokens:
            return output, FinishReason.STOP
    return output, FinishReason.LENGTH


class Ledger:
    """All sequences and tenants."""

    def __init__(self, retention_s: float) -> None:
        self.by_label: dict[str, Known] = {}
        self.by_rid: dict[int, Known] = {}
        self.all: list[Known] = []
        self.live: dict[int, Known] = {}
        self.kept: OrderedDict[int, Known] = OrderedDict()  # ended, within the retention time
        self.limits: dict[str, TenantLimits] = {}
        self.seeds: dict[int, str] = {}  # drawn by the microkernel: no two may be the same
        self.refusal = False  # new work is refused
        self._retention_s = retention_s

    def requested(self, owner: str, request_id: str | None) -> Known | None:
        """The newest known sequence that was made for this id."""
        known = (*self.live.values(), *self.kept.values())
        found = [each for each in known if each.owner == owner and each.request and each.request[0] == request_id]
        return max(found, key=lambda each: each.rid, default=None)

    def enter(self, known: Known) -> None:
        self.all.append(known)
        self.by_label[known.label] = self.by_rid[known.rid] = self.live[known.rid] = known

    def end(self, known: Known, reason: FinishReason, now: float) -> None:
        assert known.reason is None, f"{known.label} ended twice"
        known.reason, known.ended_at = reason, now
        known.generating, known.reader, known.orphan_since, known.after = False, 0, None, set()
        del self.live[known.rid]
        self.kept[known.rid] = known

    def forget_old(self, now: float) -> None:
        """Records are dropped after the retention time."""
        while self.kept and next(iter(self.kept.values())).ended_at <= now - self._retention_s:
            self.kept.popitem(last=False)

    def limits_of(self, owner: str) -> TenantLimits:
        return self.limits.get(owner) or TenantLimits()

    def guaranteed_to_others(self, owner: str) -> int:
        return sum(limits.guaranteed_pages for name, limits in self.limits.items() if name != owner)

    def known_problems(self, known: Known, asker: str | None, field: str = "rid") -> set[Problem]:
        """Unknown, forgotten and foreign are one."""
        there = known.rid in self.live or known.rid in self.kept
        return set() if there and asker in (None, known.owner) else {(NOT_FOUND, field)}

    def live_problems(self, known: Known, asker: str | None) -> set[Problem]:
        problems = self.known_problems(known, asker)
        return problems or ({(WRONG, "rid")} if known.reason is not None else set())

    def rest_problems(self, known: Known, asker: str | None) -> set[Problem]:
        """It must be open and not generating."""
        problems = self.live_problems(known, asker)
        if not problems and (not known.is_open or known.generating):
            problems.add((WRONG, "rid"))
        return problems

    def after_problems(self, after: Iterable[Known], asker: str | None) -> set[Problem]:
        problems: set[Problem] = set()
        for known in after:
            problems |= self.known_problems(known, asker, "after")
            if known.reason is not None and not ended_well(known.reason):
                problems.add((WRONG, "after"))
        return problems

    def would_wait_for_itself(self, known: Known, after: Iterable[Known]) -> bool:
        todo, seen = [other for other in after if other.reason is None], set()
        while todo:
            other = todo.pop()
            if other is known:
                return True
            if other.rid not in seen:
                seen.add(other.rid)
                todo += [self.live[rid] for rid in other.after]
        return False
