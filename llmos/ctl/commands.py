"""The commands that look and act: all but run and chat."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from llmos.client.sync import Client
from llmos.ctl.errors import complain, exit_code
from llmos.ctl.render import models_table, print_status, print_tokens, ps_table, write_json
from llmos.ctl.render_tenants import print_explained, tenants_table
from llmos.errors import InvalidRequest, LlmosError


def show_ps(client: Client, console: Console, *, as_json: bool) -> None:
    rows = client.ps()
    if as_json:
        write_json(rows)
    else:
        console.print(ps_table(rows))


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


def kill_all(client: Client, rids: Sequence[int], *, as_json: bool) -> int:
    """Kill each; one that fails does not spare the others. Returns the exit code of the first failure."""
    code = 0
    killed: list[int] = []
    for rid in rids:
        try:
            client.kill(rid)
            killed.append(rid)
        except LlmosError as error:
            complain(error)
            code = code or exit_code(error)
    if as_json:
        write_json({"killed": killed, "failed": [rid for rid in rids if rid not in killed]})
    elif killed:
        sys.stdout.write(f"killed {' '.join(map(str, killed))}\n")
    return code


def renice(client: Client, rid: int, value: int, *, as_json: bool) -> None:
    client.nice(rid, value)
    if as_json:
        write_json({"rid": rid, "nice": value})
    else:
        sys.stdout.write(f"sequence {rid}: nice {value}\n")


def suspend(client: Client, rid: int, *, keep_pages: bool, as_json: bool) -> None:
    client.suspend(rid, keep_pages)
    if as_json:
        write_json({"rid": rid, "suspended": True, "keep_pages": keep_pages})
    else:
        sys.stdout.write(f"suspended {rid}\n")


def resume(client: Client, rid: int, *, as_json: bool) -> None:
    client.resume(rid)
    if as_json:
        write_json({"rid": rid, "suspended": False})
    else:
        sys.stdout.write(f"resumed {rid}\n")


def show_explain(client: Client, console: Console, rid: int, *, as_json: bool) -> None:
    explained = client.explain(rid)
    if as_json:
        write_json(explained)
    else:
        print_explained(console, explained)


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


def show_tokens(client: Client, console: Console, text: str, model: str | None, *, as_json: bool) -> None:
    tokens = client.tokenize(text, model=model)
    if as_json:
        write_json(tokens)
    else:
        print_tokens(console, tokens)


def read_text(argument: str) -> str:
    """The argument itself, or all of stdin for "-", without its last newline."""
    if argument != "-":
        return argument
    raw = sys.stdin.buffer.read()
    try:
        return raw.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"stdin is not UTF-8 (byte {error.start})", field="prompt") from None
