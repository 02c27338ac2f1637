"""The checker of histories. Pure; knows neither the SDK nor llmosd, only the events of history.py and the right answers.

For each request: was it accepted, do the offsets go on without gap and overlap, is each token the right one, is there exactly one
end, is it the right one, is the text that of the tokens? What is wrong is a `Violation` of one of four kinds:

    failed       accepted, and then an error, an ending that nobody asked for, or no service for too long
    lost         tokens that never came, an end that never came, a sequence that is unknown
    duplicated   tokens, ends or whole sequences that came twice, tokens after the end
    changed      another token, offset, text or number than it had to be

States of a request: asked -> accepted -> over (end, reply, error, left, gave_up). A request that is over stays known for a while,
because what comes after its end is wrong, too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from chaos.answers import Answer, AnswerBook
from chaos.history import Event
from chaos.output import CHANGED, DUPLICATED, FAILED, LOST, check_ids

TAKEN_OVER = "WrongState"
UNKNOWN = "NotFound"
_OVER_KEPT = 1000  # per client
_NUMBERS_KEPT = 100_000
_STREAMS = ("generate", "continue", "attach")


@dataclass(frozen=True)
class Violation:
    """`what` names it in few words, `detail` is for whoever looks for the cause."""

    harm: str
    what: str
    detail: str
    client: int
    req: int
    at: float


@dataclass(frozen=True)
class Verdict:
    """A request that is over. `moments`: when its client saw anything of it, from the asking on."""

    client: int
    req: int
    verb: str
    accepted: bool
    moments: tuple[float, ...]
    tokens: int
    refusals: int
    harms: frozenset[str]


@dataclass
class _Request:
    verb: str
    key: str | None
    rid: int | None
    start: int
    answer: Answer | None
    expect: dict[str, Any] | None
    moments: list[float]
    accepted: bool = False
    refusals: int = 0
    pieces: list[tuple[int, list[int]]] = field(default_factory=list)  # (offset, ids) as they came
    text: list[str] = field(default_factory=list)
    handed_over: bool = False
    over: bool = False
    harms: set[str] = field(default_factory=set)

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for _, ids in self.pieces)


class Judge:
    """`feed` every event of every client, then `finish`. Violations and verdicts go to the two callbacks."""

    def __init__(
        self, book: AnswerBook, on_violation: Callable[[Violation], None], on_verdict: Callable[[Verdict], None]
    ) -> None:
        self._book = book
        self._on_violation = on_violation
        self._on_verdict = on_verdict
        self._open: dict[tuple[int, int], _Request] = {}
        self._over: dict[int, OrderedDict[int, _Request]] = {}
        self._keys: OrderedDict[str, int] = OrderedDict()  # client_request_id -> the sequence that it made
        self._made: OrderedDict[int, str] = OrderedDict()  # sequence -> what made it

    @property
    def num_open(self) -> int:
        return len(self._open)

    def feed(self, client: int, event: Event) -> None:
        """The next event of this client's history."""
        where = (client, event["req"])
        if event["event"] == "ask":
            self._asked(where, event)
            return
        request = self._open.get(where)
        if request is None:
            self._too_late(where, event)
            return
        if event["event"] not in ("refused", "handover"):
            request.moments.append(event["t"])
        handler: Callable[[tuple[int, int], _Request, Event], None] = getattr(self, f"_on_{event['event']}")
        handler(where, request, event)

    def finish(self, now: float, *, interrupted: bool = False) -> None:
        """No more events come. `interrupted`: the clients were cut off, so what is open says nothing."""
        for where, request in list(self._open.items()):
            if interrupted:
                self._close(where, request)
                continue
            request.moments.append(now)
            if request.accepted:
                self._report(where, request, now, LOST, "no end", f"{request.num_tokens} tokens came")
            else:
                self._report(where, request, now, FAILED, "never accepted", f"refused {request.refusals} times")
            self._check_output(where, request, now, whole=False)
            self._close(where, request)

    # ------------------------------------------------------------ events

    def _asked(self, where: tuple[int, int], event: Event) -> None:
        assert where not in self._open, f"client {where[0]} asks twice under number {where[1]}"
        answer = None if event.get("answer") is None else self._book.find(event["answer"])
        self._open[where] = _Request(
            verb=event["verb"], key=event.get("key"), rid=event.get("rid"), start=event.get("start", 0), answer=answer,
            expect=event.get("expect"), moments=[] if event.get("waits") else [event["t"]],
        )  # fmt: skip

    def _on_refused(self, where: tuple[int, int], request: _Request, event: Event) -> None:
        request.refusals += 1
        if request.pieces:
            self._report(where, request, event["t"], FAILED, "refused after tokens", _words(event))

    def _on_accepted(self, where: tuple[int, int], request: _Request, event: Event) -> None:
        self._accept(where, request, event["rid"], event["t"])

    def _on_tokens(self, where: tuple[int, int], request: _Request, event: Event) -> None:
        request.accepted = True
        request.pieces.append((event["offset"], event["ids"]))
        request.text.append(event["text"])

    def _on_handover(self, where: tuple[int, int], request: _Request, event: Event) -> None:
        request.handed_over = True

    def _on_end(self, where: tuple[int, int], request: _Request, event: Event) -> None:
        request.accepted = True
        expected = "length" if request.answer is None else request.answer.reason
        if event["reason"] != expected:
            self._report(where, request, event["t"], FAILED, "wrong ending", f"{event['reason']}, not {expected}")
        self._check_output(where, request, event["t"], whole=event["reason"] == expected)
        if not request.harms:
            self._check_text(where, request, event)
        self._close(where, request)

    def _on_reply(self, where: tuple[int, int], request: _Request, event: Event) -> None:
        request.accepted = True
        value = event["value"]
        for name, expected in (request.expect or {}).items():
            if value.get(name) != expected:
                harm, what = (FAILED, "wrong ending") if name == "reason" else (CHANGED, "wrong reply")
                self._report(where, request, event["t"], harm, what, f"{name} is {value.get(name)}, not {expected}")
                break
        if request.verb == "spawn":
            self._accept(where, request, value["rid"], event["t"])
        for rid in value.get("rids", ()):
            self._is_new(where, request, rid, event["t"])
        self._close(where, request)

    def _on_error(self, where: tuple[int, int], request: _Request, event: Event) -> None:
        if event["error"] == TAKEN_OVER and request.handed_over:
            pass  # as it was told to be
        elif event["error"] == UNKNOWN:
            self._report(where, request, event["t"], LOST, "unknown sequence", _words(event))
        else:
            self._report(where, request, event["t"], FAILED, "error", _words(event))
        self._check_output(where, request, event["t"], whole=False)
        self._close(where, request)

    def _on_left(self, where: tuple[int, int], request: _Request, event: Event) -> None:
        self._check_output(where, request, event["t"], whole=False)
        self._close(where, request)

    def _on_gave_up(self, where: tuple[int, int], request: _Request, event: Event) -> None:
        if request.accepted:
            came = f"{event['message']}; {request.num_tokens} tokens came"
            self._report(where, request, event["t"], LOST, "no end", came)
        else:
            refused = f"{event['message']}; refused {request.refusals} times"
            self._report(where, request, event["t"], FAILED, "never accepted", refused)
        self._check_output(where, request, event["t"], whole=False)
        self._close(where, request)

    def _too_late(self, where: tuple[int, int], event: Event) -> None:
        request = self._over.get(where[0], OrderedDict()).get(where[1])
        assert request is not None, f"client {where[0]}: {event['event']} of a request that was never asked: {event}"
        if event["event"] == "tokens":
            detail = f"offset {event['offset']}, {len(event['ids'])} tokens"
            self._report(where, request, event["t"], DUPLICATED, "tokens after the end", detail)
        elif event["event"] in ("end", "reply", "error"):
            detail = event.get("reason") or event.get("error") or "reply"
            self._report(where, request, event["t"], DUPLICATED, "two ends", str(detail))

    # ------------------------------------------------------------ numbers

    def _accept(self, where: tuple[int, int], request: _Request, rid: int, at: float) -> None:
        """Exactly one sequence per request, whatever was repeated."""
        request.accepted = True
        if request.rid is not None and request.rid != rid:
            self._report(where, request, at, DUPLICATED, "two sequences", f"{request.rid} and {rid}")
        first_time = request.rid is None
        request.rid = rid
        if request.verb not in ("generate", "spawn") or not first_time:
            return
        if request.key is not None and request.key in self._keys:
            if self._keys[request.key] != rid:
                made = f"{self._keys[request.key]} and {rid} under one client_request_id"
                self._report(where, request, at, DUPLICATED, "two sequences", made)
            return
        if request.key is not None:
            _remember(self._keys, request.key, rid)
        self._is_new(where, request, rid, at)

    def _is_new(self, where: tuple[int, int], request: _Request, rid: int, at: float) -> None:
        maker = f"client {where[0]} request {where[1]}"
        if rid in self._made:
            self._report(where, request, at, CHANGED, "number used again", f"{rid}, before by {self._made[rid]}")
        _remember(self._made, rid, maker)

    # ------------------------------------------------------------ output

    def _check_output(self, where: tuple[int, int], request: _Request, at: float, *, whole: bool) -> None:
        """`whole`: it ended well, so nothing may be missing."""
        if request.verb not in _STREAMS:
            return
        for harm, what, detail in check_ids(request.start, request.pieces, request.answer, whole=whole):
            self._report(where, request, at, harm, what, detail)

    def _check_text(self, where: tuple[int, int], request: _Request, event: Event) -> None:
        joined = "".join(request.text)
        if event["ids"] != request.num_tokens:
            self._report(where, request, event["t"], CHANGED, "count mismatch",
                         f"the end speaks of {event['ids']} tokens, {request.num_tokens} came")  # fmt: skip
        if joined != event["text"]:
            self._report(where, request, event["t"], CHANGED, "text mismatch",
                         f"streamed {_around(joined, event['text'])}")  # fmt: skip
            return
        if request.answer is None:
            return
        expected = request.answer.text_after(request.start)
        good = request.answer.text.endswith(joined) if expected is None else joined == expected
        if not good:
            right = request.answer.text if expected is None else expected
            self._report(where, request, event["t"], CHANGED, "text mismatch", _around(joined, right))

    # ------------------------------------------------------------ bookkeeping

    def _report(
        self, where: tuple[int, int], request: _Request, at: float, harm: str, what: str, detail: str
    ) -> None:  # fmt: skip
        request.harms.add(harm)
        text = f"{request.verb}{'' if request.rid is None else f' of {request.rid}'}: {detail}"
        self._on_violation(Violation(harm, what, text, *where, at))

    def _close(self, where: tuple[int, int], request: _Request) -> None:
        del self._open[where]
        request.over = True
        self._on_verdict(
            Verdict(
                *where, request.verb, request.accepted, tuple(request.moments), request.num_tokens, request.refusals,
                frozenset(request.harms),
            )
        )  # fmt: skip
        request.pieces, request.text, request.moments, request.answer = [], [], [], None
        over = self._over.setdefault(where[0], OrderedDict())
        over[where[1]] = request
        while len(over) > _OVER_KEPT:
            over.popitem(last=False)


def _remember(table: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    table[key] = value
    if len(table) > _NUMBERS_KEPT:
        table.popitem(last=False)


def _words(event: Event) -> str:
    return f"{event['error']}: {event['message']}"


def _around(came: str, right: str) -> str:
    """The first difference of two texts."""
    at = next((i for i, (a, b) in enumerate(zip(came, right)) if a != b), min(len(came), len(right)))
    return f"{came[max(0, at - 10) : at + 20]!r}, not {right[max(0, at - 10) : at + 20]!r} (at {at})"
