"""After an interruption: what is asked for again, what may be gone by then, what is ended, and how long anybody waits."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest
from crash_world import CrashWorld
from gateway_world import until, usage, wait_until

from llmos import AsyncClient, Client
from llmos.codes import FinishReason
from llmos.errors import InvalidRequest, RequestTimeout, SequenceFailed, Unavailable, WrongState
from llmos.protocol import messages as m


@pytest.fixture
def world() -> Iterator[CrashWorld]:
    with CrashWorld() as running:
        yield running


# ------------------------------------------------------------ what is asked for once


def test_one_request_is_one_sequence_however_often_it_is_asked_for(world: CrashWorld) -> None:
    rids = set(world.kernel.ended)
    with Client(world.path) as client:
        world.crash_after(6, 6, 6)
        done = client.generate("abc", max_tokens=4)
        assert done.text == "abca"
    asked = [message for message in world.kernel.seen if isinstance(message, m.SeqSubmit)]
    assert {message.client_request_id for message in asked} == {asked[0].client_request_id}
    assert set(world.kernel.ended) - rids == {done.rid}


def test_the_callers_own_id_is_kept(world: CrashWorld) -> None:
    with Client(world.path) as client:
        first = client.generate("abc", max_tokens=4, client_request_id="mine")
        assert client.generate("abc", max_tokens=4, client_request_id="mine") == first
        with pytest.raises(InvalidRequest):
            client.generate("abc", max_tokens=4, client_request_id="x" * 65)
        seq = client.spawn("abc", client_request_id="yours")
        assert client.spawn("abc", client_request_id="yours").rid == seq.rid
        assert client.spawn("abc").rid != seq.rid


def test_a_fork_whose_fate_is_unknown_says_so(world: CrashWorld) -> None:
    with Client(world.path) as client:
        seq = client.spawn("abc")
        client.ps()
        world.crash_after(2)  # it has the Fork, and dies of giving it to the microkernel
        with pytest.raises(Unavailable, match=f"it is not known whether sequence {seq.rid} was forked"):
            seq.fork(2)
        assert seq.stat().children == 0
        world.crash_after(3)  # of the answer
        with pytest.raises(Unavailable, match="it is not known"):
            seq.fork(2)
        assert seq.stat().children == 2
        world.crash_after(3)
        with pytest.raises(Unavailable, match="it is not known whether sequences were killed"):
            client.kill(model="echo")
        assert client.ps() == ()


def test_a_restart_of_the_gateway_itself_needs_no_answer(world: CrashWorld) -> None:
    with Client(world.path) as client:
        client.ps()
        world.crash_after(1)
        client.restart_service("gateway")
        assert client.ps() == ()
    assert world.deaths == 1


def test_an_append_among_foreign_ones_is_not_guessed(world: CrashWorld) -> None:
    with Client(world.path) as client:
        seq = client.spawn("abc")
        world.kernel.sequences[seq.rid].tokens += b"xy"  # of somebody else
        world.crash_after(1)
        with pytest.raises(Unavailable, match="somebody else writes to it"):
            seq.append([65])
        assert seq.append([65]) == 6, "the length was asked for again"


# ------------------------------------------------------------ what may be gone


def interrupted(world: CrashWorld, client: Client, **options: Any) -> Any:
    """A stream that was accepted, lies still, and loses its gateway for a moment at the next message."""
    world.kernel.paused = True
    stream = client.generate("abc", stream=True, **options)
    wait_until(lambda: stream.rid is not None)
    world.start_after_s = 0.1
    return stream


def test_a_sequence_that_the_daemon_lost(world: CrashWorld) -> None:
    with Client(world.path) as client:
        stream = interrupted(world, client)
        del world.kernel.sequences[stream.rid]
        world.crash_after(1)
        client.ps()
        with pytest.raises(Unavailable, match=f"llmosd lost sequence {stream.rid}"):
            list(stream)


def test_a_sequence_that_was_cancelled_meanwhile(world: CrashWorld) -> None:
    with Client(world.path) as client:
        stream = interrupted(world, client)
        seq = world.kernel.sequences[stream.rid]
        world.thread.do(setattr, seq, "reader", None)
        world.thread.do(world.kernel._tell_end, seq, FinishReason.CANCELLED)
        world.crash_after(1)
        client.ps()
        with pytest.raises(Unavailable, match=f"sequence {stream.rid} was cancelled while"):
            list(stream)


def test_a_sequence_that_failed_meanwhile(world: CrashWorld) -> None:
    with Client(world.path) as client:
        stream = interrupted(world, client)
        seq = world.kernel.sequences[stream.rid]
        world.thread.do(setattr, seq, "reader", None)
        world.thread.do(world.kernel._tell_end, seq, FinishReason.NUMERICAL_ERROR)
        world.crash_after(1)
        client.ps()
        with pytest.raises(SequenceFailed, match="numerical_error after 0 tokens"):
            list(stream)


@pytest.mark.parametrize("earlier", ["nothing", "an output", "an empty output"])
def test_a_turn_that_did_not_begin_is_begun(world: CrashWorld, earlier: str) -> None:
    with Client(world.path) as client:
        seq = client.spawn("abc")
        echoed = world.kernel.sequences[seq.rid]
        if earlier == "an output":
            seq.generate(max_tokens=2)
        elif earlier == "an empty output":
            world.kernel.paused = True
            with seq.generate(stream=True) as stream:
                wait_until(lambda: echoed.generating)
            assert stream.rid == seq.rid
            wait_until(lambda: not echoed.generating)
            world.kernel.paused = False
            assert echoed.end == m.SeqEnd(seq.rid, FinishReason.CANCELLED, usage(3, 0))
            assert seq.stat().num_tokens == 3
        length = len(echoed.tokens)
        world.crash_after(2)  # it has the Continue, and does not pass it on
        assert len(seq.generate(max_tokens=4).token_ids) == 4
        assert len(echoed.tokens) == length + 4
    assert world.deaths == 1


def test_a_turn_that_is_over_before_anybody_can_ask_is_read(world: CrashWorld) -> None:
    world.start_after_s = 0.1
    with Client(world.path) as client:
        seq = client.spawn("abc")
        world.crash_after(3)  # of the microkernel's answer
        assert seq.generate(max_tokens=4).text == "abca"
        assert len(world.kernel.sequences[seq.rid].tokens) == 7
    assert sum(isinstance(message, m.SeqContinue) for message in world.kernel.seen) == 1


# ------------------------------------------------------------ leaving


@pytest.mark.parametrize("how", ["close", "collector"])
@pytest.mark.parametrize("kind", ["generate", "continue"])
def test_what_is_left_during_an_outage_is_ended_after_it(world: CrashWorld, kind: str, how: str) -> None:
    world.kernel.window = 6  # it can not end by itself
    with Client(world.path) as client:
        seq = client.spawn("abc")
        stream = (client if kind == "generate" else seq).generate(*(["abc"] if kind == "generate" else []), stream=True)
        next(stream)
        echoed = world.kernel.sequences[stream.rid]
        world.start_after_s = 0.2
        world.crash_after(1)
        with pytest.raises(RequestTimeout):
            client.sequence(seq).wait(timeout_s=0.1)
        assert world.deaths == 1
        if how == "close":
            stream.close()
        del stream
        gc.collect()
        assert echoed.generating
        wait_until(lambda: not echoed.generating)
        assert echoed.end.reason == FinishReason.CANCELLED
        assert seq.stat().reason == 0


def test_a_cancel_that_is_lost_is_sent_again(world: CrashWorld) -> None:
    world.kernel.window = 6
    with Client(world.path) as client:
        seq = client.spawn("abc")
        stream = seq.generate(stream=True)
        next(stream)
        wait_until(lambda: world.kernel.sequences[seq.rid].sent == 6)
        world.crash_after(1)
        stream.close()
        wait_until(lambda: not world.kernel.sequences[seq.rid].generating)
    assert world.deaths == 1


def test_what_was_attached_and_left_is_not_attached_again(world: CrashWorld) -> None:
    world.kernel.window = 6
    with Client(world.path) as client:
        seq = client.spawn("abc")
        first = seq.generate(stream=True, max_tokens=9)
        next(first)
        with seq.attach() as stream:
            next(stream)
        attached = sum(isinstance(message, m.SeqAttach) for message in world.kernel.seen)
        world.crash_after(1)
        client.ps()
        wait_until(lambda: world.deaths == 1)
        assert client.ps()
        assert sum(isinstance(message, m.SeqAttach) for message in world.kernel.seen) == attached
        with pytest.raises(WrongState, match="another reader"):
            list(first)


def test_a_client_that_closes_ends_what_it_generates(world: CrashWorld) -> None:
    world.kernel.paused = True
    client = Client(world.path)
    streams = [client.generate("abc", stream=True, client_request_id=name) for name in (None, "mine")]
    seq = client.spawn("abc")
    turn = seq.generate(stream=True)
    wait_until(lambda: len(world.kernel.sequences) == 3 and world.kernel.sequences[seq.rid].generating)
    wait_until(lambda: all(stream.rid for stream in (*streams, turn)))
    client.close()
    for stream in (*streams, turn):
        with pytest.raises(Unavailable, match="was closed"):
            list(stream)
    wait_until(lambda: list(world.kernel.sequences) == [seq.rid])
    wait_until(lambda: len(world.life.gateway.router) == 0)
    assert world.kernel.sequences[seq.rid].generating, "an open sequence goes on alone"


def test_a_client_that_closes_during_an_outage_does_not_wait(world: CrashWorld) -> None:
    client = Client(world.path)
    world.kernel.paused = True
    stream = client.generate("abc", stream=True)
    wait_until(lambda: stream.rid)
    world.start_after_s = 1.0
    world.crash_after(1)
    with pytest.raises(RequestTimeout):
        client.sequence(stream.rid).wait(timeout_s=0.05)
    started = time.monotonic()
    client.close()
    with pytest.raises(Unavailable, match="client was closed"):
        list(stream)
    assert time.monotonic() - started < 0.5


# ------------------------------------------------------------ time


def test_calls_made_during_an_outage_wait_within_their_own_time(world: CrashWorld) -> None:
    with Client(world.path) as client:
        client.ps()
        world.start_after_s = 0.3
        world.crash_after(1)
        with pytest.raises(RequestTimeout, match=r"within 0\.1 s"):
            client.generate("abc", max_tokens=3, timeout_s=0.1)
        assert client.generate("abc", max_tokens=3).text == "abc"
        assert world.deaths == 1


def test_a_gateway_that_does_not_come_back(world: CrashWorld) -> None:
    world.kernel.paused = True
    with Client(world.path, reconnect_s=0.3) as client:
        stream = client.generate("abc", stream=True)
        wait_until(lambda: stream.rid)
        world.start_after_s = 2.0
        world.crash_after(1)
        started = time.monotonic()
        for ask in (client.ps, lambda: list(stream)):
            with pytest.raises(Unavailable, match=r"llmosd runs on .*, but its gateway does not"):
                ask()
        assert 0.25 < time.monotonic() - started < 1.5
        world.run_dir.lock.unlink()
        with pytest.raises(Unavailable, match="llmosd is not running"):
            client.ps()


def test_a_request_that_every_gateway_dies_of_ends_some_day(world: CrashWorld) -> None:
    with Client(world.path, reconnect_s=0.5) as client:
        world.crash_after(*[5] * 1000)
        with pytest.raises(Unavailable, match="connection to the gateway was lost"):
            client.generate("abc")
        world.crash_after()
    assert world.deaths >= 3


def test_deadlines_count_from_the_first_time(world: CrashWorld) -> None:
    world.start_after_s = 0.2
    with Client(world.path) as client:
        world.crash_after(3)
        client.generate("abc", max_tokens=3, deadline_s=60)
        seq = client.spawn("abc")
        world.crash_after(2)
        seq.generate(max_tokens=3, deadline_s=60)
        world.kernel.paused = True
        stream = seq.generate(max_tokens=100, stream=True)
        wait_until(lambda: world.kernel.sequences[seq.rid].generating)
        world.crash_after(1)
        seq.deadline(60)
        stream.close()
    asked = [*world.kernel.seen, *world.kernel.controls]
    for kind in (m.SeqSubmit, m.SeqContinue, m.Deadline):
        first = next(message.deadline_ms for message in asked if isinstance(message, kind))
        assert 59_000 < first < 60_000 - 200, kind


def test_outages_are_told(world: CrashWorld) -> None:
    told: list[str | None] = []
    with Client(world.path, on_outage=told.append) as client:
        client.ps()
        assert told == []
        world.start_after_s = 0.1
        world.crash_after(1)
        client.ps()
        assert told == ["the gateway is being restarted", None]
        world.run_dir.lock.unlink()
        world.crash_after(1)
        client.ps()
        assert told[2:] == ["the connection to llmosd was lost", None]


def test_a_gateway_that_stops_in_good_order_is_no_end(world: CrashWorld) -> None:
    """Its last words are errors; what it was asked for is asked of the next one."""

    async def main() -> None:
        async with AsyncClient(world.path) as client:
            await client.ps()
            seq = await client.spawn("abc")
            world.kernel.paused = world.kernel.silent = True
            asked = [asyncio.create_task(call) for call in (seq.generate(max_tokens=2), seq.wait(), seq.stat())]
            await until(lambda: any(isinstance(message, m.SeqContinue) for message in world.kernel.seen))
            await until(lambda: len(world.kernel.controls) >= 3)
            stopped = world.life
            await asyncio.to_thread(stopped.thread.call, stopped.gateway.close())
            world.kernel.paused = world.kernel.silent = False
            stopped.dead = True
            world.died(stopped)
            assert (await asked[0]).text == "ab"
            await seq.close()
            assert (await asked[1]).reason == "closed"
            assert (await asked[2]).row.rid == seq.rid

    asyncio.run(main())
