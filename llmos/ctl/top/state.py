"""All that the view knows: the newest answers of the daemon and what its user chose. Pure; time is an argument, in seconds.

    an answer (`take`), a failed poll (`lose`), a verb's outcome (`succeed`, `refuse`) -> state -> view.frame

Invariants: while the daemon does not answer, the last answers stay and `trouble` says why; a change that was asked for and confirmed is
shown at once, without waiting for the next poll; messages go away by themselves.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Literal

import msgspec

from llmos.client.types import Explained, SeqRow, StatusReply, TenantRow
from llmos.codes import SeqState
from llmos.ctl.top import columns
from llmos.ctl.top.look import OWNER_STYLES, UNICODE, Glyphs, clean
from llmos.ctl.top.rates import Rates
from llmos.errors import DaemonNotRunning, LlmosError

MESSAGE_S = 5.0
HISTORY = 60  # polls that the small curve of the throughput remembers
NOT_RUNNING = "llmosd is not running, trying again"


class View(Enum):
    SEQUENCES = auto()
    TENANTS = auto()
    HELP = auto()


@dataclass(frozen=True, slots=True)
class Polled:
    """The daemon's answers to one round of questions. `at`: when."""

    at: float
    status: StatusReply
    rows: tuple[SeqRow, ...]
    tenants: tuple[TenantRow, ...]


@dataclass(frozen=True, slots=True)
class Verb:
    """What a user wants done to a sequence."""

    name: Literal["kill", "nice", "suspend", "resume"]
    rid: int
    value: int = 0

    @property
    def report(self) -> str:
        if self.name == "nice":
            return f"sequence {self.rid}: nice {self.value}"
        past = {"kill": "killed", "suspend": "suspended", "resume": "resumed"}[self.name]
        return f"{past} sequence {self.rid}"


@dataclass(frozen=True, slots=True)
class Message:
    text: str
    until: float
    is_error: bool = False


@dataclass(frozen=True, slots=True)
class Explanation:
    """The answer about a sequence, or why there is none."""

    rid: int
    found: Explained | None = None
    refusal: str = ""


@dataclass
class Asking:
    """The bottom line asks: for a filter's text, or with a `verb` whether to kill a sequence."""

    verb: Verb | None = None
    owner: str = ""


@dataclass
class Rate:
    """Counters of all kinds."""

    models: Rates[str] = field(default_factory=Rates)
    sequences: Rates[int] = field(default_factory=Rates)
    tenants: Rates[tuple[str, str]] = field(default_factory=Rates)


class State:
    def __init__(self, interval_s: float = 1.0, glyphs: Glyphs = UNICODE, sort: str = columns.DEFAULT_SORT) -> None:
        self.interval_s = interval_s
        self.view = View.SEQUENCES
        self.explaining = False
        self.paused = False
        self.asking: Asking | None = None
        self.message: Message | None = None
        self.polled: Polled | None = None
        self.trouble = ""
        self.detail = ""  # of the trouble
        self.owner_styles: dict[str, str] = {}
        self.sequences = columns.sequences(self.owner_styles, glyphs, sort)
        self.tenants = columns.tenants(self.owner_styles, glyphs)
        self.shown_columns: list[str] = [sort]  # of the table on the screen; the view fills it in
        self.asked_nice: dict[int, int] = {}  # by sequence: the value that was asked for, until it is answered
        self.explanation: Explanation | None = None
        self.history: deque[float] = deque(maxlen=HISTORY)
        self.help_first = 0
        self._rate = Rate()

    @property
    def listing(self) -> Any:
        """The table on the screen."""
        return self.tenants if self.view is View.TENANTS else self.sequences

    @property
    def selected(self) -> SeqRow | None:
        chosen = self.sequences.selected
        return chosen.row if chosen else None

    @property
    def to_explain(self) -> int | None:
        """The sequence whose explanation is on the screen."""
        return self.selected.rid if self.explaining and self.selected else None

    def throughput(self, model: str) -> float | None:
        """Tokens per second of a model."""
        return self._rate.models.get(model)

    @property
    def total_throughput(self) -> float | None:
        lanes = self.polled.status.lanes if self.polled else ()
        known = [rate for lane in lanes if (rate := self.throughput(lane.model)) is not None]
        return sum(known) if known else None

    def take(self, polled: Polled) -> None:
        """New answers."""
        self.polled = polled
        self.trouble = ""
        rate, at = self._rate, polled.at
        rate.models.add(at, {lane.model: lane.tokens_committed for lane in polled.status.lanes})
        rate.sequences.add(at, {row.rid: row.output_tokens for row in polled.rows})
        rate.tenants.add(at, {(row.tenant, row.model): row.tokens for row in polled.tenants})
        if (total := self.total_throughput) is not None:
            self.history.append(total)
        self._color_owners(polled)
        self._fill()

    def lose(self, error: LlmosError) -> None:
        """The daemon did not answer."""
        self.detail = clean(error.message)
        self.trouble = NOT_RUNNING if isinstance(error, DaemonNotRunning) else f"{self.detail}, trying again"
        self.history.clear()

    def succeed(self, verb: Verb, now: float) -> None:
        """A verb was done; its effect is shown before the next poll confirms it."""
        self.say(verb.report, now)
        self._answered(verb)
        if self.polled is None:
            return
        if verb.name == "kill":
            rows = tuple(row for row in self.polled.rows if row.rid != verb.rid)
        else:
            change = {
                "nice": {"nice": verb.value},
                "suspend": {"state": int(SeqState.SUSPENDED)},
                "resume": {"state": int(SeqState.WAITING)},
            }[verb.name]
            rows = tuple(
                msgspec.structs.replace(row, **change) if row.rid == verb.rid else row for row in self.polled.rows
            )
        self.polled = Polled(self.polled.at, self.polled.status, rows, self.polled.tenants)
        self._fill()

    def refuse(self, verb: Verb, error: LlmosError, now: float) -> None:
        """A verb failed."""
        self._answered(verb)
        self.say(error.message, now, is_error=True)

    def say(self, text: str, now: float, *, is_error: bool = False) -> None:
        self.message = Message(clean(text), now + MESSAGE_S, is_error)

    def expire(self, now: float) -> bool:
        """Take an old message away; True if there was one."""
        if self.message is None or now < self.message.until:
            return False
        self.message = None
        return True

    def _answered(self, verb: Verb) -> None:
        """The next nice value counts from what the daemon says again, unless another one was asked for meanwhile."""
        if verb.name == "nice" and self.asked_nice.get(verb.rid) == verb.value:
            del self.asked_nice[verb.rid]

    def _fill(self) -> None:
        polled, rate = self.polled, self._rate
        assert polled is not None
        self.sequences.replace(columns.Sequence(row, rate.sequences.get(row.rid)) for row in polled.rows)
        rates = [(row, rate.tenants.get((row.tenant, row.model))) for row in polled.tenants]
        whole: dict[str, float] = defaultdict(float)
        for row, each in rates:
            whole[row.model] += each or 0.0
        self.tenants.replace(
            columns.Tenant(row, each, (each or 0.0) / (whole[row.model] or 1.0)) for row, each in rates
        )

    def _color_owners(self, polled: Polled) -> None:
        """Every owner has a colour for as long as this view runs, whoever comes and goes."""
        owners = {row.tenant for row in polled.tenants} | {row.owner for row in polled.rows}
        for owner in sorted(owners - self.owner_styles.keys()):
            self.owner_styles[owner] = OWNER_STYLES[len(self.owner_styles) % len(OWNER_STYLES)]
