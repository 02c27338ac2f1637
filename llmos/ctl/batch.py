"""`llmosctl batch`: a file of requests at lowest priority, through the HTTP of the llmosd on this machine."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmos.ctl.arguments import Json, RunDir, wants_json
from llmos.ctl.batch_file import Output, read_requests
from llmos.ctl.errors import EXIT_FAILED, EXIT_HELP, command
from llmos.ctl.http import found
from llmos.ctl.render import printable, write_json

app = typer.Typer()


@app.command(epilog=EXIT_HELP)
@command
def batch(
    context: typer.Context,
    requests: Annotated[
        Path, typer.Argument(help="Requests in OpenAI's batch format, one a line.", metavar="IN.JSONL")
    ],
    answers: Annotated[Path, typer.Argument(help="Where answers are appended.", metavar="OUT.JSONL")],
    concurrency: Annotated[int, typer.Option(min=1, max=1000, help="Requests that are under way at once.")] = 32,
    give_up_s: Annotated[
        float, typer.Option("--give-up", min=1, help="Seconds without any answer after which it stops.")
    ] = 300.0,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Answer a file of requests, at the lowest priority: whatever else the machine has to do goes first.

    What OUT.JSONL has already is not asked again, so the same command goes on where an interrupted one stopped. All lines are
    checked before the first one is sent. A request that is refused has its refusal as answer, and the exit code is 1."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from llmos.ctl.batch_run import BatchRun, Server  # loads an HTTP client

    ids = {line.custom_id for line in read_requests(requests)}
    place, secret = found(context, run_dir)
    is_here = place.url.split("://")[1].startswith(("127.", "[::1]"))  # a certificate for that is mostly self-signed
    server = Server(place.url, secret.text, verify=not is_here, give_up_s=give_up_s)
    output = Output(answers)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(printable(requests.name), total=len(ids), completed=len(ids & output.done))
            run = BatchRun(server, output, concurrency, lambda: progress.advance(task))
            asyncio.run(run.run(read_requests(requests)))
    except KeyboardInterrupt:
        sys.stderr.write(f"llmosctl: {len(ids & output.done)} of {len(ids)} are answered; the same command goes on\n")
        raise
    finally:
        output.close()
    if wants_json(context, as_json):
        write_json({"requests": len(ids), "answered": len(ids & output.done), "failed": output.failed})
    else:
        sys.stdout.write(f"{len(ids)} requests, {output.failed} failed: {printable(str(answers))}\n")
    if output.failed:
        raise typer.Exit(EXIT_FAILED)
