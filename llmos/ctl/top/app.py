"""The loop of `llmosctl top`, and the command.

One thread waits for keys, answers, signals and the next poll, changes the state and draws it. Whatever ends the loop, the terminal is as
it was before; Ctrl-Z leaves it, too, and `fg` comes back to a fresh frame.
"""

from __future__ import annotations

import errno
import math
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live

from llmos.client.sync import Client
from llmos.ctl.arguments import RunDir
from llmos.ctl.errors import EXIT_HELP, command
from llmos.ctl.top import columns
from llmos.ctl.top.control import Outcome, Wish, press
from llmos.ctl.top.keys import Keyboard
from llmos.ctl.top.look import Look, look_for
from llmos.ctl.top.state import Explanation, Polled, State, Verb
from llmos.ctl.top.view import frame
from llmos.ctl.top.worker import Acted, Answer, Lost, TopClient, WakePipe, Worker, ask

app = typer.Typer()
_CALL_TIMEOUT_S = 5.0
_ESCAPE_S = 0.1  # how long the rest of an escape sequence may take
_REST = 4.0  # after a poll that took long, at least this many times as long without one
_MOST_ROWS = 1_000_000  # on paper
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WATCHED = (*_ENDS, signal.SIGWINCH, signal.SIGTSTP)


class Loop:
    """The live view on a terminal: `fd` gives keys, `console` shows frames."""

    def __init__(self, client: TopClient, state: State, console: Console, look: Look, fd: int) -> None:
        self._state = state
        self._console = console
        self._fd = fd
        self._pipe = WakePipe()
        self._worker = Worker(client, self._pipe.wake)
        self._look = look
        self._signals: set[int] = set()
        self._poll_at = 0.0
        self._poll_began = 0.0
        self._ended = False

    def run(self) -> int:
        """Until the user leaves or a signal ends it; returns the exit code."""
        try:
            with self._watch_signals():
                while True:
                    self._session()
                    if self._ended:
                        break
                    signal.raise_signal(signal.SIGSTOP)  # Ctrl-Z, with the terminal given back
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self._signals.add(signal.SIGHUP)  # the terminal is gone, and what was not written yet with it
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._console.file.fileno())
        finally:
            self._worker.close()
            self._pipe.close()
        fatal = self._signals & {signal.SIGTERM, signal.SIGHUP}
        return 128 + min(fatal) if fatal else 0

    def _session(self) -> None:
        """From taking the terminal to giving it back."""
        self._signals.discard(signal.SIGTSTP)
        live = Live(
            console=self._console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        with Keyboard(self._fd) as keyboard, live:
            self._draw(live)
            while not self._ended and signal.SIGTSTP not in self._signals:
                if self._turn(keyboard):
                    self._draw(live)

    def _turn(self, keyboard: Keyboard) -> bool:
        """Wait for something and see to it; True if the frame may have changed."""
        readable, _, _ = select.select([self._fd, self._pipe.reader], [], [], self._patience(keyboard))
        changed = False
        if self._pipe.reader in readable:
            self._pipe.drain()
            self._ended = self._ended or bool(self._signals & set(_ENDS))
            changed = True
        for answer in self._worker.answers():
            self._take(answer)
        if self._fd in readable:
            try:
                self._press(keyboard.read())
            except EOFError:
                self._ended = True
            changed = True
        elif keyboard.decoder.waiting and not readable:
            self._press(keyboard.decoder.flush())
            changed = True
        self._ask()
        return self._state.expire(time.monotonic()) or changed

    def _patience(self, keyboard: Keyboard) -> float | None:
        """How long nothing has to be done without news."""
        moments = []
        now = time.monotonic()
        if not self._worker.polling and not self._state.paused:
            moments.append(self._poll_at)
        if self._state.message is not None:
            moments.append(self._state.message.until)
        if keyboard.decoder.waiting:
            moments.append(now + _ESCAPE_S)
        return max(0.0, min(moments) - now) if moments else None

    def _take(self, answer: Answer) -> None:
        now = time.monotonic()
        if isinstance(answer, Polled | Lost):
            if isinstance(answer, Polled):
                self._state.take(answer)
            else:
                self._state.lose(answer.error)
            # A daemon that answers slowly is not asked all the time.
            self._poll_at = max(self._poll_began + self._state.interval_s, now + (now - self._poll_began) * _REST)
        elif isinstance(answer, Explanation):
            self._state.explanation = answer
        elif isinstance(answer, Acted):
            if answer.error is None:
                self._state.succeed(answer.verb, now)
                self._poll_now()
            else:
                self._state.refuse(answer.verb, answer.error, now)

    def _press(self, pressed: list[str]) -> None:
        for key in pressed:
            self._see_to(press(self._state, key, time.monotonic()))

    def _see_to(self, outcome: Outcome) -> None:
        if isinstance(outcome, Verb):
            self._worker.act(outcome)
        elif outcome is Wish.QUIT:
            self._ended = True
        elif outcome is Wish.POLL:
            self._poll_now()
        elif outcome is Wish.REDRAW:
            self._console.clear()

    def _ask(self) -> None:
        """Questions whose time has come."""
        now = time.monotonic()
        rid = self._state.to_explain
        due = now >= self._poll_at and not self._state.paused
        if due and not self._worker.polling:
            self._poll_now()
        known = self._state.explanation
        if rid is not None and not self._worker.explaining and (due or known is None or known.rid != rid):
            self._worker.explain(rid)

    def _poll_now(self) -> None:
        if not self._worker.polling:
            self._poll_began = time.monotonic()
            self._worker.poll()

    def _draw(self, live: Live) -> None:
        try:
            width, height = os.get_terminal_size(self._console.file.fileno())
        except OSError:
            width, height = 0, 0
        self._console.size = (width or 80, height or 24)  # type: ignore[assignment]
        size = self._console.size
        live.update(Group(*frame(self._state, size.width, size.height, self._look, time.monotonic())), refresh=True)

    @contextmanager
    def _watch_signals(self) -> Iterator[None]:
        def note(number: int, _: FrameType | None) -> None:
            self._signals.add(number)

        before = {number: signal.signal(number, note) for number in _WATCHED}
        fd = signal.set_wakeup_fd(self._pipe.writer, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in before.items():
                signal.signal(number, handler)


def print_once(client: TopClient, state: State, console: Console, look: Look) -> None:
    """One frame as text, with every row. Asks twice, for the rates."""
    state.take(ask(client))
    time.sleep(state.interval_s)
    state.take(ask(client))
    for line in frame(state, console.width, _MOST_ROWS, look, time.monotonic()):
        line.rstrip()
        console.print(line, soft_wrap=True)


def _interval(value: float) -> float:
    if math.isnan(value):
        raise typer.BadParameter("nan is no number of seconds")
    return value


@app.command(epilog=EXIT_HELP)
@command
def top(
    context: typer.Context,
    interval: Annotated[
        float,
        typer.Option(
            "--interval",
            "-i",
            min=0.1,
            max=60,
            callback=_interval,
            help="Seconds from one look to the next.",
            metavar="SECONDS",
        ),
    ] = 1.0,
    once: Annotated[
        bool,
        typer.Option("--once", help="Print one frame and leave, as without a terminal; rates are over the interval."),
    ] = False,
    sort: Annotated[str, typer.Option("--sort", help="Sort by this column.", metavar="COLUMN")] = columns.DEFAULT_SORT,
    filter_: Annotated[str, typer.Option("--filter", help="Only rows with these words.", metavar="TEXT")] = "",
    run_dir: RunDir = None,
) -> None:
    """Watch sequences, tenants and memory live, and steer them with keys: h shows which."""
    names = columns.sequences({}).columns
    if sort.lower() not in names:
        raise typer.BadParameter(f"{sort!r} is none of: {', '.join(names)}", param_hint="'--sort'")
    if context.obj["as_json"]:
        raise typer.BadParameter("top has no JSON; use --json with ps, status or tenant list")
    interactive = not once and sys.stdin.isatty() and sys.stdout.isatty()
    console = Console(highlight=False, force_terminal=interactive or None, force_interactive=interactive or None)
    interactive = interactive and not console.is_dumb_terminal
    look = look_for(console, os.environ.get("TERM", ""), live=interactive)
    state = State(interval, look.glyphs, sort.lower())
    state.sequences.narrow(filter_)
    client = Client(run_dir or context.obj["run_dir"], timeout_s=_CALL_TIMEOUT_S, reconnect_s=0)  # the view tells
    if not interactive:
        with closing(client):
            print_once(client, state, console, look)
        return
    raise typer.Exit(Loop(client, state, console, look, sys.stdin.fileno()).run())
