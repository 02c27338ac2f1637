"""How tenants look: what they may use, and what they do use."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from llmos.client.types import TenantRow
from llmos.ctl.render import short, table
from llmos.protocol import limits


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
