"""The gateway over real sockets while the tokenizer and the microkernel die and come back: clients notice a pause."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import zmq
from gateway_peer import Peer, generate, go_on
from gateway_world import GatewayWorld, wait_until

from llmos.codes import ErrorCode, FinishReason
from llmos.ports.sync import Listener
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema
from llmos.services.gateway import links


@pytest.fixture
def world() -> Iterator[GatewayWorld]:
    with GatewayWorld() as running:
        yield running


def echo(prompt: str, length: int) -> str:
    raw = prompt.encode()
    return bytes(raw[i % len(raw)] for i in range(length)).decode(errors="replace")


def end_kernel(world: GatewayWorld) -> None:
    world.stop_kernel()
    wait_until(lambda: not world.gateway._kernel.is_up and not world.gateway._control.is_up)


def lose_kernel(world: GatewayWorld) -> None:
    """It dies, and another one takes its place."""
    end_kernel(world)
    world.start_kernel(world.kernel)


def lose_tokenizer(world: GatewayWorld) -> None:
    world.stop_tokenizer()
    wait_until(lambda: not world.gateway._text.is_up)
    world.start_tokenizer()


def lose_both(world: GatewayWorld) -> None:
    end_kernel(world)
    lose_tokenizer(world)
    world.start_kernel(world.kernel)


def sequences(world: GatewayWorld) -> list[Any]:
    return [*world.kernel.sequences.values(), *world.kernel.ended.values()]


def has_output(world: GatewayWorld, tokens: int) -> Callable[[], bool]:
    return lambda: any(seq.sent >= tokens for seq in sequences(world))


def has_seen(world: GatewayWorld, kind: type[m.Message]) -> Callable[[], bool]:
    return lambda: any(isinstance(message, kind) for message in (*world.kernel.seen, *world.kernel.controls))


@pytest.mark.parametrize("lose", [lose_kernel, lose_tokenizer, lose_both])
def test_streams_go_on_where_they_were(world: GatewayWorld, lose: Callable[[GatewayWorld], None]) -> None:
    world.kernel.tokens_per_step = 1
    prompts = [f"stream {i} é漢字🙂 " for i in range(8)]
    with ExitStack() as stack:
        clients = [stack.enter_context(Peer(world)) for _ in prompts]
        for i, client in enumerate(clients):
            client.send(generate(1, prompts[i], max_tokens=300 + i))
        for produced in (5, 100):
            wait_until(has_output(world, produced))
            lose(world)
        for i, client in enumerate(clients):
            client.expect(m.Accepted)
            text, ids, finished = client.read()
            assert (text, len(ids), finished.reason) == (echo(prompts[i], 300 + i), 300 + i, FinishReason.LENGTH)
    assert len(world.gateway.router) == 0
    assert len(world.kernel.ended) == 8


@pytest.mark.parametrize("is_done", [True, False])
@pytest.mark.parametrize("kind", [m.SeqSubmit, m.SeqSpawn, m.SeqAppend, m.SeqContinue])
def test_what_a_microkernel_died_of_happens_once(world: GatewayWorld, kind: type[m.Message], is_done: bool) -> None:
    """Whether it died before or after it did it."""
    with Peer(world) as client:
        rid = client.ask(m.Spawn(1, None, text="ab"), m.Spawned).rid
        world.kernel.fatal, world.kernel.fatal_is_done = kind, is_done
        before = len(world.kernel.seen)
        client.send(
            {
                m.SeqSubmit: generate(2, "abc", max_tokens=40),
                m.SeqSpawn: m.Spawn(2, None, text="xyz"),
                m.SeqAppend: m.Append(2, rid, "echo", "cd", None),
                m.SeqContinue: go_on(2, rid, max_tokens=40),
            }[kind]
        )
        wait_until(lambda: any(isinstance(message, kind) for message in world.kernel.seen[before:]))
        lose_kernel(world)
        if kind is m.SeqSpawn:
            assert client.expect(m.Spawned).num_tokens == 3
        elif kind is m.SeqAppend:
            assert client.expect(m.Appended) == m.Appended(2, rid, 4)
        else:
            prompt = "abc" if kind is m.SeqSubmit else "ab"
            assert client.expect(m.Accepted).prompt_tokens == len(prompt)
            text, ids, finished = client.read()
            assert (text, len(ids), finished.reason) == (echo(prompt, 40), 40, FinishReason.LENGTH)
        makes_one = kind in (m.SeqSubmit, m.SeqSpawn)
        assert len(sequences(world)) == 1 + makes_one
        lengths = {m.SeqAppend: 4, m.SeqContinue: 42}
        assert len(world.kernel.sequences[rid].tokens) == lengths.get(kind, 2)


def test_requests_wait_for_a_microkernel(world: GatewayWorld) -> None:
    with Peer(world) as client, Peer(world, "client-control") as control:
        rid = client.ask(m.Spawn(1, None, text="ab"), m.Spawned).rid
        end_kernel(world)
        client.send(generate(2, "late", max_tokens=4))
        control.send(m.Stat(3, rid))
        wait_until(lambda: len(world.gateway.router) == 1 and world.gateway.relay._questions)
        world.start_kernel(world.kernel)
        client.expect(m.Accepted)
        assert client.read()[0] == "late"
        assert control.expect(m.Stats).num_tokens == 2


@pytest.mark.parametrize("is_done", [True, False])
@pytest.mark.parametrize("kind", [m.Kill, m.Close, m.Fork])
def test_verbs_that_a_microkernel_died_of(world: GatewayWorld, kind: type[m.Message], is_done: bool) -> None:
    with Peer(world) as client, Peer(world, "client-control") as control:
        rid = client.ask(m.Spawn(1, None, text="ab"), m.Spawned).rid
        control.send(m.Wait(1, rid))
        wait_until(has_seen(world, m.Wait))
        world.kernel.fatal, world.kernel.fatal_is_done = kind, is_done
        control.send(kind(2, rid))  # type: ignore[call-arg]
        wait_until(has_seen(world, kind))
        lose_kernel(world)
        if kind is m.Fork:
            error = control.expect(m.Error)
            assert (error.req, error.code, error.rid) == (2, ErrorCode.UNAVAILABLE, rid)
            assert len(sequences(world)) == (2 if is_done else 1)
            control.send(m.Kill(2, rid))
        answers = sorted((control.expect(m.Message) for _ in range(2)), key=lambda message: message.req)
        assert answers[1] == (m.Done(2, rid) if kind is m.Close else m.Killed(2, (rid,)))
        reason = FinishReason.CLOSED if kind is m.Close else FinishReason.KILLED
        assert (answers[0].req, answers[0].rid, answers[0].reason) == (1, rid, reason)


def test_encodings_are_asked_again(world: GatewayWorld) -> None:
    world.tokenizer.mute = True
    with Peer(world) as client:
        client.send(m.Tokenize(1, None, "abc", None))
        wait_until(lambda: any(isinstance(message, m.Encode) for message in world.tokenizer.seen))
        lose_tokenizer(world)
        assert client.expect(m.Tokenized).pieces == ("a", "b", "c")


def test_a_text_that_kills_every_tokenizer_fails_alone() -> None:
    with GatewayWorld(poison="poison") as world, Peer(world) as innocent, Peer(world) as guilty:
        world.kernel.tokens_per_step, world.kernel.window = 1, 100  # it goes on until it is acknowledged
        innocent.ask(generate(1, "innocent", max_tokens=200), m.Accepted)
        guilty.send(m.Tokenize(1, None, "poison", None))
        for _ in range(3):
            wait_until(lambda: any(getattr(message, "text", None) == "poison" for message in world.tokenizer.seen))
            lose_tokenizer(world)
        error = guilty.expect(m.Error)
        assert (error.req, error.code, error.field) == (1, ErrorCode.INTERNAL, "prompt")
        assert error.message == "3 tokenizers died while they had the text of this request"
        assert guilty.ask(m.Tokenize(2, None, "harmless", None), m.Tokenized).pieces == tuple("harmless")
        innocent.send(m.Ack(1, 100))
        assert innocent.read()[0] == echo("innocent", 200)


def test_a_connection_that_takes_no_more_is_given_up_and_nothing_is_lost(
    world: GatewayWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Peer(world) as client:
        client.ask(generate(1, "ab", max_tokens=4), m.Accepted)
        client.read()
        monkeypatch.setattr(links, "_MAX_BACKLOG", 2)
        monkeypatch.setattr(world.gateway._kernel._dialer, "send", lambda message: False)
        for req in (2, 3, 4):
            client.send(m.Spawn(req, None, text="ab"))
        assert {client.expect(m.Spawned).req for _ in range(3)} == {2, 3, 4}
    assert len(sequences(world)) == 4


def test_what_a_socket_can_not_take_now_it_takes_later(world: GatewayWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    dialer = world.gateway._kernel._dialer
    assert dialer is not None
    real, refusals = dialer.send, iter(range(3))
    monkeypatch.setattr(dialer, "send", lambda message: next(refusals, None) is None and real(message))
    with Peer(world) as client:
        client.ask(generate(1, "ab", max_tokens=4), m.Accepted)
        assert client.read()[0] == "abab"
    assert next(refusals, None) is None


def test_a_microkernel_that_dies_while_it_is_greeted_is_greeted_again_at_once(world: GatewayWorld) -> None:
    """Not when the time for an answer is over: its clients wait all that time."""
    end_kernel(world)
    deaf: Listener[Any] = Listener(world.run_dir, "kernel", Schema(m.ToKernel), frozenset({"gateway"}))
    wait_until(lambda: deaf.socket.poll(0, zmq.POLLIN))  # its hello is there, and will not be read
    started = time.monotonic()
    deaf.close()
    world.start_kernel(world.kernel)
    wait_until(lambda: world.gateway._kernel.is_up)
    assert time.monotonic() - started < links._GREET_TIMEOUT_S / 2
