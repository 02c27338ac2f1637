"""The result of a run for people (a table) and for machines (JSON)."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict
from typing import Any

from chaos.judge import Violation
from chaos.output import HARMS
from chaos.run import ChaosRun, Options, Outcome
from chaos.tally import Fault, Row, Tally

HEADINGS = (
    "fault", "injected", "recovered", "after p50", "max s", "requests hit", "failed", "lost", "duplicated", "changed",
    "stall p50", "p99", "max s",
)  # fmt: skip
MOST_SHOWN = 20
STALLS_SHOWN, STALL_S = 3, 3.0  # the goal is 3 s
_NUMBER = re.compile(r"\d+")


def progress_line(run: ChaosRun, now: float) -> str:
    tally = run.tally
    harms = " ".join(f"{name} {tally.harm(name)}" for name in HARMS)
    elapsed = now - run.started_at if run.started_at else 0.0
    return (
        f"{run.phase} {elapsed:.0f} s: {len(tally.faults)} faults ({run.num_unrecovered} open), "
        f"{tally.requests.total()} requests, {tally.tokens} tokens, {harms}, longest stall {tally.longest_stall:.1f} s"
    )


def table(tally: Tally) -> str:
    """One line per kind and signal, and the sum."""
    lines: list[tuple[str, ...]] = [HEADINGS]
    lines += [_line(" ".join(cause).strip(), row) for cause, row in tally.rows().items()]
    lines.append(_line("total", tally.total()))
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )


def _line(name: str, row: Row) -> tuple[str, ...]:
    found = row.summary()
    return (
        name, str(found["injected"]), str(found["recovered"]), f"{found['recovery_p50_s']:.2f}",
        f"{found['recovery_max_s']:.2f}", str(found["requests_hit"]), *(str(found[harm]) for harm in HARMS),
        f"{found['stall_p50_s']:.2f}", f"{found['stall_p99_s']:.2f}", f"{found['stall_max_s']:.2f}",
    )  # fmt: skip


def text(outcome: Outcome) -> str:
    """The table, what was wrong, and the verdict."""
    tally = outcome.tally
    lines = [
        table(tally),
        f"{tally.requests.total()} requests ({tally.accepted} accepted, {tally.refusals} refusals before that were asked again), "
        f"{tally.tokens} tokens, {outcome.seconds:.0f} s{', ended early' if outcome.interrupted else ''}",
    ]
    unnoticed = tally.total().unnoticed
    if unnoticed:
        lines.append(f"{unnoticed} stopped processes were replaced by nobody and had to be continued")
    lines += _violations(tally)
    lines += [
        f"note: {stall.verb} stalled {stall.seconds:.2f} s from {stall.begin:.2f} on, {' '.join(stall.cause)} "
        f"(client {stall.client} request {stall.req})"
        for stall in tally.longest[:STALLS_SHOWN]
        if stall.seconds > STALL_S
    ]
    lines += [f"note: {note}" for note in outcome.notes]
    lines += [f"PROBLEM: {problem}" for problem in outcome.problems]
    lines.append("nothing failed, lost, duplicated or changed" if outcome.is_good else "NOT GOOD")
    if outcome.kept is not None:
        lines.append(f"kept in {outcome.kept}")
    return "\n".join(lines)


def _violations(tally: Tally) -> list[str]:
    """One line for all that differ in numbers only, with the first of them as the example."""
    alike: dict[tuple[str, str, str], list[Violation]] = defaultdict(list)
    for found in tally.violations:
        alike[found.harm, found.what, _NUMBER.sub("#", found.detail)].append(found)
    shown = sorted(alike.values(), key=len, reverse=True)
    lines = [
        f"{len(group):5} x {first.harm}: {first.what}: {first.detail} (client {first.client} request {first.req} at {first.at:.3f})"
        for group in shown[:MOST_SHOWN]
        for first in group[:1]
    ]
    if tally.num_violations > len(tally.violations):
        lines.append(f"      ... {tally.num_violations} violations in all, the first {len(tally.violations)} are shown")
    return lines


def as_json(outcome: Outcome, options: Options, facts: dict[str, Any]) -> dict[str, Any]:
    """`facts`: machine, versions and command."""
    tally = outcome.tally
    return {
        **facts,
        "options": asdict(options) | {"keep": None},
        "seconds": round(outcome.seconds, 1),
        "interrupted": outcome.interrupted,
        "good": outcome.is_good,
        "requests": dict(tally.requests),
        "accepted": tally.accepted,
        "refusals": tally.refusals,
        "tokens": tally.tokens,
        "rows": [{"kind": kind, "fault": fault, **_rounded(row)} for (kind, fault), row in tally.rows().items()],
        "total": _rounded(tally.total()),
        "faults": [_fault(fault, tally.faults[0].at) for fault in tally.faults],
        "longest_stalls": [asdict(stall) for stall in tally.longest],
        "violations": [asdict(found) for found in tally.violations],
        "problems": outcome.problems,
        "notes": outcome.notes,
    }


def _fault(fault: Fault, begin: float) -> dict[str, Any]:
    """Times in seconds: `after` the first fault, `recovery` from this one."""
    recovery = None if fault.recovered_at is None else round(fault.recovered_at - fault.at, 3)
    after = round(fault.at - begin, 3)
    return {"after": after, "fault": fault.fault, "service": fault.service, "pid": fault.pid, "recovery": recovery}


def _rounded(row: Row) -> dict[str, Any]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in row.summary().items()}
