"""Sequence objects of the blocking client: what each verb sends, what it returns, what it refuses."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gateway_world import DEADLINE_S, GatewayWorld, wait_until
from wiretap import Wiretap

from llmos import AsyncSequence, Client, Sequence
from llmos.client import _core
from llmos.codes import FinishReason, PageFate, SeqState
from llmos.errors import InvalidRequest, NotFound, RequestTimeout, Unavailable, WrongState
from llmos.protocol import messages as m
from llmos.protocol.params import SamplingParams


@pytest.fixture
def world() -> Iterator[GatewayWorld]:
    with GatewayWorld() as running:
        yield running


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch) -> Wiretap:
    return Wiretap(monkeypatch)


def test_a_conversation(world: GatewayWorld, tap: Wiretap) -> None:
    with Client(world.path) as client, client.spawn("abc", nice=3) as seq:
        assert seq.generate(max_tokens=5, temperature=1.0).text == "abcab"
        assert seq.append("de") == 10
        assert seq.append([33]) == 11
        with seq.generate(stream=True, max_tokens=4, deadline_s=60) as stream:
            assert stream.sequence is seq
            assert "".join(map(str, stream)) == stream.completion.text == "abca"
        assert stream.completion.rid == stream.rid == seq.rid
    rid = seq.rid
    first, second = SamplingParams(max_tokens=5, temperature=1.0), SamplingParams(max_tokens=4)
    assert tap.sent == [
        m.Spawn(1, None, "abc", nice=3),
        m.Continue(2, rid, "echo", first),
        m.Append(3, rid, "echo", "de", None),
        m.Append(4, rid, "echo", None, b"\x21\0\0\0"),
        m.Continue(5, rid, "echo", second, 60_000.0),
        m.Close(1, rid),
    ]


def test_every_verb_is_one_message(world: GatewayWorld, tap: Wiretap) -> None:
    world.kernel.paused = True
    with Client(world.path) as client:
        one, two, seq = client.spawn("x"), client.spawn("y"), client.spawn("abc")
        rid = seq.rid
        stream = seq.generate(stream=True)
        wait_until(lambda: world.kernel.sequences[rid].generating)
        tap.sent.clear()
        assert seq.suspend() is None
        seq.suspend(pages="swap")
        seq.suspend("drop")
        assert seq.stat().row.state == SeqState.SUSPENDED
        seq.resume()
        seq.nice(5)
        seq.deadline(2.0)
        assert seq.stat().deadline_ms == 2000.0
        seq.deadline(None)
        two.after(one, seq.rid)
        two.after()
        assert seq.explain().rid == rid
        seq.kill()
        assert list(stream) == []
    assert tap.sent == [
        m.Suspend(1, rid, PageFate.KEEP),
        m.Suspend(2, rid, PageFate.SWAP),
        m.Suspend(3, rid, PageFate.DROP),
        m.Stat(4, rid),
        m.Resume(5, rid),
        m.Nice(6, rid, 5),
        m.Deadline(7, rid, 2000.0),
        m.Stat(8, rid),
        m.Deadline(9, rid, None),
        m.After(10, two.rid, (one.rid, rid)),
        m.After(11, two.rid, ()),
        m.Explain(12, rid),
        m.Kill(13, rid),
    ]


def test_forks_are_sequences_of_their_own(world: GatewayWorld, tap: Wiretap) -> None:
    with Client(world.path) as client, client.spawn("abc") as seq:
        (only,) = seq.fork()
        kids = seq.fork(3)
        assert [type(kid) for kid in kids] == [Sequence] * 3
        assert len({seq.rid, only.rid, *(kid.rid for kid in kids)}) == 5
        assert kids[0].append("d") == 4
        assert [kid.generate(max_tokens=5).text for kid in kids] == ["abcda", "abcab", "abcab"]
        stats = seq.stat()
        assert (stats.children, stats.job.sequences, kids[0].stat().parent) == (4, 5, seq.rid)
    assert tap.of(m.Fork) == [m.Fork(1, seq.rid, 1), m.Fork(2, seq.rid, 3)]
    assert tap.of(m.Stat) == [m.Stat(3, seq.rid), m.Stat(4, kids[0].rid)], "the model of a fork is known"


def test_a_handle_by_number_asks_for_its_model_once_and_only_then(world: GatewayWorld, tap: Wiretap) -> None:
    with Client(world.path) as client:
        rid = client.spawn("abc").rid
        tap.sent.clear()
        seq = client.sequence(rid)
        assert repr(seq) == f"<Sequence {rid}>"
        seq.nice(1)
        assert tap.of(m.Stat) == []
        assert seq.append("d") == 4
        assert seq.generate(max_tokens=2).text == "ab"
        assert client.sequence(seq).rid == rid
    assert [type(message) for message in tap.sent] == [m.Nice, m.Stat, m.Append, m.Continue]
    assert tap.of(m.Continue)[0].model == "echo"


def test_a_spawn_without_a_prompt_begins_with_an_append(world: GatewayWorld, tap: Wiretap) -> None:
    with Client(world.path, model="echo") as client, client.spawn() as seq:
        assert seq.stat().num_tokens == 0
        assert seq.append("xy") == 2
        assert seq.generate(max_tokens=3).text == "xyx"
    assert tap.sent[0] == m.Spawn(1, "echo")


def test_parent_and_after_take_objects_and_numbers(world: GatewayWorld, tap: Wiretap) -> None:
    with Client(world.path) as client:
        root = client.spawn("a")
        kid = client.spawn("b", parent=root, after=(root.rid,))
        done = client.generate("c", max_tokens=2, parent=kid)
        last = client.spawn("d", after=[done, root], parent=root.rid)
        assert (last.stat().after, last.stat().job.job) == ((done.rid, root.rid), root.rid)
    assert (tap.sent[1].parent, tap.sent[1].after) == (root.rid, (root.rid,))
    assert (tap.sent[2].parent, tap.sent[2].after) == (kid.rid, ())


def test_wait_returns_reason_and_usage(world: GatewayWorld, tap: Wiretap) -> None:
    with Client(world.path) as client:
        seq = client.spawn("abc")
        seq.generate(max_tokens=4)
        with pytest.raises(RequestTimeout, match=rf"sequence {seq.rid} did not end within 0\.05 s") as caught:
            seq.wait(timeout_s=0.05)
        assert (caught.value.field, caught.value.rid) == ("timeout_s", seq.rid)
        assert tap.of(m.Wait, m.Cancel) == [m.Wait(1, seq.rid), m.Cancel(1)]
        endings: list[Any] = []
        waiting = threading.Thread(target=lambda: endings.append(seq.wait()))
        waiting.start()
        wait_until(lambda: len(tap.of(m.Wait)) == 2)
        seq.close()
        waiting.join(DEADLINE_S)
        (ending,) = endings
        assert (ending.rid, ending.reason, ending.is_failure) == (seq.rid, "closed", False)
        assert (ending.usage.prompt_tokens, ending.usage.output_tokens) == (3, 4)
        assert seq.wait() == ending, "an ended sequence stays readable"
        late = client.spawn("x")
        world.thread.do(world.kernel._finish, world.kernel.sequences[late.rid], FinishReason.DEPENDENCY, True)
        assert (late.wait().reason, late.wait().is_failure) == ("dependency", True)


def test_kill_returns_whom_it_ended(world: GatewayWorld, tap: Wiretap) -> None:
    with Client(world.path) as client:
        one, two, root = client.spawn("a"), client.spawn("b"), client.spawn("c")
        kids = root.fork(2)
        assert client.kill(one.rid) == (one.rid,)
        assert client.kill(two) == (two.rid,)
        assert client.kill(job=kids[1]) == (root.rid, kids[0].rid, kids[1].rid)
        assert client.kill(tenant="nobody", model="echo") == ()
        with pytest.raises(WrongState, match=rf"sequence {one.rid} has ended \(killed\)"):
            client.kill(one.rid)
        with pytest.raises(NotFound, match="no sequence 4711"):
            client.kill(4711)
        with pytest.raises(InvalidRequest, match="give either a rid"):
            client.kill()
    selectors = [(message.rid, message.tenant, message.job, message.model) for message in tap.of(m.Kill)]
    assert selectors == [
        (one.rid, None, None, None),
        (two.rid, None, None, None),
        (None, None, kids[1].rid, None),
        (None, "nobody", None, "echo"),
        (one.rid, None, None, None),
        (4711, None, None, None),
    ]


def test_the_block_closes_what_is_still_there(world: GatewayWorld, tap: Wiretap) -> None:
    with Client(world.path) as client:
        with client.spawn("a") as seq:
            pass
        assert seq.wait().reason == "closed"
        with client.spawn("a") as killed:
            killed.kill()
        with pytest.raises(WrongState):
            killed.close()
        with pytest.raises(ZeroDivisionError), client.spawn("a") as broken:
            raise ZeroDivisionError
        assert broken.wait().reason == "closed"
        with pytest.raises(ZeroDivisionError), client.spawn("a"):  # noqa: PT012
            client.close()
            raise ZeroDivisionError
    assert [message.rid for message in tap.of(m.Close)] == [seq.rid, killed.rid, killed.rid, broken.rid]


def test_after_its_end_only_looking_is_allowed(world: GatewayWorld) -> None:
    with Client(world.path) as client:
        seq = client.spawn("abc")
        seq.generate(max_tokens=4)
        seq.kill()
        assert seq.stat().reason == FinishReason.KILLED
        assert "".join(map(str, seq.attach())) == "abca"
        changes: list[Callable[[], Any]] = [
            lambda: seq.append("x"), seq.generate, seq.fork, seq.suspend, seq.resume, seq.close, seq.kill, seq.after,
            lambda: seq.nice(1), lambda: seq.deadline(1.0), lambda: list(seq.generate(stream=True)),
        ]  # fmt: skip
        for change in changes:
            with pytest.raises(WrongState, match=rf"sequence {seq.rid} has ended \(killed\)"):
                change()


def test_an_unknown_number_is_not_found_by_every_verb(world: GatewayWorld) -> None:
    with Client(world.path) as client:
        seq = client.sequence(4711)
        verbs: list[Callable[[], Any]] = [
            lambda: seq.append("x"), seq.generate, seq.fork, seq.suspend, seq.resume, seq.close, seq.kill, seq.after,
            lambda: seq.nice(1), lambda: seq.deadline(1.0), lambda: list(seq.attach()), seq.stat, seq.explain, seq.wait,
        ]  # fmt: skip
        for verb in verbs:
            with pytest.raises(NotFound, match="no sequence 4711"):
                verb()


def test_bad_arguments_send_nothing(world: GatewayWorld, tap: Wiretap) -> None:
    with Client(world.path) as client:
        for rid in (0, -1, "5", True, 2**63, None):
            with pytest.raises(InvalidRequest, match="is not a sequence number"):
                client.sequence(rid)  # type: ignore[arg-type]
        seq = client.sequence(5)
        refused: list[tuple[Callable[[], Any], str]] = [
            (lambda: seq.append(""), "text"),
            (lambda: seq.generate(top_p=3), "top_p"),
            (lambda: seq.generate(stream=True, temprature=1), "temprature"),
            (lambda: seq.generate(timeout_s=0), "timeout_s"),
            (lambda: seq.attach(-1), "offset"),
            (lambda: seq.attach(timeout_s=-1), "timeout_s"),
            (lambda: seq.fork(0), "n"),
            (lambda: seq.suspend("gone"), "pages"),
            (lambda: seq.nice(99), "nice"),
            (lambda: seq.deadline(-2), "deadline_s"),
            (lambda: seq.after("x"), "after"),
            (lambda: seq.wait(timeout_s=True), "timeout_s"),
            (lambda: client.spawn(b"x"), "prompt"),
        ]
        for call, field in refused:
            with pytest.raises(InvalidRequest) as caught:
                call()
            assert caught.value.field == field
    assert tap.sent == []


# ------------------------------------------------------------ reading


def test_attach_reads_from_any_offset_while_it_generates_and_later(world: GatewayWorld, tap: Wiretap) -> None:
    world.kernel.window = 6
    with Client(world.path) as client:
        seq = client.spawn("abcdef")
        stream = seq.generate(stream=True, max_tokens=12)
        wait_until(lambda: seq.stat().row.output_tokens == 6)
        world.kernel.window = 4096
        reader = client.sequence(seq.rid).attach(2)
        chunks = list(reader)
        assert (chunks[0].offset, chunks[0].rid) == (2, seq.rid)
        assert reader.completion.text == "cdefabcdef"
        assert reader.completion.finish_reason == "length"
        with pytest.raises(WrongState, match="reader"):
            list(stream)
        assert "".join(map(str, seq.attach(10))) == "ef"
        assert list(seq.attach(12)) == []
    assert [message.offset for message in tap.of(m.Attach)] == [2, 10, 12]


def test_leaving_an_output_ends_it_but_not_the_sequence(world: GatewayWorld, tap: Wiretap) -> None:
    world.kernel.window = 6
    with Client(world.path) as client, client.spawn("abc") as seq:
        with seq.generate(stream=True, max_tokens=100) as stream:
            next(stream)
        wait_until(lambda: seq.stat().row.state == SeqState.BLOCKED)
        world.kernel.window = 4096
        assert seq.generate(max_tokens=3).finish_reason == "length"
    assert tap.of(m.Cancel) == [m.Cancel(tap.of(m.Continue)[0].req)]


@pytest.mark.parametrize("how", ["close", "collector"])
def test_leaving_what_was_attached_lets_it_go_on(
    world: GatewayWorld, tap: Wiretap, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The window is smaller than the output: it can only end if somebody acknowledges."""
    monkeypatch.setattr(_core, "ACK_EVERY_TOKENS", 8)
    world.kernel.window = 12
    with Client(world.path) as client:
        seq = client.spawn("abc")
        first = seq.generate(stream=True, max_tokens=100)
        next(first)
        stream = seq.attach(1)
        next(stream)
        assert seq.stat().row.state == SeqState.RUNNING
        if how == "close":
            stream.close()
        del stream
        gc.collect()
        wait_until(lambda: seq.stat().row.state == SeqState.BLOCKED)
        assert seq.stat().row.output_tokens == 100
        acks = [ack.upto for ack in tap.of(m.Ack) if ack.req == tap.of(m.Attach)[0].req]
        assert acks == sorted(acks)
        assert acks[-1] > 80
    assert tap.of(m.Cancel) == []


def test_an_attached_stream_that_takes_too_long_is_left(world: GatewayWorld, tap: Wiretap) -> None:
    world.kernel.paused = True
    with Client(world.path) as client:
        seq = client.spawn("abc")
        first = seq.generate(stream=True, max_tokens=3)
        wait_until(lambda: seq.stat().row.state == SeqState.RUNNING)
        with pytest.raises(RequestTimeout, match=r"within 0\.05 s"):
            list(seq.attach(timeout_s=0.05))
        world.kernel.paused = False
        wait_until(lambda: seq.stat().row.state == SeqState.BLOCKED)
        assert seq.stat().row.output_tokens == 3
        del first
    assert tap.of(m.Cancel) == []


def test_a_stream_knows_its_sequence_from_its_acceptance_on(world: GatewayWorld) -> None:
    world.kernel.paused = True
    with Client(world.path) as client:
        stream = client.generate("abc", stream=True, max_tokens=3)
        wait_until(lambda: stream.rid is not None)
        stream.sequence.nice(4)
        assert [row.nice for row in client.ps()] == [4]
        stream.sequence.suspend()
        world.kernel.paused = False
        stream.sequence.resume()
        assert "".join(map(str, stream)) == "abc"
        assert stream.sequence.stat().reason == FinishReason.LENGTH
        nobody = client.generate("abc", stream=True, model="nope")
        with pytest.raises(NotFound):
            list(nobody)
        with pytest.raises(InvalidRequest, match="no sequence yet"):
            _ = nobody.sequence


def test_forks_of_a_generating_sequence_are_read_by_attaching(world: GatewayWorld) -> None:
    world.kernel.paused = True
    with Client(world.path) as client:
        seq = client.spawn("abc")
        stream = seq.generate(stream=True, max_tokens=7)
        wait_until(lambda: seq.stat().row.state == SeqState.RUNNING)
        kids = seq.fork(2)
        world.kernel.paused = False
        texts = ["".join(map(str, each)) for each in (stream, *(kid.attach() for kid in kids))]
        assert texts == ["abcabca"] * 3


def test_a_closed_client_says_so_through_its_sequences(world: GatewayWorld) -> None:
    client = Client(world.path)
    seq = client.spawn("abc")
    client.close()
    for use in (seq.stat, seq.generate, lambda: seq.generate(stream=True), seq.attach, lambda: seq.fork(2)):
        with pytest.raises(Unavailable, match="client is closed"):
            use()


def test_both_kinds_of_sequence_offer_the_same_verbs() -> None:
    def verbs(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert verbs(Sequence) == verbs(AsyncSequence)
    assert verbs(Sequence) == {
        "after", "append", "attach", "close", "deadline", "explain", "fork", "generate", "kill", "nice", "resume",
        "stat", "suspend", "wait",
    }  # fmt: skip
