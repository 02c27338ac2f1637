"""`make run`: start llmosd, show a first answer, then serve in the foreground until Ctrl-C. Standard library only.

Every signal reaches llmosd exactly once, through this process; llmosd ends when this process or its parent is killed.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

BIN = Path(sys.executable).parent
FIRST_PROMPT = "What is the capital of France?"
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Ask the system for SIGTERM when the parent dies, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> int:
    end_with_parent()
    # Its own session: Ctrl-C comes to us and is passed on, instead of arriving there twice.
    daemon = subprocess.Popen(
        [BIN / "llmosd", *sys.argv[1:]],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )

    def pass_on(number: int, frame: FrameType | None) -> None:
        if daemon.poll() is None:
            daemon.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    assert daemon.stdout is not None
    line = daemon.stdout.readline()
    if line:
        say(line.rstrip())
        if found := re.search(r" on (\S.*)/client\.sock \(pid ", line):
            first_answer(found[1])
        if found and daemon.poll() is None:
            say("\nllmos keeps serving; Ctrl-C stops it. In another terminal: .venv/bin/llmosctl chat")
    return daemon.wait()


def first_answer(run_dir: str) -> None:
    say(f'\n$ llmosctl run "{FIRST_PROMPT}"')
    environment = os.environ | {"LLMOS_RUN_DIR": run_dir}
    if subprocess.run([BIN / "llmosctl", "run", FIRST_PROMPT], env=environment, check=False).returncode:
        say("the first prompt got no answer; llmosd's messages above may say why")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
