"""What the commands do that look and act: all but those that show an answer.

Each has two forms of output: JSON, or lines for people.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from llmos.client.checked import checked_timeout
from llmos.client.sync import Client
from llmos.client.types import Ending, Explained, SeqRow, Stats
from llmos.codes import FinishReason, SeqState
from llmos.ctl.errors import EXIT_FAILED, complain, exit_code
from llmos.ctl.render import models_table, print_status, print_tokens, state_name, write_json
from llmos.ctl.render_sequences import print_explained, print_stats, ps_table
from llmos.ctl.render_tenants import tenants_table
from llmos.errors import InvalidRequest, LlmosError, RequestTimeout


def say(words: str, plain: Any, *, as_json: bool) -> None:
    """What was done, as a line or as JSON."""
    if as_json:
        write_json(plain)
    else:
        sys.stdout.write(f"{words}\n")


def select(
    rows: Sequence[SeqRow], *, job: int | None, tenant: str | None, state: SeqState | None
) -> tuple[SeqRow, ...]:
    """The rows that match everything given. `job`: any sequence of it that is among them, or its first one."""
    root = next((row.job for row in rows if row.rid == job), job)
    return tuple(
        row
        for row in rows
        if job is None or row.job == root
        if tenant is None or row.owner == tenant
        if state is None or row.state == state
    )


def show_ps(rows: Sequence[SeqRow], console: Console, *, as_json: bool) -> None:
    if as_json:
        write_json(rows)
    else:
        console.print(ps_table(rows))


def show_stats(stats: Stats, console: Console, *, as_json: bool) -> None:
    if as_json:
        write_json(stats)
    else:
        print_stats(console, stats)


def show_explained(explained: Explained, console: Console, *, as_json: bool) -> None:
    if as_json:
        write_json(explained)
    else:
        print_explained(console, explained)


def show_status(client: Client, console: Console, *, as_json: bool) -> None:
    status = client.status()
    if as_json:
        write_json(status)
    else:
        print_status(console, status)


def show_models(client: Client, console: Console, *, as_json: bool) -> None:
    models = client.models()
    if as_json:
        write_json(models)
    else:
        console.print(models_table(models))


def show_tokens(client: Client, console: Console, text: str, model: str | None, *, as_json: bool) -> None:
    tokens = client.tokenize(text, model=model)
    if as_json:
        write_json(tokens)
    else:
        print_tokens(console, tokens)


def show_tenants(client: Client, console: Console, *, as_json: bool) -> None:
    rows = client.tenants()
    if as_json:
        write_json(rows)
    else:
        console.print(tenants_table(rows))


def set_tenant(client: Client, console: Console, name: str, values: dict[str, Any], *, as_json: bool) -> None:
    """Change limits and show the tenant as it is now."""
    rows = client.set_tenant(name, **values)
    if as_json:
        write_json(rows)
    else:
        console.print(tenants_table(rows))


def kill_each(client: Client, rids: Sequence[int], *, as_json: bool) -> int:
    """Kill each; one that fails does not spare the others. Returns the exit code of the first failure."""
    code = 0
    killed: list[int] = []
    for rid in rids:
        try:
            killed += client.kill(rid)
        except LlmosError as error:
            complain(error)
            code = code or exit_code(error)
    say_killed(killed, [rid for rid in rids if rid not in killed], as_json=as_json)
    return code


def say_killed(killed: Sequence[int], failed: Sequence[int], *, as_json: bool) -> None:
    if as_json:
        write_json({"killed": list(killed), "failed": list(failed)})
    elif killed:
        sys.stdout.write(f"killed {' '.join(map(str, killed))}\n")
    elif not failed:
        sys.stdout.write("nothing to kill\n")


def wait_all(client: Client, rids: Sequence[int], timeout_s: float | None, *, as_json: bool) -> int:
    """Wait for each; one that is not there does not stop the others. Returns the exit code of the first failure."""
    limit = checked_timeout(timeout_s)
    code = 0
    endings: list[Ending] = []
    started = time.monotonic()
    for rid in rids:
        left = None if limit is None else max(limit - (time.monotonic() - started), 1e-3)
        try:
            ending = _ending(client, rid, left, limit)
        except LlmosError as error:
            complain(error)
            code = code or exit_code(error)
            continue
        endings.append(ending)
        code = code or (EXIT_FAILED if ending.is_failure else 0)
        if not as_json:
            sys.stdout.write(f"sequence {rid}: {ending.reason}, {ending.usage.output_tokens} tokens\n")
            sys.stdout.flush()
    if as_json:
        write_json(endings)
    return code


def _ending(client: Client, rid: int, left_s: float | None, limit_s: float | None) -> Ending:
    """`left_s` of `limit_s` are left; one that ended while others were waited for is found even if nothing is."""
    seq = client.sequence(rid)
    try:
        return seq.wait(timeout_s=left_s)
    except RequestTimeout:
        stats = seq.stat()
        if not stats.reason:
            raise RequestTimeout(f"sequence {rid} did not end within {limit_s:g} s", field="timeout_s") from None
        return Ending(rid, state_name(FinishReason, stats.reason), stats.usage)


def read_text(argument: str) -> str:
    """The argument itself, or all of stdin for "-", without its last newline."""
    if argument != "-":
        return argument
    raw = sys.stdin.buffer.read()
    try:
        return raw.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"stdin is not UTF-8 (byte {error.start})", field="prompt") from None
