"""The gateway process's insides over real sockets, between a byte tokenizer and an echoing microkernel."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from gateway_world import DEADLINE_S, GatewayWorld, model_info, wait_until

from llmos import Client
from llmos.codes import ErrorCode, FinishReason, SeqState
from llmos.errors import LlmosError, NotFound, Overloaded, PermissionRefused
from llmos.ports.sync import Dialer
from llmos.protocol import handshake
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, encode, pack_i32
from llmos.protocol.params import SamplingParams


@pytest.fixture
def world() -> Iterator[GatewayWorld]:
    with GatewayWorld() as running:
        yield running


def echo(prompt: str, length: int) -> str:
    """What the echoing microkernel answers; cut inside a character it shows the replacement character."""
    raw = prompt.encode()
    return bytes(raw[i % len(raw)] for i in range(length)).decode(errors="replace")


def dial(world: GatewayWorld, name: str = "client") -> Dialer[Any]:
    dialer: Dialer[Any] = Dialer(world.run_dir, name, Schema(m.GatewayToClient))
    dialer.greet("client", "test", DEADLINE_S)
    return dialer


def generate(req: int, text: str = "hello", **params: Any) -> m.Generate:
    return m.Generate(req, None, text, None, None, SamplingParams(**params))


def expect(dialer: Dialer[Any], kind: type[m.Message]) -> Any:
    while True:
        message = dialer.expect(DEADLINE_S)
        if not isinstance(message, m.Welcome):  # a probe
            assert isinstance(message, kind), message
            return message


def test_messages_of_one_request(world: GatewayWorld) -> None:
    dialer = dial(world)
    dialer.send(generate(5, "héé", max_tokens=7))
    accepted = expect(dialer, m.Accepted)
    assert (accepted.req, accepted.model, accepted.prompt_tokens) == (5, "echo", 5)
    batches = [expect(dialer, m.Tokens) for _ in range(3)]
    assert [(t.req, t.offset, len(t.ids)) for t in batches] == [(5, 0, 3), (5, 3, 3), (5, 6, 1)]
    finished = expect(dialer, m.Finished)
    assert (finished.req, finished.rid, finished.reason) == (5, accepted.rid, FinishReason.LENGTH)
    assert "".join(t.text for t in batches) + finished.text == "hééh\N{REPLACEMENT CHARACTER}"
    assert finished.text == "\N{REPLACEMENT CHARACTER}"
    dialer.close()


def test_the_microkernel_gets_complete_parameters_and_the_owner(world: GatewayWorld) -> None:
    with Client(world.path) as client:
        client.generate([1, 2, 3], max_tokens=4, client_request_id="k1", top_k=3)
    (submit,) = [message for message in world.kernel.seen if isinstance(message, m.SeqSubmit)]
    assert submit.prompt == pack_i32([1, 2, 3])
    assert submit.client_request_id == "k1"
    params = submit.params
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.7, 3, 1.0, 0.0)
    assert (params.repetition_penalty, params.stop_token_ids, params.max_tokens) == (1.0, (0,), 4)
    with Client(world.path) as client:
        world.kernel.paused = True
        stream = client.generate("x", stream=True)
        wait_until(lambda: client.ps())
        assert client.ps()[0].owner == submit.owner
        stream.close()


def test_32_streams_at_once_are_exact(world: GatewayWorld) -> None:
    prompts = [f"stream {i} é漢字🙂 " for i in range(32)]
    lengths = [40 + 7 * i for i in range(32)]
    results: dict[int, tuple[str, str]] = {}

    def work(client: Client, i: int) -> None:
        with client.generate(prompts[i], max_tokens=lengths[i], stream=True) as stream:
            text = "".join(chunk.text for chunk in stream)
        results[i] = (text, stream.completion.text)

    with Client(world.path) as client:
        threads = [threading.Thread(target=work, args=(client, i)) for i in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert results == {i: (echo(prompts[i], lengths[i]),) * 2 for i in range(32)}
    assert len(world.gateway.router) == 0


def test_stop_string_across_tokens(world: GatewayWorld) -> None:
    with Client(world.path) as client:
        done = client.generate("one two three ", max_tokens=100, stop=("two t", "zzz"))
        assert (done.text, done.finish_reason, done.stop_string) == ("one ", "stop", "two t")
        assert done.token_ids == tuple(b"one two t")
        assert done.usage.output_tokens == 9
    assert any(isinstance(message, m.SeqFinish) and message.upto == 9 for message in world.kernel.seen)
    wait_until(lambda: not world.tokenizer.streams)


def test_killed_and_cancelled(world: GatewayWorld) -> None:
    world.kernel.paused = True
    with Client(world.path) as client:
        stream = client.generate("abc", stream=True)
        wait_until(lambda: client.ps())
        client.kill(client.ps()[0].rid)
        assert list(stream) == []
        assert stream.completion.finish_reason == "killed"
        with pytest.raises(NotFound, match="no sequence 4711") as caught:
            client.kill(4711)
        assert caught.value.rid == 4711
    dialer = dial(world)
    dialer.send(generate(2))
    expect(dialer, m.Accepted)
    dialer.send(m.Cancel(2))
    dialer.send(m.Cancel(2))
    assert expect(dialer, m.Finished).reason == FinishReason.CANCELLED
    dialer.close()


def test_a_stranger_can_not_touch_what_is_not_its_own(world: GatewayWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world.kernel.paused = True
    with Client(world.path) as owner, Client(world.path) as stranger:
        stream = owner.generate("abc", stream=True)
        wait_until(lambda: owner.ps())
        rid = owner.ps()[0].rid
        monkeypatch.setattr("llmos.services.gateway.owners.owner_name", lambda _: "bob")
        monkeypatch.setattr("llmos.services.gateway.owners.is_administrator", lambda _: False)
        assert stranger.ps() == ()
        assert [row.tenant for row in stranger.tenants()] == ["bob"]
        verbs = [stranger.kill, stranger.suspend, stranger.resume, stranger.explain, lambda rid: stranger.nice(rid, 5)]
        for verb in verbs:
            answers = []
            for number in (rid, 4711):
                with pytest.raises(NotFound) as caught:
                    verb(number)
                answers.append((caught.value.field, caught.value.message.replace(str(number), "N")))
            assert answers == [("rid", "no sequence N")] * 2
        with pytest.raises(PermissionRefused, match="nice: -1 is below 0"):
            stranger.nice(rid, -1)
        with pytest.raises(PermissionRefused, match="TenantSet is for the role admin; this session has inspect"):
            stranger.set_tenant("bob", weight=1000.0)
        monkeypatch.undo()
        (row,) = owner.ps()
        assert (row.rid, row.nice, row.state) == (rid, 0, SeqState.RUNNING)
        assert [row.weight for row in owner.tenants()] == [1.0, 1.0]
        stream.close()


def test_acknowledgements_reach_the_microkernel(world: GatewayWorld) -> None:
    world.kernel.window = 300
    with Client(world.path) as client:
        assert len(client.generate("abc", max_tokens=500).token_ids) == 500
    (upto,) = world.kernel.acked.values()
    assert upto >= 200


@pytest.mark.parametrize("end", ["left", "died"])
def test_a_vanished_client_is_noticed_while_its_sequence_waits(world: GatewayWorld, end: str) -> None:
    world.kernel.paused = True
    client = Client(world.path)
    stream = client.generate("abc", stream=True)
    wait_until(lambda: world.kernel.sequences)
    if end == "left":
        stream.close()
    else:
        client.close()
    wait_until(lambda: not world.kernel.sequences)
    wait_until(lambda: len(world.gateway.router) == 0)
    assert any(isinstance(message, m.SeqCancel) for message in world.kernel.seen)
    client.close()


def test_clients_that_leave_make_room_for_others() -> None:
    with GatewayWorld(max_clients=3) as world:
        for _ in range(8):
            with Client(world.path) as client:
                client.generate("a", max_tokens=1)
                client.ps()
            wait_until(lambda: len(world.gateway._clients.listener.core.peers) < 3)
            wait_until(lambda: len(world.gateway._control_clients.listener.core.peers) < 3)


def test_in_flight_limit_is_typed() -> None:
    with GatewayWorld(max_in_flight=2) as world, Client(world.path) as client:
        world.kernel.paused = True
        streams = [client.generate("a", stream=True) for _ in range(2)]
        wait_until(lambda: len(world.kernel.sequences) == 2)
        with pytest.raises(Overloaded, match="2 requests"):
            client.generate("b")
        for stream in streams:
            stream.close()


def test_a_gateway_that_stops_leaves_its_streams_to_the_next_one() -> None:
    with GatewayWorld() as world:
        world.kernel.paused = True
        dialer, control = dial(world), dial(world, "client-control")
        dialer.send(generate(1, "abc", max_tokens=6))
        rid = expect(dialer, m.Accepted).rid
        control.send(m.Wait(2, rid))
        wait_until(lambda: world.kernel.controls)
        world.thread.call(world.gateway.close())
        assert not any(isinstance(message, (m.SeqCancel, m.SeqDetach)) for message in world.kernel.seen)
        world.kernel.paused = False
        world.thread.do(world._make)
        world.thread.call(world.gateway.start())
        for closing in (dialer, control):
            closing.close()
        dialer, control = dial(world), dial(world, "client-control")
        dialer.send(m.Attach(3, rid))
        expect(dialer, m.Accepted)
        ids: list[int] = []
        while isinstance(message := expect(dialer, m.Message), m.Tokens):
            ids += message.ids
        assert (bytes(ids), message.req, message.reason) == (b"abcabc", 3, FinishReason.LENGTH)
        control.send(m.Wait(2, rid))
        assert expect(control, m.Waited).reason == FinishReason.LENGTH
        for closing in (dialer, control):
            closing.close()


RAW: list[tuple[bytes, int, int, str]] = [
    (b"\x92\x0a", 0, ErrorCode.PROTOCOL, "bad message"),
    (encode(generate(9))[:-3], 0, ErrorCode.PROTOCOL, "truncated"),
    (b"\xff" * 40, 0, ErrorCode.PROTOCOL, "message"),
    (msgspec.msgpack.encode([55, 9]), 9, ErrorCode.PROTOCOL, "type 55 is not accepted"),
    (msgspec.msgpack.encode([15, 9, 1]), 9, ErrorCode.PROTOCOL, "bad message of type 15"),
    (encode(generate(9, "marker")).replace(b"marker", b"ma\xffker"), 9, ErrorCode.PROTOCOL, "utf-8"),
    (encode(generate(9, "")), 9, ErrorCode.INVALID_REQUEST, "prompt is empty"),
    (encode(generate(9, "x" * (5 * 1024 * 1024))), 9, ErrorCode.INVALID_REQUEST, "5242880 bytes"),
    (encode(generate(9, top_p=2.0)), 9, ErrorCode.INVALID_REQUEST, "top_p"),
    (encode(generate(9, "x" * 512)), 9, ErrorCode.CONTEXT_TOO_LONG, "512 tokens"),
]


@pytest.mark.parametrize(("frame", "req", "code", "words"), RAW, ids=[row[3] for row in RAW])
def test_bad_bytes_are_answered_and_disturb_nobody(
    world: GatewayWorld, frame: bytes, req: int, code: int, words: str
) -> None:
    with Client(world.path) as client:
        world.kernel.tokens_per_step = 1
        with client.generate("neighbour", max_tokens=120, stream=True) as neighbour:
            dialer = dial(world)
            dialer.socket.send(frame)
            error = expect(dialer, m.Error)
            assert (error.req, error.code) == (req, code)
            assert words in error.message.lower()  # libraries change their words
            dialer.send(generate(10, "still here", max_tokens=5))
            expect(dialer, m.Accepted)
            dialer.close()
            text = "".join(chunk.text for chunk in neighbour)
        assert text == echo("neighbour", 120)


@pytest.mark.parametrize("change", [{"schema_hash": "0" * 16}, {"protocol": 99}, {"role": "executor"}])
def test_a_wrong_hello_is_refused(world: GatewayWorld, change: dict[str, Any]) -> None:
    dialer: Dialer[Any] = Dialer(world.run_dir, "client", Schema(m.GatewayToClient))
    wait_until(lambda: dialer.send(msgspec.structs.replace(handshake.hello("client", "t"), **change)))
    error = dialer.expect(DEADLINE_S)
    assert isinstance(error, m.Error)
    expected = ErrorCode.PROTOCOL if "role" in change else ErrorCode.VERSION_MISMATCH
    assert (error.code, error.field) == (expected, next(iter(change)))
    dialer.close()


def test_before_hello_nothing_works(world: GatewayWorld) -> None:
    dialer: Dialer[Any] = Dialer(world.run_dir, "client", Schema(m.GatewayToClient))
    wait_until(lambda: dialer.send(generate(3)))
    error = dialer.expect(DEADLINE_S)
    assert (error.req, error.code, error.field) == (3, ErrorCode.PROTOCOL, "hello")
    dialer.close()


def test_each_socket_has_its_own_messages(world: GatewayWorld) -> None:
    dialer = dial(world, "client-control")
    dialer.send(generate(7))
    error = expect(dialer, m.Error)
    assert (error.req, error.code, error.field) == (7, ErrorCode.INVALID_REQUEST, "message")
    dialer.send(m.StatusGet(8))
    assert expect(dialer, m.StatusReply).req == 8
    assert world.kernel.seen == []
    dialer.close()


def test_two_models_are_told_apart() -> None:
    with GatewayWorld(model_info("one"), model_info("two", max_context=8)) as world, Client(world.path) as client:
        assert client.generate("abc", max_tokens=2).model == "one"
        assert client.generate("abc", model="two").usage.output_tokens == 5
        with pytest.raises(LlmosError, match="served are: one, two") as caught:
            client.generate("abc", model="three")
        assert caught.value.field == "model"
        assert client.tokenize("ab", model="two").pieces == ("a", "b")
