"""Options that several commands share, and what commands make of the common ones.

A command that takes an `Output` or a `Placement` has all options of that group, declared once here: `grouped` puts them in its
signature, where typer looks for them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from llmos.client.sync import Client
from llmos.ctl.notices import OutageNotices
from llmos.errors import InvalidRequest

RunDir = Annotated[
    str | None,
    typer.Option(
        "--url",
        "--run-dir",
        help="tcp://HOST:PORT (keys: LLMOS_KEY, LLMOS_SERVER_KEY), or the folder of a local llmosd's sockets; else LLMOS_URL, else "
        "the usual folder.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Stream = Annotated[bool, typer.Option("--stream", help="With --json: one JSON line for each piece.")]
System = Annotated[str | None, typer.Option("--system", help="System message of the chat.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Model name; without it the first one served.")]
Timeout = Annotated[float | None, typer.Option("--timeout", help="Longest time for one answer, in seconds.")]
Rid = Annotated[int, typer.Argument(help="Sequence number, as ps shows it.", metavar="RID")]


@dataclass(frozen=True)
class Output:
    """How an answer is made."""

    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Most tokens to generate.")] = None
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="0 = always the likeliest token.")
    ] = None
    top_k: Annotated[int | None, typer.Option("--top-k", help="Only the k likeliest tokens; 0 = all.")] = None
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Only the likeliest tokens that make up this probability.")
    ] = None
    min_p: Annotated[
        float | None, typer.Option("--min-p", help="Only tokens this likely, relative to the likeliest.")
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1: fewer repetitions.")
    ] = None
    presence_penalty: Annotated[
        float | None, typer.Option("--presence-penalty", help="Taken off tokens already used.")
    ] = None
    frequency_penalty: Annotated[float | None, typer.Option("--frequency-penalty", help="The same, per use.")] = None
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed and request give the same answer.")] = None
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End the answer before this text; repeatable.")] = (
        None
    )
    json_schema: Annotated[
        Path | None,
        typer.Option("--json-schema", help="The answer is JSON that fits the schema in this file.", metavar="FILE"),
    ] = None
    regex: Annotated[str | None, typer.Option("--regex", help="The whole answer matches this regular expression.")] = (
        None
    )
    choice: Annotated[
        list[str] | None, typer.Option("--choice", help="The answer is one of these texts; repeatable.")
    ] = None
    grammar: Annotated[
        Path | None, typer.Option("--grammar", help="The answer fits the Lark grammar in this file.", metavar="FILE")
    ] = None
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")] = False
    deadline: Annotated[
        float | None, typer.Option("--deadline", help="Give up if it still waits after this many seconds.")
    ] = None
    timeout: Timeout = None

    def options(self) -> dict[str, Any]:
        """What was given, as keyword arguments of the SDK's `generate`."""
        given = _given(self, deadline="deadline_s", timeout="timeout_s")
        return given | {name: _content(name, given[name]) for name in ("json_schema", "grammar") if name in given}


@dataclass(frozen=True)
class Placement:
    """Where a new sequence belongs."""

    model: Model = None
    nice: Annotated[
        int, typer.Option("--nice", help="-20 is served first, 19 last; below 0 is for administrators.")
    ] = 0
    parent: Annotated[
        int | None, typer.Option("--parent", help="The sequence whose job it belongs to.", metavar="RID")
    ] = None
    after: Annotated[
        list[int] | None, typer.Option("--after", help="Begin when this one has ended well; repeatable.", metavar="RID")
    ] = None

    def options(self) -> dict[str, Any]:
        """What was given, as keyword arguments of the SDK's `spawn` and `generate`."""
        return _given(self)


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """A parameter whose type is a dataclass becomes one option for each of its fields."""
    signature = inspect.signature(function, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if dataclasses.is_dataclass(parameter.annotation)
    }

    @functools.wraps(function)
    def wrapped(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        function(**given)

    flat: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        flat += _fields(groups[name]) if name in groups else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    wrapped.__signature__ = signature.replace(parameters=flat)  # type: ignore[attr-defined]
    return wrapped


def _fields(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(group)
    ]


def _given(group: Output | Placement, **renamed: str) -> dict[str, Any]:
    values = {field.name: (getattr(group, field.name), field.default) for field in dataclasses.fields(group)}
    return {renamed.get(name, name): value for name, (value, default) in values.items() if value not in (default, [])}


def _content(option: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--{option.replace('_', '-')}: {error}", field=option) from None


def wants_json(context: typer.Context, here: bool) -> bool:
    """`--json` may stand before the command or after it."""
    return here or bool(context.obj["as_json"])


def connect(context: typer.Context, here: str | None) -> Client:
    """A client of the daemon that was meant; `--url` too may stand in either place."""
    return Client(here or context.obj["run_dir"], on_outage=OutageNotices())


def terminal() -> Console:
    return Console(highlight=False, soft_wrap=False)
