"""`llmosctl top` as a process on a terminal, with a scripted client: the other half of test_top_terminal.py, and a demonstration.

    python tests/support/top_process.py [FOLDER] [--rows N]

Verbs are reported on stderr, one a line. While FOLDER/down exists, no daemon runs; while FOLDER/refuse exists, verbs are refused with its
text. In a session without a terminal of its own, stdin becomes that: then its keys send signals, as they do at a shell.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from top_world import FakeClient, busy_rows

from llmos.ctl.top.app import Loop
from llmos.ctl.top.look import look_for
from llmos.ctl.top.state import State
from llmos.errors import DaemonNotRunning, PermissionRefused
from llmos.protocol import messages as m


class ScriptedClient(FakeClient):
    """Its sequences make progress with the clock."""

    def __init__(self, folder: Path | None, num_rows: int) -> None:
        super().__init__()
        self.rows = busy_rows(num_rows)
        self._folder = folder
        self._at = time.monotonic()

    def status(self) -> m.StatusReply:
        now = time.monotonic()
        self.advance(now - self._at, 20 + int(now * 7) % 11)
        self._at = now
        return super().status()

    def _check(self) -> None:
        if self._folder is not None and (self._folder / "down").exists():
            raise DaemonNotRunning("llmosd is not running on nowhere")

    def _do(self, *call: Any) -> None:
        if self._folder is not None and (self._folder / "refuse").exists():
            raise PermissionRefused((self._folder / "refuse").read_text())
        super()._do(*call)
        sys.stderr.write(" ".join(map(str, call)) + "\n")
        sys.stderr.flush()


def main() -> int:
    arguments = sys.argv[1:]
    num_rows = 40
    if "--rows" in arguments:
        at = arguments.index("--rows")
        num_rows = int(arguments[at + 1])
        del arguments[at : at + 2]
    os.close(os.open(os.ttyname(0), os.O_RDWR))  # becomes the session's terminal, if it has none
    client = ScriptedClient(Path(arguments[0]) if arguments else None, num_rows)
    console = Console(highlight=False, force_interactive=True)
    look = look_for(console, os.environ.get("TERM", ""), live=True)
    state = State(0.2 if arguments else 1.0, look.glyphs)
    code = Loop(client, state, console, look, sys.stdin.fileno()).run()
    sys.stderr.write(f"closed {client.closed}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
