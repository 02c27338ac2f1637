"""`llmosctl` makes and feeds sequences: spawn, append, generate, fork, attach. Arguments and help."""

from __future__ import annotations

from typing import Annotated

import typer

from llmos.ctl import generate as answers
from llmos.ctl.arguments import (
    Json,
    Output,
    Placement,
    Rid,
    RunDir,
    Stream,
    Timeout,
    connect,
    grouped,
    wants_json,
)
from llmos.ctl.commands import read_text, say
from llmos.ctl.errors import EXIT_HELP, command

app = typer.Typer()


@app.command(epilog=EXIT_HELP)
@command
@grouped
def spawn(
    context: typer.Context,
    placement: Placement,
    prompt: Annotated[
        str | None, typer.Argument(help="Plain text to begin with; - reads it from stdin.", show_default=False)
    ] = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Make an open sequence and print its number. It lives until close, kill or idleness, whoever is connected."""
    with connect(context, run_dir) as client:
        text = None if prompt is None else read_text(prompt)
        seq = client.spawn(text, **placement.options())
        say(f"{seq.rid}", {"rid": seq.rid}, as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def append(
    context: typer.Context,
    rid: Rid,
    text: Annotated[str, typer.Argument(help="The text; - reads it from stdin.")],
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Add text to an open sequence that is not generating."""
    with connect(context, run_dir) as client:
        length = client.sequence(rid).append(read_text(text))
    say(f"sequence {rid}: {length} tokens", {"rid": rid, "num_tokens": length}, as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
@grouped
def generate(
    context: typer.Context,
    rid: Rid,
    output: Output,
    stream: Stream = False,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Let an open sequence go on, and show what it makes. Ctrl-C ends the output, not the sequence."""
    form = answers.form(wants_json(context, as_json), stream)
    with connect(context, run_dir) as client:
        seq = client.sequence(rid)
        answers.show(lambda: seq.generate(stream=True, **output.options()), form)


@app.command(epilog=EXIT_HELP)
@command
def fork(
    context: typer.Context,
    rid: Rid,
    count: Annotated[int, typer.Option("--count", "-n", help="This many copies.")] = 1,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Copy a sequence, pages shared, and print the numbers of the copies. Those of one that generates generate on."""
    with connect(context, run_dir) as client:
        rids = [kid.rid for kid in client.sequence(rid).fork(count)]
    say("\n".join(map(str, rids)), {"rid": rid, "children": rids}, as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def attach(
    context: typer.Context,
    rid: Rid,
    offset: Annotated[int, typer.Option("--from", help="Begin with this token of the output.", metavar="OFFSET")] = 0,
    timeout: Timeout = None,
    stream: Stream = False,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Read the output of a sequence in place of whoever read it. Ctrl-C leaves; the sequence goes on."""
    form = answers.form(wants_json(context, as_json), stream)
    with connect(context, run_dir) as client:
        seq = client.sequence(rid)
        answers.show(lambda: seq.attach(offset, timeout_s=timeout), form)
