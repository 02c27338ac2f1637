"""The commands that look and act: ps, status, models, kill, tokenize."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from llmos.client.sync import Client
from llmos.ctl.errors import complain, exit_code
from llmos.ctl.render import models_table, print_status, print_tokens, ps_table, write_json
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
