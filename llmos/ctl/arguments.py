"""Options that several commands share, and what commands make of the common ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from llmos.client.sync import Client

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
Niceness = Annotated[int, typer.Option("--nice", help="-20 is served first, 19 last; below 0 is for administrators.")]
Deadline = Annotated[
    float | None, typer.Option("--deadline", help="Give up if it still waits after this many seconds.")
]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Longest time for one answer, in seconds.")]


def wants_json(context: typer.Context, here: bool) -> bool:
    """`--json` may stand before the command or after it."""
    return here or context.obj["as_json"]


def connect(context: typer.Context, here: Path | None) -> Client:
    """A client of the daemon that was meant; `--run-dir` too may stand in either place."""
    return Client(here or context.obj["run_dir"])


def terminal() -> Console:
    return Console(highlight=False, soft_wrap=False)
