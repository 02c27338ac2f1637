"""`run`, `chat`, `generate` and `attach`: an answer that appears as it is made, then one line about its speed.

The answer goes to stdout and everything else to stderr, so that `llmosctl run ... > file` gives a clean file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from llmos.client.stream import TokenStream
from llmos.client.sync import Client
from llmos.client.types import Chunk, Completion
from llmos.ctl.errors import complain
from llmos.ctl.render import printable, to_plain, write_json
from llmos.errors import DaemonNotRunning, InvalidRequest, LlmosError

Messages = list[dict[str, str]]


@dataclass
class Speed:
    """Clock of one answer, all times by the client."""

    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0
    num_tokens: int = 0
    first_batch: int = 0

    def count(self, chunk: Chunk) -> None:
        if not chunk.token_ids:
            return
        self.last = time.monotonic()
        self.num_tokens += len(chunk.token_ids)
        if self.first is None:
            self.first = self.last
            self.first_batch = len(chunk.token_ids)

    @property
    def first_token_ms(self) -> float | None:
        return None if self.first is None else round((self.first - self.started) * 1000, 1)

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens after the first ones; None if there were none."""
        if self.first is None or self.last <= self.first:
            return None
        return round((self.num_tokens - self.first_batch) / (self.last - self.first), 1)

    def line(self) -> str:
        parts = [f"{self.num_tokens} tokens"]
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:g} tokens/s")
        if self.first_token_ms is not None:
            parts.append(f"first token after {self.first_token_ms:.0f} ms")
        return ", ".join(parts)


@dataclass(frozen=True)
class Question:
    """What `run` was asked. A model without a chat template gets it as plain text, as `raw` does."""

    text: str
    raw: bool
    system: str | None

    def put(self, ask: Callable[[Any], None]) -> None:
        if not self.text:
            raise InvalidRequest("prompt is empty", field="prompt")
        if self.raw:
            ask(self.text)
            return
        messages = [{"role": "system", "content": self.system}] if self.system else []
        try:
            ask([*messages, {"role": "user", "content": self.text}])
        except InvalidRequest as error:
            if error.field != "messages" or self.system:  # that field means: there is no chat template
                raise
            ask(self.text)


def form(as_json: bool, stream: bool) -> str:
    """How answers are shown: text, json (one value) or jsonl (one line for each piece)."""
    return ("jsonl" if stream else "json") if as_json else "text"


def run_once(client: Client, question: Question, options: dict[str, Any], form: str) -> None:
    """Answer one prompt."""

    def ask(prompt: Any) -> None:
        show(lambda: client.generate(prompt, stream=True, **options), form)

    question.put(ask)


def run_samples(client: Client, question: Question, count: int, options: dict[str, Any], form: str) -> None:
    """Answer one prompt several times at once."""

    def ask(prompt: Any) -> None:
        started = time.monotonic()
        answers = client.samples(prompt, count, **options)
        if form != "text":
            write_json(answers)
            return
        for place, completion in enumerate(answers, 1):
            ends_line = completion.text.endswith("\n")
            sys.stdout.write(f"[{place}]\n{_clean()(completion.text)}{'' if ends_line else chr(10)}")
        num_tokens = sum(len(completion.token_ids) for completion in answers)
        _aside(f"{len(answers)} answers, {num_tokens} tokens, {time.monotonic() - started:.1f} s")

    question.put(ask)


def show(begin: Callable[[], TokenStream], form: str) -> Completion:
    """Stream one answer to the terminal; returns it."""
    speed = Speed()
    with begin() as stream:
        if form == "text":
            _show(stream, speed)
            _aside(_summary(stream.completion, speed))
        else:
            for chunk in stream:
                speed.count(chunk)
                if form == "jsonl":
                    write_json({"type": "chunk"} | to_plain(chunk), lines=True)
            timing = {"first_token_ms": speed.first_token_ms, "tokens_per_s": speed.tokens_per_s}
            kind = {"type": "finished"} if form == "jsonl" else {}
            write_json(kind | to_plain(stream.completion) | timing, lines=form == "jsonl")
        return stream.completion


def _show(stream: TokenStream, speed: Speed) -> None:
    """Text as it comes, then a newline; also when it breaks off, so that what follows starts on its own line."""
    clean = _clean()
    ends_line = True
    try:
        for chunk in stream:
            speed.count(chunk)
            if chunk.text:
                sys.stdout.write(clean(chunk.text))
                sys.stdout.flush()
                ends_line = chunk.text.endswith("\n")
    finally:
        if not ends_line:
            sys.stdout.write("\n")
            sys.stdout.flush()


def _clean() -> Callable[[str], str]:
    """A terminal must not be steered by a model; a file gets what it said."""
    return printable if sys.stdout.isatty() else str


def _aside(text: str) -> None:
    """A line beside the answer."""
    Console(stderr=True, highlight=False).print(Text(text, style="dim"))


def _summary(completion: Completion, speed: Speed) -> str:
    ending = "" if completion.finish_reason == "stop" else f" (ended by: {completion.finish_reason})"
    return f"{speed.line()}{ending}"


class Chat:
    """A conversation on the terminal. Ctrl-C stops an answer, Ctrl-D leaves, /reset forgets what was said."""

    def __init__(self, client: Client, system: str | None, options: dict[str, Any], form: str) -> None:
        self._client = client
        self._options = options
        self._form = form
        self._start: Messages = [{"role": "system", "content": system}] if system else []
        self.messages: Messages = list(self._start)

    def loop(self) -> None:
        interactive = sys.stdin.isatty()
        if interactive:
            import readline  # noqa: F401  # gives input() line editing and history

            sys.stderr.write("Ctrl-C stops an answer, Ctrl-D leaves, /reset starts anew.\n")
        while True:
            try:
                line = input("> " if interactive else "")
            except EOFError:
                if interactive:
                    sys.stderr.write("\n")
                return
            except KeyboardInterrupt:
                sys.stderr.write("\n")
                continue
            if line.strip() == "/reset":
                self.messages = list(self._start)
            elif line.strip():
                self.turn(line)

    def turn(self, line: str) -> None:
        """One question and its answer; a refusal is shown and the question taken back."""
        self.messages.append({"role": "user", "content": line})
        try:
            completion = show(lambda: self._client.generate(self.messages, stream=True, **self._options), self._form)
        except DaemonNotRunning:
            raise
        except LlmosError as error:
            self.messages.pop()
            complain(error)
        except KeyboardInterrupt:
            self.messages.pop()
            sys.stderr.write("stopped\n")
        else:
            self.messages.append({"role": "assistant", "content": completion.text})
