"""`llmosctl`: arguments and help.

What commands do is in `commands.py` and `generate.py`, exit codes are in `errors.py`. The commands on running sequences have
their arguments in `processes.py`, those on tenants in `tenants.py`.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from llmos import __version__
from llmos.ctl import commands, generate, processes, tenants
from llmos.ctl.arguments import (
    Deadline,
    FrequencyPenalty,
    IgnoreEos,
    Json,
    MaxTokens,
    MinP,
    Model,
    Niceness,
    PresencePenalty,
    RepetitionPenalty,
    RunDir,
    Seed,
    Stop,
    System,
    Temperature,
    Timeout,
    TopK,
    TopP,
    connect,
    terminal,
    wants_json,
)
from llmos.ctl.errors import EXIT_HELP, command

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
def run(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the plain text instead of answering it as a chat.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="With --json: one JSON line for each piece.")] = False,
    system: System = None,
    model: Model = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
    nice: Niceness = 0,
    deadline: Deadline = None,
    timeout: Timeout = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Answer one prompt. The answer appears as it is made; Ctrl-C stops it."""
    if raw and system is not None:
        raise typer.BadParameter("--system needs a chat; leave out --raw")
    chosen = _sampling(locals()) | {"nice": nice, "deadline_s": deadline}
    as_json = wants_json(context, as_json)
    form = ("jsonl" if stream else "json") if as_json else "text"
    with connect(context, run_dir) as client:
        text = commands.read_text(prompt)
        generate.run_once(client, text, raw=raw, system=system, options=chosen, form=form)


@app.command(epilog=EXIT_HELP)
@command
def chat(
    context: typer.Context,
    system: System = None,
    model: Model = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    timeout: Timeout = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Talk, line by line. Ctrl-C stops an answer, Ctrl-D leaves."""
    chosen = _sampling(locals())
    form = "jsonl" if wants_json(context, as_json) else "text"
    with connect(context, run_dir) as client:
        generate.Chat(client, system, chosen, form).loop()


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


_SAMPLING = (
    "model",
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "ignore_eos",
)


app.add_typer(processes.app)
app.add_typer(tenants.app, name="tenant")


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as arguments of `Client.generate`."""
    chosen = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
    return chosen | {"timeout_s": given["timeout"]}


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
