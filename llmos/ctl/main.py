"""`llmosctl`: arguments and help.

What commands do is in `commands.py` and `generate.py`, exit codes are in `errors.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from llmos import __version__
from llmos.client.sync import Client
from llmos.ctl import commands, generate
from llmos.ctl.errors import EXIT_HELP, command

app = typer.Typer(
    name="llmosctl",
    help="Talk to llmosd: run prompts, look at sequences, stop them.",
    epilog=EXIT_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunDir = Annotated[
    Path | None,
    typer.Option("--run-dir", help="Folder of llmosd's sockets, if it is not the usual one.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Model name; without it the first one served.")]
System = Annotated[str | None, typer.Option("--system", help="System message of the chat.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", "-n", help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option("--temperature", "-t", help="0 = always the likeliest token.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Only the k likeliest tokens; 0 = all.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Only the likeliest tokens that make up this probability.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Only tokens this likely, relative to the likeliest.")]
RepetitionPenalty = Annotated[float | None, typer.Option("--repetition-penalty", help="Above 1: fewer repetitions.")]
PresencePenalty = Annotated[float | None, typer.Option("--presence-penalty", help="Taken off tokens already used.")]
FrequencyPenalty = Annotated[float | None, typer.Option("--frequency-penalty", help="The same, per use.")]
Seed = Annotated[int | None, typer.Option("--seed", help="The same seed and request give the same answer.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End the answer before this text; repeatable.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Longest time for one answer, in seconds.")]


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
    """Talk to llmosd: run prompts, look at sequences, stop them."""
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
    timeout: Timeout = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Answer one prompt. The answer appears as it is made; Ctrl-C stops it."""
    if raw and system is not None:
        raise typer.BadParameter("--system needs a chat; leave out --raw")
    chosen = _sampling(locals())
    as_json = _as_json(context, as_json)
    form = ("jsonl" if stream else "json") if as_json else "text"
    with _client(context, run_dir) as client:
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
    form = "jsonl" if _as_json(context, as_json) else "text"
    with _client(context, run_dir) as client:
        generate.Chat(client, system, chosen, form).loop()


@app.command(epilog=EXIT_HELP)
@command
def ps(context: typer.Context, run_dir: RunDir = None, as_json: Json = False) -> None:
    """List your live sequences; root and llmosd's own user see everybody's."""
    with _client(context, run_dir) as client:
        commands.show_ps(client, _console(), as_json=_as_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def status(context: typer.Context, run_dir: RunDir = None, as_json: Json = False) -> None:
    """Show served models with their pages and counters, and llmosd's processes."""
    with _client(context, run_dir) as client:
        commands.show_status(client, _console(), as_json=_as_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def models(context: typer.Context, run_dir: RunDir = None, as_json: Json = False) -> None:
    """List registered models."""
    with _client(context, run_dir) as client:
        commands.show_models(client, _console(), as_json=_as_json(context, as_json))


@app.command(epilog=EXIT_HELP)
@command
def kill(
    context: typer.Context,
    rids: Annotated[list[int], typer.Argument(help="Sequence numbers, as ps shows them.", metavar="RID")],
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """End sequences. Their clients get what was generated so far."""
    with _client(context, run_dir) as client:
        code = commands.kill_all(client, rids, as_json=_as_json(context, as_json))
    raise typer.Exit(code)


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
    with _client(context, run_dir) as client:
        commands.show_tokens(client, _console(), commands.read_text(text), model, as_json=_as_json(context, as_json))


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


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as arguments of `Client.generate`."""
    chosen = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
    return chosen | {"timeout_s": given["timeout"]}


def _as_json(context: typer.Context, here: bool) -> bool:
    return here or context.obj["as_json"]


def _client(context: typer.Context, here: Path | None) -> Client:
    return Client(here or context.obj["run_dir"])


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False)


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()


if __name__ == "__main__":
    main()
