"""Calls of the client, off the thread that reads keys and draws: one thread asks, another one acts, so that a verb never waits for a poll.

The pipe wakes the loop when something came back.
"""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, Protocol

from llmos.client.types import Explained, SeqRow, StatusReply, TenantRow
from llmos.ctl.top.look import clean
from llmos.ctl.top.state import Explanation, Polled, Verb
from llmos.errors import LlmosError

P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Lost:
    """A poll failed."""

    error: LlmosError


@dataclass(frozen=True, slots=True)
class Acted:
    """A verb was done, or refused."""

    verb: Verb
    error: LlmosError | None = None


Answer = Polled | Lost | Explanation | Acted


class TopClient(Protocol):
    """What the view needs of the SDK's blocking client. Any thread may call it; `close` makes calls that wait fail."""

    def status(self) -> StatusReply: ...
    def ps(self) -> tuple[SeqRow, ...]: ...
    def tenants(self) -> tuple[TenantRow, ...]: ...
    def explain(self, rid: int) -> Explained: ...
    def kill(self, rid: int) -> object: ...
    def nice(self, rid: int, value: int) -> object: ...
    def suspend(self, rid: int) -> object: ...
    def resume(self, rid: int) -> object: ...
    def close(self) -> None: ...


class WakePipe:
    """Ends a `select` from another thread or from a signal."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
            os.write(self.writer, b"\0")

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self.reader, 4096):
                pass

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class Worker:
    """`polling`, `explaining`: such a question is on its way. What comes back is collected with `answers`."""

    def __init__(self, client: TopClient, wake: Callable[[], None]) -> None:
        self.polling = False
        self.explaining = False
        self._client = client
        self._wake = wake
        self._done: queue.SimpleQueue[Future[Answer]] = queue.SimpleQueue()
        self._asks = ThreadPoolExecutor(1, "top-asks")
        self._acts = ThreadPoolExecutor(1, "top-acts")

    def poll(self) -> None:
        self.polling = True
        self._submit(self._asks, self._poll)

    def explain(self, rid: int) -> None:
        self.explaining = True
        self._submit(self._asks, self._explain, rid)

    def act(self, verb: Verb) -> None:
        self._submit(self._acts, self._act, verb)

    def answers(self) -> list[Answer]:
        """Everything that came back; an exception that is no LlmosError comes out here."""
        found: list[Answer] = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._done.get_nowait().result())
        self.polling = self.polling and not any(isinstance(answer, Polled | Lost) for answer in found)
        self.explaining = self.explaining and not any(isinstance(answer, Explanation) for answer in found)
        return found

    def close(self) -> None:
        """Leave, without waiting for a daemon that does not answer."""
        for pool in (self._asks, self._acts):
            pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()  # calls that wait fail now
        for pool in (self._asks, self._acts):
            pool.shutdown()

    def _submit(self, pool: ThreadPoolExecutor, call: Callable[P, Answer], *args: P.args, **kwargs: P.kwargs) -> None:
        pool.submit(call, *args, **kwargs).add_done_callback(self._finished)

    def _finished(self, future: Future[Answer]) -> None:
        if not future.cancelled():
            self._done.put(future)
            self._wake()

    def _poll(self) -> Answer:
        try:
            return ask(self._client)
        except LlmosError as error:
            return Lost(error)

    def _explain(self, rid: int) -> Answer:
        try:
            return Explanation(rid, self._client.explain(rid))
        except LlmosError as error:
            return Explanation(rid, refusal=clean(error.message))

    def _act(self, verb: Verb) -> Answer:
        try:
            if verb.name == "nice":
                self._client.nice(verb.rid, verb.value)
            else:
                {"kill": self._client.kill, "suspend": self._client.suspend, "resume": self._client.resume}[verb.name](
                    verb.rid
                )
        except LlmosError as error:
            return Acted(verb, error)
        return Acted(verb)


def ask(client: TopClient) -> Polled:
    """One round of questions."""
    status = client.status()
    at = time.monotonic()
    return Polled(at, status, client.ps(), client.tenants())
