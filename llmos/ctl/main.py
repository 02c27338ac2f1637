"""`llmosctl`: arguments and help.

What commands do is in `commands.py` and `generate.py`, exit codes are in `errors.py`. The commands that make and feed sequences have
their arguments in `sequences.py`, those that watch and steer them in `processes.py`, those on tenants in `tenants.py`.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llmos import __version__
from llmos.ctl import (
    batch,
    commands,
    encodings,
    flight,
    generate,
    http,
    keys,
    processes,
    sequences,
    services,
    systemd,
    tenants,
)
from llmos.ctl.arguments import (
    Json,
    Model,
    Output,
    Placement,
    RunDir,
    Stream,
    System,
    connect,
    grouped,
    terminal,
    wants_json,
)
from llmos.ctl.errors import EXIT_HELP, command
from llmos.ctl.top import app as top
from llmos.errors import InvalidRequest

app = typer.Typer(
    name="llmosctl",
    help="Talk to llmosd: run prompts, look at sequences, steer and stop them.",
    epilog=EXIT_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"llmosctl {__version__}\n")
        raise typer.Exit(0)


@app.callback(no_args_is_help=True)
def options(
    context: typer.Context,
    run_dir: RunDir = None,
    as_json: Json = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Talk to llmosd: run prompts, look at sequences, steer and stop them."""
    context.obj = {"run_dir": run_dir, "as_json": as_json}


@app.command(epilog=EXIT_HELP)
@command
@grouped
def run(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    output: Output,
    placement: Placement,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the plain text instead of answering it as a chat.")
    ] = False,
    system: System = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="This many answers, made together.")] = 1,
    stream: Stream = False,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Answer one prompt. The answer appears as it is made; Ctrl-C stops it."""
    if raw and system is not None:
        raise InvalidRequest("--system needs a chat; leave out --raw")
    if stream and samples != 1:
        raise InvalidRequest("--stream shows one answer; leave out -n")
    chosen = output.options() | placement.options()
    form = generate.form(wants_json(context, as_json), stream)
    with connect(context, run_dir) as client:
        question = generate.Question(commands.read_text(prompt), raw, system)
        if samples == 1:
            generate.run_once(client, question, chosen, form)
        else:
            generate.run_samples(client, question, samples, chosen, form)


@app.command(epilog=EXIT_HELP)
@command
@grouped
def chat(
    context: typer.Context,
    output: Output,
    placement: Placement,
    system: System = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Talk, line by line. Ctrl-C stops an answer, Ctrl-D leaves."""
    form = generate.form(wants_json(context, as_json), stream=True)
    with connect(context, run_dir) as client:
        generate.Chat(client, system, output.options() | placement.options(), form).loop()


@app.command(epilog=EXIT_HELP)
@command
def status(context: typer.Context, run_dir: RunDir = None, as_json: Json = False) -> None:
    """Show served models with their pages and counters, and llmosd's processes."""
    with connect(context, run_dir) as client:
        commands.show_status(client, terminal(), as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def models(context: typer.Context, run_dir: RunDir = None, as_json: Json = False) -> None:
    """List registered models."""
    with connect(context, run_dir) as client:
        commands.show_models(client, terminal(), as_json=wants_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def tokenize(
    context: typer.Context,
    text: Annotated[str, typer.Argument(help="The text; - reads it from stdin.")],
    model: Model = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Show the tokens of a text."""
    with connect(context, run_dir) as client:
        commands.show_tokens(client, terminal(), commands.read_text(text), model, as_json=wants_json(context, as_json))


app.add_typer(encodings.app)
app.add_typer(sequences.app)
app.add_typer(processes.app)
app.add_typer(tenants.app, name="tenant")
app.add_typer(top.app)
app.add_typer(flight.app)
app.add_typer(services.app)
app.add_typer(http.app)
app.add_typer(batch.app)
app.add_typer(keys.app, name="keys")
app.add_typer(systemd.app, name="systemd")


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
