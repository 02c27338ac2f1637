"""`llmosctl tenant`: who shares the machine, with what rights to it. Arguments and help."""

from __future__ import annotations

from typing import Annotated

import typer

from llmos.ctl import commands
from llmos.ctl.arguments import Json, RunDir, connect, terminal, wants_json
from llmos.ctl.errors import EXIT_HELP, command
from llmos.errors import InvalidRequest
from llmos.protocol import limits

app = typer.Typer(help="Who shares the machine: limits and use.", epilog=EXIT_HELP, no_args_is_help=True)


def _count(text: str) -> int:
    """A number, or the word for the largest one."""
    if text == "unlimited":
        return limits.UNLIMITED
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number nor 'unlimited'") from None


@app.command("list", epilog=EXIT_HELP)
@command
def list_(context: typer.Context, run_dir: RunDir = None, as_json: Json = False) -> None:
    """Show your limits and use per model; administrators see all tenants."""
    with connect(context, run_dir) as client:
        commands.show_tenants(client, terminal(), as_json=wants_json(context, as_json))


@app.command("set", epilog=EXIT_HELP)
@command
def set_(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The tenant: a unix user, or whom a key is for.", metavar="NAME")],
    weight: Annotated[
        float | None, typer.Option("--weight", help="Share of the machine while others want it too; 1 is usual.")
    ] = None,
    max_pages: Annotated[
        int | None, typer.Option("--max-pages", help="Most pages at once.", parser=_count, metavar="N|unlimited")
    ] = None,
    guaranteed_pages: Annotated[
        int | None, typer.Option("--guaranteed-pages", help="Pages that nobody else can take from it.", metavar="N")
    ] = None,
    max_running: Annotated[
        int | None,
        typer.Option("--max-running", help="Most sequences running at once.", parser=_count, metavar="N|unlimited"),
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option("--max-waiting", help="Most sequences waiting at once.", parser=_count, metavar="N|unlimited"),
    ] = None,
    tokens_per_s: Annotated[
        float | None, typer.Option("--tokens-per-s", help="Most tokens per second; 0 = no limit.", metavar="RATE")
    ] = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Change a tenant's limits on every model, for administrators. What is not given stays."""
    values = {
        "weight": weight,
        "max_pages": max_pages,
        "guaranteed_pages": guaranteed_pages,
        "max_running": max_running,
        "max_waiting": max_waiting,
        "tokens_per_s": tokens_per_s,
    }
    if all(value is None for value in values.values()):
        raise InvalidRequest("nothing to change; give at least one limit, for example --weight 3")
    with connect(context, run_dir) as client:
        commands.set_tenant(client, terminal(), name, values, as_json=wants_json(context, as_json))
