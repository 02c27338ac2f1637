"""What the two tables show of a sequence and of a tenant, and how rows are ordered by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmos.client.types import SeqRow, TenantRow
from llmos.codes import SeqState
from llmos.ctl.render import duration, state_name
from llmos.ctl.render_tenants import short_count
from llmos.ctl.top.listing import Column, Listing
from llmos.ctl.top.look import SEQ_STYLES, UNICODE, Glyphs, clean, cut
from llmos.protocol import limits

DEFAULT_SORT = "state"
# What uses the machine comes first.
_ORDER: tuple[int, ...] = (
    SeqState.RUNNING, SeqState.PREEMPTED, SeqState.SWAPPED, SeqState.WAITING, SeqState.BLOCKED, SeqState.SUSPENDED,
    SeqState.FINISHED,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sequence:
    """A line of `ps`. `rate`: output tokens per second just now; None: not known yet."""

    row: SeqRow
    rate: float | None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant on one model. `rate`: tokens computed per second, prompt and output; `share` of what its model computes."""

    row: TenantRow
    rate: float | None
    share: float


def sequences(owner_styles: dict[str, str], glyphs: Glyphs = UNICODE, sort: str = DEFAULT_SORT) -> Listing[Sequence]:
    """`owner_styles`: the colours that the page bar gives to owners; may change later."""

    def owner_style(each: Sequence) -> str:
        return owner_styles.get(each.row.owner, "")

    def done(each: Sequence, width: int) -> str:
        return gauge(each.row.output_tokens, each.row.max_tokens, width, glyphs)

    columns: tuple[Column[Sequence], ...] = (
        _ident("rid", "RID", "rid", rank=0),
        Column("owner", "OWNER", 8, _text("owner", glyphs), _of("owner"), rank=2, grow=12, style=owner_style),
        Column("model", "MODEL", 10, _text("model", glyphs), _of("model"), rank=9, grow=20),
        Column("state", "STATE", 9, lambda each, _: state_of(each.row), _state_order, rank=1, style=_state_style),
        Column(
            "nice", "NICE", 4, lambda each, _: str(each.row.nice), _of("nice"), rank=6, right=True, style=_nice_style
        ),
        _number("pages", "PAGES", "pages", 6, rank=7),
        _number("host", "HOST", "host_pages", 6, rank=13),
        _number("prompt", "PROMPT", "prompt_tokens", 7, rank=11),
        _number("cached", "CACHED", "cached_tokens", 7, rank=12),
        Column("output", "OUT/MAX", 12, _output, _of("output_tokens"), rank=5, right=True, falling=True),
        Column("done", "DONE", 8, done, _part_done, rank=10, grow=16, falling=True, style=_state_style),
        Column("rate", "TOK/S", 6, _rate, _rate_key, rank=3, right=True, falling=True),
        _number("preempted", "PREEMPT", "preemptions", 7, rank=14),
        Column(
            "age", "AGE", 6, lambda each, _: duration(each.row.age_ms), _of("age_ms"), rank=4, right=True, falling=True
        ),
        _ident("job", "JOB", "job", rank=8),
    )
    return Listing(columns, _of("rid"), _words, sort)


def tenants(owner_styles: dict[str, str], glyphs: Glyphs = UNICODE) -> Listing[Tenant]:
    """`owner_styles`: the colours that the page bar gives to tenants; may change later."""

    def tenant_style(each: Tenant) -> str:
        return owner_styles.get(each.row.tenant, "")

    def share(each: Tenant, width: int) -> str:
        """A number, and a bar where there is room for one."""
        return f"{gauge(each.share, 1.0, width - 5, glyphs) if width > 12 else ''} {each.share:4.0%}"

    columns: tuple[Column[Tenant], ...] = (
        Column("tenant", "TENANT", 8, _text("tenant", glyphs), _of("tenant"), rank=0, grow=14, style=tenant_style),
        Column("model", "MODEL", 8, _text("model", glyphs), _of("model"), rank=5, grow=8),
        Column("weight", "WEIGHT", 6, lambda each, _: f"{each.row.weight:.4g}", _of("weight"), rank=1, right=True, falling=True),
        _use("running", "RUN", "running", "max_running", 7, rank=3, grow=4),
        _use("waiting", "WAIT", "waiting", "max_waiting", 7, rank=4, grow=6),
        _use("pages", "PAGES", "pages", "max_pages", 11, rank=2, grow=2),
        _number("keeps", "KEEPS", "guaranteed_pages", 6, rank=6),
        Column("limit", "MAX T/S", 7, _most_per_s, _of("tokens_per_s"), rank=8, right=True, falling=True),
        _number("tokens", "TOKENS", "tokens", 6, rank=9),
        Column("rate", "TOK/S", 6, _rate, _rate_key, rank=4, right=True, falling=True),
        Column("share", "SHARE", 6, share, lambda each: each.share, rank=7, grow=32, right=True, falling=True, style=tenant_style),
    )  # fmt: skip
    return Listing(columns, lambda each: (each.row.tenant, each.row.model), _tenant_words, "tenant")


def gauge(part: float, whole: float, width: int, glyphs: Glyphs) -> str:
    """A bar of `width` cells."""
    full = round(max(0.0, min(1.0, part / whole)) * width) if whole > 0 else 0
    return glyphs.bar * full + glyphs.free * (width - full)


def state_of(row: SeqRow) -> str:
    return state_name(SeqState, row.state)


def rate_text(rate: float | None) -> str:
    """At most six characters; a dash for nothing and for unknown."""
    if not rate:
        return "-"
    return f"{rate:.1f}" if rate < 99.95 else short_count(rate)


def _of(field: str) -> Callable[[Any], Any]:
    """Orders rows by a field."""
    return lambda each: getattr(each.row, field)


def _text(field: str, glyphs: Glyphs) -> Callable[[Any, int], str]:
    """Shows what somebody outside chose."""
    return lambda each, width: cut(clean(getattr(each.row, field)), width, glyphs)


def _number(name: str, title: str, field: str, width: int, rank: int) -> Column[Any]:
    """A count, largest first; a dash for zero."""

    def cell(each: Any, _: int) -> str:
        count = getattr(each.row, field)
        return short_count(count) if count else "-"

    return Column(name, title, width, cell, _of(field), rank, right=True, falling=True)


def _ident(name: str, title: str, field: str, rank: int) -> Column[Any]:
    """A number that names something, never shortened."""
    return Column(
        name, title, 4, lambda each, _: str(getattr(each.row, field) or "-"), _of(field), rank, right=True, fits=True
    )


def _use(name: str, title: str, used: str, limit: str, width: int, rank: int, grow: int) -> Column[Any]:
    """`used/limit`; without a limit only what is used."""

    def cell(each: Any, _: int) -> str:
        most = getattr(each.row, limit)
        shown = short_count(getattr(each.row, used))
        return shown if most >= limits.UNLIMITED else f"{shown}/{short_count(most)}"

    return Column(name, title, width, cell, _of(used), rank, grow, right=True, falling=True)


def _output(each: Sequence, width: int) -> str:
    """Made and allowed; an open sequence at rest is not allowed anything yet."""
    row = each.row
    text = f"{row.output_tokens}/{row.max_tokens or '-'}"
    return text if len(text) <= width else f"{short_count(row.output_tokens)}/{short_count(row.max_tokens)}"


def _part_done(each: Sequence) -> float:
    return each.row.output_tokens / max(1, each.row.max_tokens)


def _rate(each: Any, _: int) -> str:
    return rate_text(each.rate)


def _rate_key(each: Any) -> float:
    return each.rate or 0.0


def _most_per_s(each: Tenant, _: int) -> str:
    most = each.row.tokens_per_s
    return (short_count(most) if most >= 1 else f"{most:.2g}") if most else "-"


def _state_order(each: Sequence) -> int:
    return _ORDER.index(each.row.state) if each.row.state in _ORDER else len(_ORDER)


def _state_style(each: Sequence) -> str:
    return SEQ_STYLES.get(each.row.state, "")


def _nice_style(each: Sequence) -> str:
    return "" if each.row.nice else "dim"


def _words(each: Sequence) -> str:
    row = each.row
    return f"{row.rid} {clean(row.owner)} {state_of(row)} {clean(row.model)} {row.job}"


def _tenant_words(each: Tenant) -> str:
    return f"{clean(each.row.tenant)} {clean(each.row.model)}"
