"""`llmosctl` on running sequences: ps, kill, nice, suspend, resume, explain. Arguments and help."""

from __future__ import annotations

from typing import Annotated

import typer

from llmos.ctl import commands
from llmos.ctl.arguments import Json, RunDir, connect, terminal, wants_json
from llmos.ctl.errors import EXIT_HELP, command

app = typer.Typer()
Rid = Annotated[int, typer.Argument(help="Sequence number, as ps shows it.", metavar="RID")]


@app.command(epilog=EXIT_HELP)
@command
def ps(context: typer.Context, run_dir: RunDir = None, as_json: Json = False) -> None:
    """List your live sequences; root and llmosd's own user see everybody's."""
    with connect(context, run_dir) as client:
        commands.show_ps(client, terminal(), as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def kill(
    context: typer.Context,
    rids: Annotated[list[int], typer.Argument(help="Sequence numbers, as ps shows them.", metavar="RID")],
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """End sequences. Their clients get what was generated so far."""
    with connect(context, run_dir) as client:
        code = commands.kill_all(client, rids, as_json=wants_json(context, as_json))
    raise typer.Exit(code)


# A negative value looks like an option; the parser hands on what it does not know, and the value must be a number anyway.
@app.command(epilog=EXIT_HELP, context_settings={"ignore_unknown_options": True})
@command
def nice(
    context: typer.Context,
    rid: Rid,
    value: Annotated[int, typer.Argument(help="-20 is served first, 19 last.", metavar="VALUE")],
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Change how urgent a sequence is, also while it runs. Below 0 is for administrators: root and llmosd's own user."""
    with connect(context, run_dir) as client:
        commands.renice(client, rid, value, as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def suspend(
    context: typer.Context,
    rid: Rid,
    drop_pages: Annotated[
        bool, typer.Option("--drop-pages", help="Give its memory back at once; resume recomputes it.")
    ] = False,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Stop a sequence until resume. Nothing is lost; its memory is kept until somebody else needs it."""
    with connect(context, run_dir) as client:
        commands.suspend(client, rid, keep_pages=not drop_pages, as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def resume(context: typer.Context, rid: Rid, run_dir: RunDir = None, as_json: Json = False) -> None:
    """Let a suspended sequence go on."""
    with connect(context, run_dir) as client:
        commands.resume(client, rid, as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def explain(context: typer.Context, rid: Rid, run_dir: RunDir = None, as_json: Json = False) -> None:
    """Show where a live sequence's time went."""
    with connect(context, run_dir) as client:
        commands.show_explain(client, terminal(), rid, as_json=wants_json(context, as_json))
