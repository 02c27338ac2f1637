"""What a service process must never do, refused while it runs: a Python audit hook, set before the process reads
anything from outside.

Unpickling of anything but plain data, starting of programs, connecting to the network. The first is how model files and messages become
code, the others are what that code would do next. A hook can not be taken back, and is no sandbox: it stops what somebody smuggles in
through a library, not code that already runs here. Reading compiled modules raises the same events as unmarshalling does, so that one is
only banned from our sources (tests/test_bans.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from typing import Any

# What Triton runs to compile a kernel: ptxas, and a C compiler and ldconfig for its launcher.
COMPILERS = frozenset({"ptxas", "ptxas-blackwell", "gcc", "cc", "clang", "ldconfig"})
_PROGRAMS = {"executor": COMPILERS}
_MAY_CONNECT = frozenset({"gateway"})  # to its own port, to test it
_STARTS = frozenset({"subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn"})
_NEVER = frozenset({"os.system", "os.fork", "os.forkpty", "pty.spawn", "os.startfile"})


class Forbidden(PermissionError):
    """A library that can do without, as some can without a program to ask, takes it for what the system might have said."""


def forbid(role: str) -> None:
    """For the rest of this process's life."""
    sys.addaudithook(_hook(_PROGRAMS.get(role, frozenset()), may_connect=role in _MAY_CONNECT))


def _hook(programs: Collection[str], *, may_connect: bool) -> Callable[[str, tuple[Any, ...]], None]:
    def check(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            raise Forbidden(f"unpickling {arguments[0]}.{arguments[1]} is forbidden in llmos")
        if event in _NEVER or (event in _STARTS and _program(event, arguments) not in programs):
            raise Forbidden(f"{event} is forbidden in this process of llmos: {arguments[:2]!r:.200}")
        # Unix addresses are texts.
        if event == "socket.connect" and not may_connect and isinstance(arguments[1], tuple):
            raise Forbidden(f"connecting to {arguments[1]!r} is forbidden in this process of llmos")

    return check


def _program(event: str, arguments: tuple[Any, ...]) -> str:
    path = arguments[1] if event == "os.spawn" else arguments[0]
    return os.path.basename(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
