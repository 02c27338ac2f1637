"""Open sequences and the verbs on them over real sockets, between a byte tokenizer and an echoing microkernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gateway_peer import Peer, go_on
from gateway_world import GatewayWorld, wait_until

from llmos.codes import ErrorCode, FinishReason, PageFate, SeqState
from llmos.protocol import messages as m
from llmos.protocol.codec import pack_i32
from llmos.protocol.params import SamplingParams


@pytest.fixture
def world() -> Iterator[GatewayWorld]:
    with GatewayWorld() as running:
        yield running


def test_a_conversation(world: GatewayWorld) -> None:
    with Peer(world) as client:
        spawned = client.ask(m.Spawn(1, None, text="ab"), m.Spawned)
        assert (spawned.req, spawned.model, spawned.num_tokens) == (1, "echo", 2)
        rid = spawned.rid
        assert client.ask(m.Append(2, rid, "echo", "cd", None), m.Appended) == m.Appended(2, rid, 4)
        assert client.ask(go_on(3, rid, max_tokens=6), m.Accepted) == m.Accepted(3, rid, "echo", 4)
        text, ids, finished = client.read()
        assert (text, bytes(ids), finished.reason) == ("abcdab", b"abcdab", FinishReason.LENGTH)
        assert client.ask(m.Append(4, rid, "echo", None, pack_i32([33])), m.Appended).num_tokens == 11
        assert client.ask(go_on(5, rid, max_tokens=12), m.Accepted).prompt_tokens == 11
        assert client.read()[0] == "abcdabcdab!a"
        assert client.ask(go_on(6, rid + 1), m.Error).code == ErrorCode.NOT_FOUND
    encodes = [message for message in world.tokenizer.seen if isinstance(message, m.Encode)]
    assert [encode.continues for encode in encodes] == [False, True]
    (first, _) = [message.params for message in world.kernel.seen if isinstance(message, m.SeqContinue)][:2]
    assert (first.temperature, first.top_k, first.stop_token_ids, first.max_tokens) == (0.7, 40, (0,), 6)
    assert len(world.gateway.router) == 0
    assert not world.tokenizer.streams


def test_a_stop_string_cuts_the_sequence_itself(world: GatewayWorld) -> None:
    with Peer(world) as client, Peer(world, "client-control") as control:
        rid = client.ask(m.Spawn(1, None, text="one two "), m.Spawned).rid
        client.ask(go_on(2, rid, max_tokens=100, stop=("two",)), m.Accepted)
        text, ids, finished = client.read()
        assert (text, bytes(ids), finished.reason, finished.stop_string) == ("one ", b"one two", 1, "two")
        stats = control.ask(m.Stat(1, rid), m.Stats)
        assert (stats.num_tokens, stats.row.state, stats.row.is_open) == (15, SeqState.BLOCKED, True)
        client.ask(m.Attach(3, rid), m.Accepted)
        again = client.read()
        assert (again[0], again[1]) == (text, ids)
        assert (again[2].reason, again[2].stop_string) == (FinishReason.STOP, "two")


def test_a_client_that_dies_is_followed_by_one_that_reads_on(world: GatewayWorld) -> None:
    world.kernel.window = 40
    with Peer(world) as client:
        rid = client.ask(m.Spawn(1, None, text="abcdefg"), m.Spawned).rid
        client.ask(go_on(2, rid, max_tokens=200), m.Accepted)
        text, ids, _ = client.read(20)
    wait_until(lambda: m.SeqDetach(rid) in world.kernel.seen)
    wait_until(lambda: not world.kernel.sequences[rid].generating, "the sequence goes on without a reader")
    assert not any(isinstance(message, m.SeqCancel) for message in world.kernel.seen)
    with Peer(world) as client:
        client.ask(m.Attach(1, rid, len(ids)), m.Accepted)
        rest, more, finished = client.read()
        assert finished.reason == FinishReason.LENGTH
        whole = ("abcdefg" * 30)[:200]
        assert text + rest == whole
        assert bytes(ids + more) == whole.encode()


def test_the_newest_of_two_readers_reads(world: GatewayWorld) -> None:
    world.kernel.window = 30
    with Peer(world) as first, Peer(world) as second:
        rid = first.ask(m.Spawn(1, None, text="abc"), m.Spawned).rid
        first.ask(go_on(2, rid, max_tokens=60), m.Accepted)
        first.read(30)
        second.ask(m.Attach(7, rid, 27), m.Accepted)
        error = first.expect(m.Error)
        assert (error.req, error.code, error.rid) == (2, ErrorCode.WRONG_STATE, rid)
        assert second.read(3) == ("abc", [97, 98, 99], None)
        second.send(m.Ack(7, 30))
        assert len(second.read(30)[1]) == 30
        second.expect(m.Finished)


def test_the_same_request_twice_is_one_sequence(world: GatewayWorld) -> None:
    with Peer(world) as first, Peer(world) as second:
        asked = m.Generate(1, None, "abc", None, None, SamplingParams(max_tokens=6), "key")
        rid = first.ask(asked, m.Accepted).rid
        assert first.read()[0] == "abcabc"
        assert second.ask(asked, m.Accepted) == m.Accepted(1, rid, "echo", 3)
        assert second.read()[0] == "abcabc"
        spawn = m.Spawn(2, None, text="ab", client_request_id="other")
        assert first.ask(spawn, m.Spawned) == second.ask(spawn, m.Spawned)


def test_cancel_ends_the_output_and_not_the_sequence(world: GatewayWorld) -> None:
    world.kernel.window = 30
    with Peer(world) as client:
        rid = client.ask(m.Spawn(1, None, text="abc"), m.Spawned).rid
        client.ask(go_on(2, rid), m.Accepted)
        client.read(30)
        client.send(m.Cancel(2))
        assert client.expect(m.Finished).reason == FinishReason.CANCELLED
        assert client.ask(m.Append(3, rid, "echo", "x", None), m.Appended).num_tokens == 34


def test_foreign_answers_like_unknown(world: GatewayWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    with Peer(world) as owner, Peer(world) as stranger:
        rid = owner.ask(m.Spawn(1, None, text="abc"), m.Spawned).rid
        monkeypatch.setattr("llmos.services.gateway.owners.owner_name", lambda _: "bob")
        monkeypatch.setattr("llmos.services.gateway.owners.is_administrator", lambda _: False)
        for make in (
            lambda rid: m.Append(5, rid, "echo", "x", None),
            lambda rid: go_on(5, rid),
            lambda rid: m.Attach(5, rid),
            lambda rid: m.Spawn(5, None, parent=rid),
        ):
            answers = [stranger.ask(make(number), m.Error) for number in (rid, 4711)]
            assert [(a.code, a.message.replace(str(n), "N")) for a, n in zip(answers, (rid, 4711))] == [
                (ErrorCode.NOT_FOUND, "no sequence N")
            ] * 2
        monkeypatch.undo()
        assert owner.ask(m.Append(2, rid, "echo", "x", None), m.Appended).num_tokens == 4


def test_verbs_travel_both_ways(world: GatewayWorld) -> None:
    world.kernel.paused = True
    with Peer(world) as client, Peer(world, "client-control") as control:
        rid = client.ask(m.Spawn(1, None, text="abc"), m.Spawned).rid
        kids = control.ask(m.Fork(2, rid, 2), m.Forked).rids
        assert len(set(kids)) == 2
        assert control.ask(m.Deadline(3, rid, 500.0), m.Error).code == ErrorCode.WRONG_STATE
        client.ask(go_on(2, rid), m.Accepted)
        assert control.ask(m.Deadline(3, rid, 500.0), m.Done) == m.Done(3, rid)
        assert control.ask(m.After(4, kids[0], (rid,)), m.Done).rid == kids[0]
        assert control.ask(m.Suspend(5, rid, PageFate.DROP), m.Done).rid == rid
        stats = control.ask(m.Stat(6, rid), m.Stats)
        assert (stats.children, stats.deadline_ms, stats.num_tokens, stats.job.sequences) == (2, 500.0, 3, 3)
        assert control.ask(m.Stat(7, kids[0]), m.Stats).after == (rid,)
        assert control.ask(m.RecordWrite(8), m.RecordWritten).records == 7
        assert control.ask(m.Close(9, rid), m.Done).rid == rid
        assert control.ask(m.Fork(10, rid), m.Error).code == ErrorCode.WRONG_STATE
        assert set(control.ask(m.Kill(11, None, job=rid), m.Killed).rids) == set(kids)
        assert control.ask(m.Kill(12, None, tenant="nobody"), m.Killed).rids == ()
        assert control.ask(m.Fork(13, rid, 0), m.Error).field == "count"


def test_wait_is_answered_at_the_end_and_forgotten_with_its_client(world: GatewayWorld) -> None:
    world.kernel.paused = True
    relay = world.gateway.relay
    with Peer(world) as client, Peer(world, "client-control") as control:
        rid = client.ask(m.Spawn(1, None), m.Spawned).rid
        with Peer(world, "client-control") as other:
            other.send(m.Wait(1, rid))
            control.send(m.Wait(2, rid))
            control.send(m.Wait(3, rid))
            wait_until(lambda: sum(map(len, relay._waiting.values())) == 3)
        wait_until(lambda: sum(map(len, relay._waiting.values())) == 2, "who left is forgotten")
        control.send(m.Cancel(3))
        wait_until(lambda: sum(map(len, relay._waiting.values())) == 1)
        control.send(m.Close(4, rid))
        answers = {type(answer): answer for answer in (control.expect(m.Message), control.expect(m.Message))}
        assert answers[m.Done] == m.Done(4, rid)
        assert (answers[m.Waited].req, answers[m.Waited].reason) == (2, FinishReason.CLOSED)
        assert control.ask(m.Wait(5, rid), m.Waited).req == 5  # it has ended already
    assert sum(isinstance(message, m.Wait) for message in world.kernel.controls) == 2


def test_waits_are_limited() -> None:
    with GatewayWorld(max_in_flight=2) as world, Peer(world) as client, Peer(world, "client-control") as control:
        rid = client.ask(m.Spawn(1, None), m.Spawned).rid
        for req in (1, 2, 3):
            control.send(m.Wait(req, rid))
        error = control.expect(m.Error)
        assert (error.req, error.code) == (3, ErrorCode.OVERLOADED)
        assert control.ask(m.Close(4, rid), m.Message).req in (1, 2, 4)


def test_what_is_lost_with_a_microkernel_is_named(world: GatewayWorld) -> None:
    """One without a journal: the next one has never heard of the sequence. What it had not answered yet it is asked again."""
    world.kernel.window = 6
    with Peer(world) as client:
        rid = client.ask(m.Spawn(1, None, text="abc"), m.Spawned).rid
        client.ask(go_on(2, rid), m.Accepted)
        client.read(6)
        world.kernel.silent = True
        client.send(m.Append(3, rid, "echo", None, pack_i32([65])))
        client.send(m.Spawn(4, None))
        wait_until(lambda: sum(isinstance(message, m.SeqSpawn) for message in world.kernel.seen) == 2)
        world.stop_kernel()
        wait_until(lambda: not world.gateway._kernel.is_up and not world.gateway._control.is_up)
        world.start_kernel()
        answers = {answer.req: answer for answer in (client.expect(m.Message) for _ in range(3))}
        assert (answers[2].code, answers[2].rid) == (ErrorCode.UNAVAILABLE, rid)
        assert answers[2].message == f"sequence {rid} was lost with the microkernel"
        assert answers[3].code == ErrorCode.NOT_FOUND
        assert isinstance(answers[4], m.Spawned)
    assert len(world.gateway.router) == 0
