"""Calls off the drawing thread: a verb never waits for a poll, and leaving never waits for a daemon that does not answer."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator

import pytest
from top_world import FakeClient, busy_rows, explained

from llmos.ctl.top.state import Explanation, Polled, Verb
from llmos.ctl.top.worker import Acted, Answer, Lost, WakePipe, Worker
from llmos.errors import DaemonNotRunning, LlmosError, NotFound, Unavailable
from llmos.protocol import messages as m

DEADLINE_S = 30.0


class HangingClient(FakeClient):
    """Its questions wait until it is closed; then they fail, as the SDK's do."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()
        self.left = threading.Event()

    def status(self) -> m.StatusReply:
        self.asked.set()
        assert self.left.wait(DEADLINE_S)
        raise Unavailable("the client was closed")

    def close(self) -> None:
        super().close()
        self.left.set()


class Bench:
    """A worker and the pipe it wakes."""

    def __init__(self, client: FakeClient) -> None:
        self.client = client
        self.pipe = WakePipe()
        self.worker = Worker(client, self.pipe.wake)

    def answer(self) -> Answer:
        """The next answer, once the pipe says that there is one."""
        assert select.select([self.pipe.reader], [], [], DEADLINE_S)[0]
        self.pipe.drain()
        (found,) = self.worker.answers()
        return found


@pytest.fixture
def bench() -> Iterator[Callable[[FakeClient], Bench]]:
    made: list[Bench] = []

    def make(client: FakeClient) -> Bench:
        made.append(Bench(client))
        return made[-1]

    yield make
    for each in made:
        each.worker.close()
        each.pipe.close()


def test_a_poll_asks_for_everything(bench: Callable[[FakeClient], Bench]) -> None:
    on = bench(FakeClient())
    on.worker.poll()
    assert on.worker.polling
    answer = on.answer()
    assert isinstance(answer, Polled)
    assert (answer.rows, answer.status, answer.tenants) == (busy_rows(), on.client.state, on.client.tenant_rows)
    assert not on.worker.polling


def test_a_failed_poll_is_an_answer(bench: Callable[[FakeClient], Bench]) -> None:
    on = bench(FakeClient())
    on.client.error = DaemonNotRunning("nothing there")
    on.worker.poll()
    assert on.answer() == Lost(on.client.error)
    assert not on.worker.polling


def test_explain(bench: Callable[[FakeClient], Bench]) -> None:
    on = bench(FakeClient())
    on.worker.explain(1003)
    assert on.worker.explaining
    assert on.answer() == Explanation(1003, explained(1003))
    assert not on.worker.explaining
    on.worker.explain(7)
    assert on.answer() == Explanation(7, None, "no sequence 7")


@pytest.mark.parametrize(
    "verb", [Verb("kill", 1003), Verb("nice", 1003, 5), Verb("suspend", 1003), Verb("resume", 1003)]
)
def test_verbs(bench: Callable[[FakeClient], Bench], verb: Verb) -> None:
    on = bench(FakeClient())
    on.worker.act(verb)
    assert on.answer() == Acted(verb)
    assert on.client.calls == [(verb.name, 1003, 5) if verb.name == "nice" else (verb.name, 1003)]


def test_a_refused_verb_is_an_answer(bench: Callable[[FakeClient], Bench]) -> None:
    on = bench(FakeClient())
    on.worker.act(Verb("kill", 7))
    answer = on.answer()
    assert isinstance(answer, Acted)
    assert isinstance(answer.error, NotFound)


def test_a_verb_does_not_wait_for_a_poll_that_hangs(bench: Callable[[FakeClient], Bench]) -> None:
    on = bench(HangingClient())
    on.worker.poll()
    on.worker.act(Verb("kill", 1003))
    assert on.answer() == Acted(Verb("kill", 1003))
    assert on.worker.polling


def test_leaving_does_not_wait_for_a_poll_that_hangs(bench: Callable[[FakeClient], Bench]) -> None:
    client = HangingClient()
    on = bench(client)
    on.worker.poll()
    assert client.asked.wait(DEADLINE_S)
    on.worker.explain(1003)
    on.worker.close()
    assert on.client.closed
    (answer,) = on.worker.answers()
    assert isinstance(answer, Lost)
    assert isinstance(answer.error, LlmosError)


def test_our_own_mistakes_are_not_hidden(bench: Callable[[FakeClient], Bench]) -> None:
    on = bench(FakeClient())
    on.client.tenants = None  # type: ignore[assignment, method-assign]
    on.worker.poll()
    with pytest.raises(TypeError):
        on.answer()


def test_the_pipe_takes_any_number_of_wakes() -> None:
    pipe = WakePipe()
    for _ in range(70_000):
        pipe.wake()
    pipe.drain()
    assert select.select([pipe.reader], [], [], 0) == ([], [], [])
    pipe.close()
