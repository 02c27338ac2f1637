"""`llmosctl embed`, `classify`, `score`: what encoder models make of texts."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llmos.client.types import Classification, Embedding
from llmos.ctl import commands
from llmos.ctl.arguments import Json, Model, RunDir, connect, wants_json
from llmos.ctl.errors import EXIT_HELP, command
from llmos.ctl.render import printable, write_json

app = typer.Typer()
_SHOWN = 6  # numbers of a vector, for people
Text = Annotated[list[str], typer.Argument(help="One text or more; - reads one from stdin.", metavar="TEXT")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut a text that is too long instead of refusing it.")]


@app.command(epilog=EXIT_HELP)
@command
def embed(
    context: typer.Context,
    texts: Text,
    model: Model = None,
    truncate: Truncate = False,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Show the vectors of texts, by an embedding model; whole with --json."""
    with connect(context, run_dir) as client:
        found = client.embed(list(map(commands.read_text, texts)), model=model, truncate=truncate)
    if wants_json(context, as_json):
        write_json([_plain(each) for each in found])
        return
    for each in found:
        more = " ..." if len(each) > _SHOWN else ""
        numbers = " ".join(f"{value:.4f}" for value in each.vector[:_SHOWN])
        sys.stdout.write(f"{len(each)} numbers, {each.usage.prompt_tokens} tokens: {numbers}{more}\n")


def _plain(found: Embedding) -> dict[str, object]:
    return {
        "rid": found.rid,
        "model": found.model,
        "vector": found.vector.tolist(),
        "prompt_tokens": found.usage.prompt_tokens,
    }


@app.command(epilog=EXIT_HELP)
@command
def classify(
    context: typer.Context,
    texts: Text,
    model: Model = None,
    truncate: Truncate = False,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Show the scores of texts, by a classification model; the best class first."""
    with connect(context, run_dir) as client:
        found = client.classify(list(map(commands.read_text, texts)), model=model, truncate=truncate)
    if wants_json(context, as_json):
        write_json(found)
        return
    for each in found:
        sys.stdout.write("  ".join(f"{label} {score:.4f}" for label, score in _best_first(each)) + "\n")


def _best_first(found: Classification) -> list[tuple[str, float]]:
    return sorted(zip(found.labels, found.scores), key=lambda pair: -pair[1])


@app.command(epilog=EXIT_HELP)
@command
def score(
    context: typer.Context,
    query: Annotated[str, typer.Argument(help="What the texts are compared with.")],
    texts: Text,
    model: Model = None,
    truncate: Truncate = False,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Show how well each text goes with a query, by a model that reads both together; the best first."""
    given = list(map(commands.read_text, texts))
    with connect(context, run_dir) as client:
        found = client.score(query, given, model=model, truncate=truncate)
    ranked = sorted(zip(found, given), key=lambda pair: -pair[0])
    if wants_json(context, as_json):
        write_json([{"text": text, "score": value} for value, text in ranked])
        return
    for value, text in ranked:
        sys.stdout.write(f"{value:.4f}  {printable(text)}\n")
