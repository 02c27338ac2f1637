"""What `llmosctl top` looks at, without a daemon: rows, models, services and tenants by factories, and a client that has them."""

from __future__ import annotations

from typing import Any

import msgspec

from llmos.codes import SeqState, ServiceState
from llmos.ctl.top.control import press
from llmos.ctl.top.state import Polled, State
from llmos.errors import LlmosError, NotFound
from llmos.protocol import limits
from llmos.protocol import messages as m


def seq_row(rid: int, **changes: Any) -> m.SeqRow:
    row = m.SeqRow(
        rid=rid, owner="alice", model="demo", state=SeqState.RUNNING, prompt_tokens=100, output_tokens=50, max_tokens=200, pages=3,
        cached_tokens=0, preemptions=0, age_ms=12_300.0, tokens_per_s=10.0, job=rid,
    )  # fmt: skip
    return msgspec.structs.replace(row, **changes)


def lane(model: str = "demo", **changes: Any) -> m.LaneStatus:
    row = m.LaneStatus(
        model=model, generation=1, ready=True, page_size=64, pages_total=1000, pages_free=400, pages_cached=100, waiting=20,
        running=12, steps=1000, tokens_committed=50_000, preemptions=3, prefix_hit_tokens=630, prefix_query_tokens=1000,
        results_dropped=0, dtype="bfloat16", device="cuda", max_context=8192, blocked=3, suspended=2,
    )  # fmt: skip
    return msgspec.structs.replace(row, **changes)


def service(name: str, state: int = ServiceState.RUNNING, **changes: Any) -> m.ServiceStatus:
    return msgspec.structs.replace(m.ServiceStatus(name, int(state), 4321, 0, 11_220_000.0, ""), **changes)


def services() -> tuple[m.ServiceStatus, ...]:
    return tuple(service(name) for name in ("microkernel", "storage", "tokenizer", "executor.demo", "gateway"))


def tenant(name: str, **changes: Any) -> m.TenantRow:
    most = limits.UNLIMITED
    return msgspec.structs.replace(m.TenantRow(name, "demo", 1.0, most, 0, most, most, 0.0), **changes)


def status(*lanes: m.LaneStatus, **changes: Any) -> m.StatusReply:
    found = m.StatusReply(1, "0.1.0", 11_220_000.0, lanes or (lane(),), services())
    return msgspec.structs.replace(found, **changes)


def explained(rid: int) -> m.Explained:
    """Ten seconds of a life."""
    times = {
        "queue": 2000.0, "quota": 250.0, "prefill": 500.0, "decode": 3250.0, "preempted": 1000.0, "swapped": 500.0,
        "suspended": 1500.0, "blocked": 1000.0, "client": 0.0,
    }  # fmt: skip
    return m.Explained(
        1, rid, SeqState.RUNNING, age_ms=10_000.0, **{f"{name}_ms": value for name, value in times.items()}, preemptions=2,
        suspensions=1, cached_tokens=64, nice=0, swaps=1,
    )  # fmt: skip


BUSY_TENANTS = (
    tenant("alice", weight=3.0, max_pages=600, guaranteed_pages=100, pages=310, running=7, waiting=12, tokens=900_000),
    tenant("bob", max_running=4, max_waiting=50, pages=120, running=4, waiting=7, tokens=120_000),
    tenant("carol", weight=0.5, tokens_per_s=250.0, pages=70, running=1, waiting=1, tokens=4_000),
)
_STATES = (
    SeqState.RUNNING, SeqState.WAITING, SeqState.RUNNING, SeqState.BLOCKED, SeqState.WAITING, SeqState.SUSPENDED,
    SeqState.PREEMPTED, SeqState.RUNNING, SeqState.SWAPPED, SeqState.WAITING,
)  # fmt: skip


def busy_rows(count: int = 40) -> tuple[m.SeqRow, ...]:
    """All states, three owners, jobs of three."""
    rows = []
    for i in range(count):
        state = _STATES[i % len(_STATES)]
        waits = state == SeqState.WAITING
        away = state in (SeqState.WAITING, SeqState.PREEMPTED, SeqState.SWAPPED)
        rows.append(
            seq_row(
                1000 + i, owner=("alice", "bob", "carol")[i * i % 3 if i % 7 else 2], state=int(state), prompt_tokens=100 + 37 * i,
                output_tokens=0 if waits else 25 * i, max_tokens=2000, pages=0 if away else 2 + i, preemptions=i % 3,
                age_ms=1000.0 * (i + 1) ** 2, nice=(0, 0, 5, 0, -3)[i % 5], job=1000 + i - i % 3,
                host_pages=4 if state == SeqState.SWAPPED else 0, is_open=state == SeqState.BLOCKED,
            )
        )  # fmt: skip
    return tuple(rows)


class FakeClient:
    """Answers from `self.rows` and its kin; keeps what was asked in `calls`. `error`: what every question and verb raises."""

    def __init__(self) -> None:
        self.rows = busy_rows()
        self.state = status()
        self.tenant_rows = BUSY_TENANTS
        self.error: LlmosError | None = None
        self.calls: list[tuple[Any, ...]] = []
        self.closed = False

    def status(self) -> m.StatusReply:
        self._check()
        return self.state

    def ps(self) -> tuple[m.SeqRow, ...]:
        self._check()
        return self.rows

    def tenants(self) -> tuple[m.TenantRow, ...]:
        self._check()
        return self.tenant_rows

    def explain(self, rid: int) -> m.Explained:
        self._find(rid)
        return explained(rid)

    def kill(self, rid: int) -> None:
        self._do("kill", rid)
        self.rows = tuple(row for row in self.rows if row.rid != rid)

    def nice(self, rid: int, value: int) -> None:
        self._do("nice", rid, value)
        self._change(rid, nice=value)

    def suspend(self, rid: int) -> None:
        self._do("suspend", rid)
        self._change(rid, state=int(SeqState.SUSPENDED))

    def resume(self, rid: int) -> None:
        self._do("resume", rid)
        self._change(rid, state=int(SeqState.WAITING))

    def close(self) -> None:
        self.closed = True

    def advance(self, seconds: float = 1.0, per_second: int = 40) -> None:
        """Running sequences make tokens; counters go on."""
        made = round(seconds * per_second)
        running = {row.rid for row in self.rows if row.state == SeqState.RUNNING}
        self.rows = tuple(
            msgspec.structs.replace(row, output_tokens=min(row.max_tokens, row.output_tokens + made))
            if row.rid in running
            else row
            for row in self.rows
        )
        lanes = tuple(
            msgspec.structs.replace(each, tokens_committed=each.tokens_committed + made * len(running))
            for each in self.state.lanes
        )
        self.state = msgspec.structs.replace(self.state, lanes=lanes, uptime_ms=self.state.uptime_ms + seconds * 1000)
        self.tenant_rows = tuple(
            msgspec.structs.replace(row, tokens=row.tokens + made * row.running) for row in self.tenant_rows
        )

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _find(self, rid: int) -> None:
        self._check()
        if not any(row.rid == rid for row in self.rows):
            raise NotFound(f"no sequence {rid}", field="rid", rid=rid)

    def _do(self, *call: Any) -> None:
        self.calls.append(call)
        self._find(call[1])

    def _change(self, rid: int, **changes: Any) -> None:
        self.rows = tuple(msgspec.structs.replace(row, **changes) if row.rid == rid else row for row in self.rows)


def polled(*rows: m.SeqRow, at: float = 0.0, tenants: tuple[m.TenantRow, ...] = BUSY_TENANTS, **changes: Any) -> Polled:
    return Polled(at, status(**changes), rows, tenants)


def state_of(*rows: m.SeqRow) -> State:
    state = State()
    state.take(polled(*rows))
    return state


def rids(state: State) -> list[int]:
    return [each.row.rid for each in state.sequences.rows]


def selected(state: State) -> int | None:
    return state.selected.rid if state.selected else None


def type_keys(state: State, *pressed: str, now: float = 0.0) -> list[Any]:
    return [outcome for key in pressed if (outcome := press(state, key, now)) is not None]
