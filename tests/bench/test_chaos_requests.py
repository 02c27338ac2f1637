"""What a client of the chaos run writes down: refusals are asked again, and nothing after acceptance is."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from chaos.history import HistoryWriter
from chaos.requests import GaveUp, Reading, Requests

from llmos.client.types import Chunk, Completion, Usage
from llmos.errors import NotFound, SequenceFailed, Unavailable

USAGE = Usage(1, 0, 2, 0, 0.0, 0.0)
WHOLE = [Chunk("a", (1,), 0, rid=7), Chunk("b", (2,), 1, rid=7)]


class FakeStream:
    """Gives these chunks, then ends well or by an error. `rid` as the SDK knows it at the end."""

    def __init__(self, items, rid: int | None = None) -> None:
        self._items = iter(items)
        self.rid = rid
        self.completion = Completion(7, "m", "ab", (1, 2), "length", None, USAGE)
        self.is_closed = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        for item in self._items:
            if item == "hang":
                await asyncio.Event().wait()
            if isinstance(item, Exception):
                raise item
            return item
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.is_closed = True


class Desk:
    def __init__(self, folder, patience_s: float = 5.0) -> None:
        self._folder = folder
        self._history = HistoryWriter(folder, 0)
        self.requests = Requests(self._history, patience_s)
        self.reading = Reading()

    def read(self, *attempts: FakeStream, verb: str = "generate", **options) -> list[str]:
        """The events that reading wrote; each attempt is asked once."""
        left = iter(attempts)

        async def read() -> None:
            await self.requests.read(self.reading, verb, lambda: next(left), **options)

        with contextlib.suppress(GaveUp):
            asyncio.run(read())
        assert next(left, None) is None, "not all attempts were needed"
        return self.events()

    def events(self) -> list[str]:
        self._history.close()
        lines = (self._folder / "client-000.00000.jsonl").read_text().splitlines()
        return [json.loads(line)["event"] for line in lines]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def test_a_stream_to_its_end(desk):
    assert desk.read(FakeStream(WHOLE)) == ["ask", "accepted", "tokens", "tokens", "end"]
    assert (desk.reading.rid, desk.reading.tokens, desk.reading.whole, desk.reading.over) == (7, 2, True, True)


def test_a_refusal_is_asked_again(desk):
    refused = [FakeStream([Unavailable("later")]) for _ in range(2)]
    assert desk.read(*refused, FakeStream(WHOLE))[:4] == ["ask", "refused", "refused", "accepted"]


def test_after_acceptance_nothing_is_asked_again(desk):
    assert desk.read(FakeStream([Unavailable("lost")], rid=7)) == ["ask", "accepted", "error"]
    assert desk.reading.over
    assert not desk.reading.whole


def test_an_error_after_tokens_ends_the_request(desk):
    assert desk.read(FakeStream([WHOLE[0], Unavailable("lost")])) == ["ask", "accepted", "tokens", "error"]


def test_an_error_that_is_no_refusal_ends_the_request(desk):
    assert desk.read(FakeStream([SequenceFailed("nan")])) == ["ask", "error"]


def test_a_reader_of_a_known_sequence_is_accepted_by_tokens_only(desk):
    again = FakeStream(WHOLE, rid=7)
    assert desk.read(FakeStream([Unavailable("later")], rid=7), again, verb="attach")[:3] == [
        "ask",
        "refused",
        "accepted",
    ]


def test_it_looks_how_to_ask_again(desk):
    looked = []

    async def again():
        looked.append(True)
        if len(looked) == 1:
            raise Unavailable("not yet")
        return lambda: FakeStream(WHOLE)

    events = desk.read(FakeStream([Unavailable("later")]), verb="continue", again=again)
    assert events == ["ask", "refused", "refused", "accepted", "tokens", "tokens", "end"]


def test_leaving_after_some_tokens(desk):
    stream = FakeStream(WHOLE)
    assert desk.read(stream, upto=1) == ["ask", "accepted", "tokens", "left"]
    assert stream.is_closed
    assert not desk.reading.whole


def test_patience_ends_when_nothing_comes(tmp_path):
    desk = Desk(tmp_path, patience_s=0.05)
    assert desk.read(FakeStream([WHOLE[0], "hang"])) == ["ask", "accepted", "tokens", "gave_up"]


def test_patience_ends_when_all_is_refused(tmp_path):
    desk = Desk(tmp_path, patience_s=0.0)
    assert desk.read(FakeStream([Unavailable("later")])) == ["ask", "refused", "gave_up"]


def test_waiting_for_a_stream_to_get_somewhere():
    async def wait() -> tuple[bool, bool]:
        reading = Reading()
        reaches = asyncio.gather(reading.reaches(2), reading.reaches(3))
        await asyncio.sleep(0)
        reading.tokens = 2
        reading.move()
        await asyncio.sleep(0)
        reading.over = True
        reading.move()
        first, second = await reaches
        return first, second

    assert asyncio.run(wait()) == (True, False)


def test_a_question_that_was_done_after_all_is_not_repeated(desk):
    async def ask() -> int:
        calls = iter([Unavailable("lost"), AssertionError("asked twice")])

        async def call() -> int:
            raise next(calls)

        async def look() -> int:
            return 9

        return await desk.requests.ask("append", call, lambda now: {"num_tokens": now}, look=look)

    assert asyncio.run(ask()) == 9
    assert desk.events() == ["ask", "refused", "reply"]


def test_a_question_about_an_unknown_sequence_is_an_error(desk):
    async def ask() -> None:
        async def call() -> int:
            raise NotFound("no sequence 7")

        with pytest.raises(GaveUp):
            await desk.requests.ask("stat", call, lambda _: {})

    asyncio.run(ask())
    assert desk.events() == ["ask", "error"]
