"""How sequences look: a line of `ps`, everything about one, and where its time went."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmos.client.types import Explained, SeqRow, Stats
from llmos.codes import FinishReason, SeqState
from llmos.ctl.render import duration, percent, printable, short, state_name, table
from llmos.ctl.render_tenants import short_count

_CAUSES = (
    ("queue", "waited for its turn"),
    ("quota", "waited because of its tenant's limits"),
    ("prefill", "read its prompt, or computed it again"),
    ("decode", "made tokens"),
    ("preempted", "gave way to others"),
    ("swapped", "gave way, its memory on the host"),
    ("suspended", "until resume"),
    ("blocked", "for input, or for other sequences"),
    ("client", "its client did not read"),
)


def ps_table(rows: Sequence[SeqRow]) -> Table:
    """Ten columns in 80 characters, eleven if a job has more than one sequence; the model's name gets what is left."""
    jobs = any(row.job not in (0, row.rid) for row in rows)
    columns = [
        ("RID", "number"),
        *([("JOB", "number")] if jobs else []),
        ("OWNER", "word"),
        ("MODEL", "cut"),
        ("STATE", "word"),
        ("NI", "number"),
        ("IN", "number"),
        ("OUT", "number"),
        ("PAGES", "number"),
        ("TOK/S", "number"),
        ("AGE", "number"),
    ]
    return table(
        columns,
        (
            (
                str(row.rid),
                *([str(row.job) if row.job not in (0, row.rid) else "-"] if jobs else []),
                short(row.owner, 8),
                row.model,
                state_name(SeqState, row.state),
                str(row.nice),
                short_count(row.prompt_tokens),
                short_count(row.output_tokens),
                short_count(row.pages),
                _rate(row.tokens_per_s),
                duration(row.age_ms),
            )
            for row in rows
        ),
        gap=1,
    )


def print_stats(console: Console, stats: Stats) -> None:
    row, job = stats.row, stats.job
    kind = "open" if row.is_open else "one-shot"
    ended = f" ({state_name(FinishReason, stats.reason)})" if stats.reason else ""
    console.print(
        Text(f"sequence {row.rid}, {kind}, {state_name(SeqState, row.state)}{ended}, {duration(row.age_ms)} old")
    )
    console.print()
    most = f" of {row.max_tokens}" if row.max_tokens else ""
    left = "-" if stats.deadline_ms is None else f"{duration(stats.deadline_ms)} left"
    lines = [
        ("owner", row.owner),
        ("model", row.model),
        ("nice", str(row.nice)),
        ("tokens", f"{stats.num_tokens}: {row.prompt_tokens} in, {row.output_tokens} out{most}"),
        ("speed", f"{row.tokens_per_s:.1f} tokens/s"),
        ("pages", f"{row.pages}, on the host {row.host_pages}"),
        ("cached", f"{row.cached_tokens} tokens"),
        ("preempted", times(row.preemptions)),
        ("deadline", left),
        ("after", " ".join(map(str, stats.after)) or "-"),
        ("parent", "-" if stats.parent is None else str(stats.parent)),
        ("children", str(stats.children)),
        ("job", f"{job.job}: {job.live} of {job.sequences} live, {job.pages} pages, {short_count(job.tokens)} tokens"),
    ]
    for name, value in lines:
        console.print(Text(f"{name:<10}{printable(value)}"), soft_wrap=True)


def print_explained(console: Console, found: Explained) -> None:
    """The shares add up to the age."""
    state = state_name(SeqState, found.state)
    console.print(Text(f"sequence {found.rid}, {state}, nice {found.nice}, {duration(found.age_ms)} old"))
    console.print()
    columns = (("TIME", "word"), ("MS", "number"), ("%", "number"), ("", "long"))
    spent = [(name, float(getattr(found, f"{name}_ms")), why) for name, why in _CAUSES]
    rows = [(name, f"{time:.1f}", percent(time, found.age_ms), why) for name, time, why in spent]
    console.print(table(columns, rows))
    console.print()
    counts = (
        f"{found.cached_tokens} tokens from the cache, preempted {times(found.preemptions)}, "
        f"swapped {times(found.swaps)}, suspended {times(found.suspensions)}"
    )
    console.print(Text(counts), soft_wrap=True)


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times" if count else "never"


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.1f}" if tokens_per_s < 999.95 else short_count(tokens_per_s)
