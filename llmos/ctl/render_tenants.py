"""How the scheduler's answers look: where a sequence's time went, and what tenants may use and do use."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmos.client.types import Explained, TenantRow
from llmos.codes import SeqState
from llmos.ctl.render import duration, percent, short, state_name, table
from llmos.protocol import limits

_CAUSES = (
    ("queue", "waited for its turn"),
    ("prefill", "read its prompt, or computed it again"),
    ("decode", "made tokens"),
    ("preempted", "gave way to others"),
    ("suspended", "until resume"),
    ("client", "its client did not read"),
)


def print_explained(console: Console, found: Explained) -> None:
    """The shares add up to the age."""
    state = state_name(SeqState, found.state)
    console.print(Text(f"sequence {found.rid}, {state}, nice {found.nice}, {duration(found.age_ms)} old"))
    console.print()
    columns = (("TIME", "word"), ("MS", "number"), ("%", "number"), ("", "long"))
    times = [(name, float(getattr(found, f"{name}_ms")), why) for name, why in _CAUSES]
    rows = [(name, f"{spent:.1f}", percent(spent, found.age_ms), why) for name, spent, why in times]
    console.print(table(columns, rows))
    console.print()
    console.print(
        Text(
            f"{found.cached_tokens} prompt tokens from the cache, preempted {_times(found.preemptions)}, "
            f"suspended {_times(found.suspensions)}"
        )
    )


def tenants_table(rows: Sequence[TenantRow]) -> Table:
    """Nine columns in 80 characters; `used/limit`, without a limit only what is used."""
    columns = (
        ("TENANT", "word"),
        ("MODEL", "word"),
        ("WEIGHT", "number"),
        ("RUN", "number"),
        ("WAIT", "number"),
        ("PAGES", "number"),
        ("KEEPS", "number"),
        ("MAX T/S", "number"),
        ("TOKENS", "number"),
    )
    return table(
        columns,
        (
            (
                short(row.tenant, 10),
                short(row.model, 10),
                f"{row.weight:.4g}",
                _of(row.running, row.max_running),
                _of(row.waiting, row.max_waiting),
                _of(row.pages, row.max_pages),
                short_count(row.guaranteed_pages),
                short_count(row.tokens_per_s) if row.tokens_per_s else "-",
                short_count(row.tokens),
            )
            for row in rows
        ),
        gap=1,
    )


def _of(used: int, limit: int) -> str:
    return short_count(used) if limit >= limits.UNLIMITED else f"{short_count(used)}/{short_count(limit)}"


def short_count(value: float) -> str:
    """Whole below 100,000, then three digits: 123k, 4.56M."""
    if value < 100_000:
        return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
    for unit in ("k", "M", "G"):
        value /= 1000
        if value < 999.5:
            return f"{value:.3g}{unit}"
    return f"{value / 1000:.3g}T"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times" if count else "never"
