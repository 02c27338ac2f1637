"""`llmosctl` on the flight recorder: write it, replay a file. Arguments, help and what is shown.

A replay runs the microkernel's own code, which this program does not load: it is a process, `llmos.microkernel.replay`, that reports as
JSON. Its exit codes are ours: 0 the same decisions, 1 a difference, 2 a file that can not be used.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from llmos.ctl.arguments import Json, RunDir, connect, wants_json
from llmos.ctl.errors import EXIT_FAILED, EXIT_HELP, EXIT_USAGE, command
from llmos.ctl.render import duration, printable, size, write_json
from llmos.errors import InvalidRequest, LlmosError

app = typer.Typer()
REPLAY_EXIT_HELP = (
    "Exit codes: 0 the same decisions, 1 a difference was found, 2 usage, or a file that can not be used."
)
_COMMAND = (sys.executable, "-P", "-m", "llmos.microkernel.replay")


@app.command(epilog=EXIT_HELP)
@command
def record(context: typer.Context, run_dir: RunDir = None, as_json: Json = False) -> None:
    """Let llmosd write its flight recorder to a file, for administrators. The same happens by itself when its microkernel
    crashes. The file holds the token ids of prompts and answers of all users: only its owner can read it, and few are kept."""
    with connect(context, run_dir) as client:
        written = client.write_record()
    if wants_json(context, as_json):
        write_json({"path": written.path, "records": written.records, "bytes": written.bytes})
    else:
        sys.stdout.write(f"{printable(written.path)}: {written.records} records, {size(written.bytes)}\n")


@app.command(epilog=REPLAY_EXIT_HELP)
@command
def replay(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="What record wrote, or a crash.", metavar="FILE")],
    as_json: Json = False,
) -> None:
    """Run the recorded calls through the microkernel again and compare every decision. Needs no llmosd and no GPU. The file must be of
    the same version of llmos."""
    report, code = _report(file)
    if wants_json(context, as_json):
        write_json(report)
    else:
        sys.stdout.write("\n".join(map(printable, _lines(report, file))) + "\n")
    raise typer.Exit(code)


def _report(file: Path) -> tuple[dict[str, Any], int]:
    done = subprocess.run([*_COMMAND, "--", str(file)], capture_output=True, check=False)
    if done.returncode in (0, EXIT_FAILED) and done.stdout:
        report: dict[str, Any] = json.loads(done.stdout)
        return report, done.returncode
    problem = done.stderr.decode("utf-8", "replace").strip()
    if done.returncode == EXIT_USAGE:
        raise InvalidRequest(problem, field="file")
    last = problem.splitlines()[-1] if problem else "no word of why"
    raise LlmosError(f"the replay ended with {done.returncode}: {last}")


def _lines(report: dict[str, Any], file: Path) -> list[str]:
    difference = report["difference"]
    if difference is None:
        lines = [f"{file}: the same decisions"]
    else:
        after = duration(difference["at_s"] * 1e3)
        lines = [
            f"{file}: a difference at record {difference['record']}, {after} after the start ({_moment(difference['wall'])})"
        ]
        shown = {name: difference[name] for name in ("call", "effect", "field", "recorded", "replayed")}
        lines += [f"  {name:<9} {value}" for name, value in shown.items() if value]
    lines.append(
        f"  {report['records']} records, {report['steps']} steps, {duration(report['seconds'] * 1e3)} compared; "
        f"written {_moment(report['wall'])}: {report['reason']}"
    )
    if report["crash"]:
        lines.append(f"  the recording ends in an exception, and so does the replay: {report['crash']}")
    if report["pauses"]:
        lines.append("  recording had paused for lack of memory: what came after is not in the file")
    if report["damage"]:
        lines.append(f"  {report['damage']}: nothing behind that was compared")
    return lines


def _moment(wall: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(wall))
