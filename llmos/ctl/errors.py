"""Exit codes, and how an error reaches the terminal: one line on stderr, never a traceback.

0 ok | 1 the request failed | 2 usage, or an argument was refused | 3 llmosd is not running | 4 not found |
5 overloaded or unavailable, try again | 130 interrupted
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from llmos.ctl.render import printable
from llmos.errors import DaemonNotRunning, InvalidRequest, LlmosError, NotFound, Overloaded, Unavailable

EXIT_FAILED, EXIT_USAGE, EXIT_NOT_RUNNING, EXIT_NOT_FOUND, EXIT_RETRY, EXIT_INTERRUPTED = 1, 2, 3, 4, 5, 130
EXIT_HELP = (
    "Exit codes: 0 ok, 1 failed request, 2 usage or refused argument, 3 llmosd not running, 4 not found, "
    "5 overloaded or unavailable, 130 interrupted."
)
_CODES: tuple[tuple[type[LlmosError], int], ...] = (  # the first that fits: subclasses before their bases
    (DaemonNotRunning, EXIT_NOT_RUNNING),
    (Unavailable, EXIT_RETRY),
    (Overloaded, EXIT_RETRY),
    (NotFound, EXIT_NOT_FOUND),
    (InvalidRequest, EXIT_USAGE),
)
P = ParamSpec("P")


def exit_code(error: LlmosError) -> int:
    return next((code for kind, code in _CODES if isinstance(error, kind)), EXIT_FAILED)


def complain(error: LlmosError) -> None:
    """One helpful line on stderr."""
    sys.stderr.write(f"llmosctl: {printable(error.message)}\n")


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Turn typed errors and Ctrl-C into exit codes."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except LlmosError as error:
            complain(error)
            raise typer.Exit(exit_code(error)) from None
        except KeyboardInterrupt:
            sys.stderr.write("\nllmosctl: interrupted\n")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:  # `llmosctl ... | head`: the reader has what it wants
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None

    return wrapped
