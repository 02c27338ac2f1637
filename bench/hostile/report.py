"""What fuzz.py and flood.py have in common: runs one after the other, their rows as JSON, what is shown of one that failed."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import machine, versions


def report(rows: Iterable[dict[str, Any]], out: Path | None) -> int:
    """Print each row when it is there, and keep all in `out`. The exit code: is every row good?"""
    facts = {"machine": machine(), "versions": versions(), "command": shlex.join(["python", *sys.argv])}
    done = []
    for row in rows:
        done.append(row)
        print(json.dumps(row), flush=True)
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps({**facts, "rows": done}, indent=1) + "\n")
    return 0 if all(row["good"] for row in done) else 1


def show_log(lines: list[str], count: int) -> None:
    print("\n".join(lines[-count:]), file=sys.stderr)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-lines",
        type=int,
        default=60,
        help="of llmosd's log that are printed after a failure (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
