"""How things look: tables for people, JSON for programs.

Everything that came from elsewhere passes `printable` before a terminal sees it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmos.client.types import Explained, LaneStatus, ModelRow, SeqRow, ServiceStatus, Stats, StatusReply, Tokenization
from llmos.codes import FinishReason, SeqState, ServiceState


def printable(text: str) -> str:
    """Without control characters, which could move the cursor or worse; newline and tab may stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "�" for c in text)


def to_plain(value: Any) -> Any:
    """Structs and dataclasses as JSON objects with field names; states by name; null for what is not known."""
    if isinstance(value, msgspec.Struct):
        plain = {name: to_plain(getattr(value, name)) for name in value.__struct_fields__}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    elif isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    else:
        return None if isinstance(value, float) and math.isnan(value) else value
    if isinstance(value, SeqRow | Explained):
        plain["state"] = state_name(SeqState, value.state)
    elif isinstance(value, Stats):
        plain["reason"] = state_name(FinishReason, value.reason) if value.reason else None
    elif isinstance(value, ServiceStatus):
        plain["state"] = state_name(ServiceState, value.state)
    return plain


def write_json(value: Any, *, lines: bool = False) -> None:
    """One JSON value on stdout; with `lines` on one line."""
    sys.stdout.write(json.dumps(to_plain(value), ensure_ascii=False, indent=None if lines else 2) + "\n")
    sys.stdout.flush()


def state_name(states: type[IntEnum], value: int) -> str:
    """The word for a number of the protocol; a number that this version does not know stays one."""
    try:
        return states(value).name.lower()
    except ValueError:
        return str(value)


def duration(milliseconds: float) -> str:
    """At most two units: 12.3s, 4m05s, 3h07m, 2d04h."""
    seconds = milliseconds / 1000
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02d}m"
    return f"{hours // 24}d{hours % 24:02d}h"


def size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]], *, gap: int = 2) -> Table:
    """`columns`: (title, kind). A `word` or `number` is shown whole, a `long` text folds where the line is full, a `cut` word ends
    there in an ellipsis."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0), header_style="bold")
    for title, kind in columns:
        justify: Any = "right" if kind == "number" else "left"
        shrinks = kind in ("long", "cut")
        made.add_column(title, justify=justify, no_wrap=not shrinks, overflow="ellipsis" if kind == "cut" else "fold")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def models_table(rows: Sequence[ModelRow]) -> Table:
    columns = (("MODEL", "word"), ("STATE", "word"), ("ARCHITECTURE", "word"), ("SIZE", "number"), ("PATH", "long"))
    return table(
        columns, ((short(row.name, 24), row.state, row.architecture, size(row.bytes), row.path) for row in rows)
    )


def print_status(console: Console, status: StatusReply) -> None:
    console.print(Text(f"llmosd {printable(status.version)}, up {duration(status.uptime_ms)}"))
    console.print()
    console.print(_lanes_table(status.lanes))
    unusual = [(lane.model, counters) for lane in status.lanes if (counters := _counters(lane))]
    if unusual:
        console.print()
    for model, counters in unusual:
        console.print(Text(f"{printable(model)}: {', '.join(counters)}"), soft_wrap=True)
    if status.services:
        console.print()
        console.print(_services_table(status.services))


def _lanes_table(lanes: Sequence[LaneStatus]) -> Table:
    columns = (
        ("MODEL", "word"),
        ("ON", "word"),
        ("CONTEXT", "number"),
        ("RUNNING", "number"),
        ("WAITING", "number"),
        ("PAGES USED", "number"),
        ("TOKENS", "number"),
        ("CACHE HITS", "number"),
    )
    return table(
        columns,
        (
            (
                short(lane.model, 20),
                f"{lane.device} {lane.dtype}" if lane.ready else "starting",
                str(lane.max_context),
                str(lane.running),
                str(lane.waiting),
                f"{lane.pages_total - lane.pages_free}/{lane.pages_total}",
                str(lane.tokens_committed),
                percent(lane.prefix_hit_tokens, lane.prefix_query_tokens),
            )
            for lane in lanes
        ),
    )


def _counters(lane: LaneStatus) -> list[str]:
    """What is not always there, in words; nothing that is zero."""
    host = lane.host_pages_total
    counted = (
        (lane.blocked, "blocked"),
        (lane.suspended, "suspended"),
        (lane.preemptions, "preempted"),
        (lane.swaps_out, "swapped out"),
        (lane.swaps_in, "swapped in"),
        (lane.pages_copied, "pages copied"),
        (lane.deadline_misses, "deadlines missed"),
    )
    pages = [f"host pages {host - lane.host_pages_free}/{host}"] if host else []
    return pages + [f"{word} {count}" for count, word in counted if count]


def _services_table(services: Sequence[ServiceStatus]) -> Table:
    columns = (
        ("SERVICE", "word"),
        ("STATE", "word"),
        ("PID", "number"),
        ("RESTARTS", "number"),
        ("UP", "number"),
        ("", "long"),
    )
    return table(
        columns,
        (
            (
                each.name,
                state_name(ServiceState, each.state),
                str(each.pid) if each.pid else "-",
                str(each.restarts),
                duration(each.uptime_ms),
                each.detail,
            )
            for each in services
        ),
    )


def print_tokens(console: Console, tokens: Tokenization) -> None:
    console.print(Text(f"{len(tokens)} tokens, model {printable(tokens.model)}", style="dim"))
    shown = ((str(token), json.dumps(piece, ensure_ascii=False)) for token, piece in zip(tokens.ids, tokens.pieces))
    console.print(table((("ID", "number"), ("TEXT", "word")), shown))


def short(text: str, limit: int) -> str:
    """Cut to `limit` characters, visibly."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"
