"""`llmosctl` watches and steers sequences: ps, stat, explain, wait, kill, close, nice, deadline, after, suspend, resume. Arguments
and help."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from llmos.codes import SeqState
from llmos.ctl import commands
from llmos.ctl.arguments import Json, Rid, RunDir, connect, terminal, wants_json
from llmos.ctl.commands import say
from llmos.ctl.errors import EXIT_HELP, command
from llmos.errors import InvalidRequest

app = typer.Typer()
Rids = Annotated[list[int], typer.Argument(help="Sequence numbers, as ps shows them.", metavar="RID")]
OptionalRids = Annotated[
    list[int] | None, typer.Argument(help="Sequence numbers, as ps shows them.", metavar="RID", show_default=False)
]
JobOf = Annotated[int | None, typer.Option("--job", help="Only the job that this sequence belongs to.", metavar="RID")]
Tenant = Annotated[str | None, typer.Option("--tenant", help="Only those of this tenant.", metavar="NAME")]
# A negative value looks like an option; the parser hands on what it does not know, and the value must be a number anyway.
_NUMBERS_MAY_BE_NEGATIVE = {"ignore_unknown_options": True}


class Pages(StrEnum):
    """The words of `PageFate`."""

    keep = "keep"
    swap = "swap"
    drop = "drop"


def _state(word: str) -> SeqState:
    try:
        return SeqState[word.upper()]
    except KeyError:
        words = ", ".join(state.name.lower() for state in SeqState)
        raise typer.BadParameter(f"{word!r} is none of {words}") from None


@app.command(epilog=EXIT_HELP)
@command
def ps(
    context: typer.Context,
    job: JobOf = None,
    tenant: Tenant = None,
    state: Annotated[
        SeqState | None, typer.Option("--state", help="Only those in this state.", parser=_state, metavar="STATE")
    ] = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """List your live sequences; administrators see everybody's."""
    with connect(context, run_dir) as client:
        rows = commands.select(client.ps(), job=job, tenant=tenant, state=state)
    commands.show_ps(rows, terminal(), as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def stat(context: typer.Context, rid: Rid, run_dir: RunDir = None, as_json: Json = False) -> None:
    """Show all that is known of one sequence and its job, also if it ended a while ago."""
    with connect(context, run_dir) as client:
        commands.show_stats(client.sequence(rid).stat(), terminal(), as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def explain(context: typer.Context, rid: Rid, run_dir: RunDir = None, as_json: Json = False) -> None:
    """Show where a sequence's time went, also if it ended a while ago."""
    with connect(context, run_dir) as client:
        commands.show_explained(client.sequence(rid).explain(), terminal(), as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def wait(
    context: typer.Context,
    rids: Rids,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Longest time to wait, in seconds.")] = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Wait until sequences have ended, and say how. Exit code 1 if one of them failed."""
    with connect(context, run_dir) as client:
        code = commands.wait_all(client, rids, timeout, as_json=wants_json(context, as_json))
    raise typer.Exit(code)


@app.command(epilog=EXIT_HELP)
@command
def kill(
    context: typer.Context,
    rids: OptionalRids = None,
    tenant: Tenant = None,
    job: JobOf = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Only those on this model.")] = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """End sequences, by number or all that match every option given. Their clients get what was generated so far."""
    selector = {"tenant": tenant, "job": job, "model": model}
    if bool(rids) == any(value is not None for value in selector.values()):
        raise InvalidRequest("give either sequence numbers, or one or more of --tenant, --job, --model")
    with connect(context, run_dir) as client:
        if rids:
            code = commands.kill_each(client, rids, as_json=wants_json(context, as_json))
            raise typer.Exit(code)
        killed = client.kill(tenant=tenant, job=job, model=model)
    commands.say_killed(killed, (), as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def close(context: typer.Context, rid: Rid, run_dir: RunDir = None, as_json: Json = False) -> None:
    """End an open sequence and give its memory back."""
    with connect(context, run_dir) as client:
        client.sequence(rid).close()
    say(f"closed {rid}", {"rid": rid, "closed": True}, as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP, context_settings=_NUMBERS_MAY_BE_NEGATIVE)
@command
def nice(
    context: typer.Context,
    rid: Rid,
    value: Annotated[int, typer.Argument(help="-20 is served first, 19 last.", metavar="VALUE")],
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Change how urgent a sequence is, also while it runs. Below 0 is for administrators."""
    with connect(context, run_dir) as client:
        client.sequence(rid).nice(value)
    say(f"sequence {rid}: nice {value}", {"rid": rid, "nice": value}, as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP, context_settings=_NUMBERS_MAY_BE_NEGATIVE)
@command
def deadline(
    context: typer.Context,
    rid: Rid,
    seconds: Annotated[str, typer.Argument(help="From now; none takes the deadline away.", metavar="SECONDS|none")],
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Change by when a sequence has to be done. One that still waits then is ended."""
    try:
        value = None if seconds == "none" else float(seconds)
    except ValueError:
        raise InvalidRequest(f"{seconds!r} is neither a number of seconds nor 'none'") from None
    with connect(context, run_dir) as client:
        client.sequence(rid).deadline(value)
    words = "no deadline" if value is None else f"{value:g} s from now"
    say(f"sequence {rid}: {words}", {"rid": rid, "deadline_s": value}, as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def after(
    context: typer.Context,
    rid: Rid,
    others: Annotated[
        list[int] | None,
        typer.Argument(help="The sequences to wait for; none: it may begin.", metavar="RID", show_default=False),
    ] = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Change what a sequence that has not begun waits for. All of them have to end well."""
    rids = others or []
    with connect(context, run_dir) as client:
        client.sequence(rid).after(*rids)
    words = f"after {' '.join(map(str, rids))}" if rids else "after nothing"
    say(f"sequence {rid}: {words}", {"rid": rid, "after": rids}, as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def suspend(
    context: typer.Context,
    rid: Rid,
    pages: Annotated[
        Pages, typer.Option("--pages", help="Its memory: kept until needed, copied to the host, or recomputed later.")
    ] = Pages.keep,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Stop a sequence until resume. Nothing is lost."""
    with connect(context, run_dir) as client:
        client.sequence(rid).suspend(pages.value)
    plain = {"rid": rid, "suspended": True, "pages": pages.value}
    say(f"suspended {rid}", plain, as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def resume(context: typer.Context, rid: Rid, run_dir: RunDir = None, as_json: Json = False) -> None:
    """Let a suspended sequence go on."""
    with connect(context, run_dir) as client:
        client.sequence(rid).resume()
    say(f"resumed {rid}", {"rid": rid, "suspended": False}, as_json=wants_json(context, as_json))
