from __future__ import annotations

import random
import typing
from typing import Any

import msgspec
import pytest
import spec_text
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.errors import ProtocolError
from llmos.protocol import codec, limits, messages
from llmos.protocol.codec import Schema, encode, pack_i32, request_id, unpack_i32
from llmos.protocol.params import SamplingParams

MESSAGES = spec_text.structs(messages.Message)
EVERYTHING: Schema[Any] = Schema(typing.Union[tuple(MESSAGES)])  # noqa: UP007  (made at run time)
UNIONS = [
    "ClientToGateway", "GatewayToClient", "GatewayToTokenizer", "TokenizerToGateway", "ToKernel", "FromKernel", "ToSupervisor",
    "FromSupervisor",
]  # fmt: skip

GENERATE = messages.Generate(1, "m", "hi", None, None, SamplingParams())
BUILTIN = msgspec.msgpack.decode(encode(GENERATE))


def plain(*changes: tuple[int, Any]) -> list[Any]:
    """A good Generate as a plain array, with some places changed."""
    values = list(BUILTIN)
    for place, value in changes:
        values[place] = value
    return values


def with_params(place: int, value: Any) -> list[Any]:
    params = list(BUILTIN[6])
    params[place] = value
    return plain((6, params))


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_message_comes_back_as_it_was(cls: Any, data: st.DataObject) -> None:
    message = data.draw(st.builds(cls, **{field.name: _strategy(field.type) for field in msgspec.structs.fields(cls)}))
    assert EVERYTHING.decode(encode(message)) == message
    frame = encode(message)
    if "req" in cls.__struct_fields__:
        assert request_id(frame) == message.req
    for cut in {0, 1, len(frame) // 2, len(frame) - 1} - {len(frame)}:
        with pytest.raises(ProtocolError):
            EVERYTHING.decode(frame[:cut])
    with pytest.raises(ProtocolError):
        EVERYTHING.decode(frame + b"\x00")


def _strategy(kind: Any) -> st.SearchStrategy[Any]:
    args = typing.get_args(kind)
    if type(None) in args:
        return st.none() | _strategy(next(arg for arg in args if arg is not type(None)))
    if Ellipsis in args:
        return st.lists(_strategy(args[0]), max_size=3).map(tuple)
    if args:
        return st.tuples(*map(_strategy, args))
    if issubclass(kind, msgspec.Struct):
        return st.builds(kind, **{field.name: _strategy(field.type) for field in msgspec.structs.fields(kind)})
    plain_kinds: dict[type, st.SearchStrategy[Any]] = {
        int: st.integers(-(2**63), 2**63 - 1), float: st.floats(allow_nan=False), str: st.text(max_size=8), bool: st.booleans(),
        bytes: st.binary(max_size=8),
    }  # fmt: skip
    return plain_kinds[kind]


@pytest.mark.parametrize("name", UNIONS)
def test_each_port_takes_its_messages_and_no_others(name: str) -> None:
    union = getattr(messages, name)
    schema: Schema[Any] = Schema(union)
    accepted = set(typing.get_args(union))
    for cls in MESSAGES:
        frame = msgspec.msgpack.encode([spec_text.number_of(cls)])
        if cls in accepted:
            continue
        with pytest.raises(ProtocolError, match=f"message type {spec_text.number_of(cls)} is not accepted") as caught:
            schema.decode(frame)
        assert caught.value.field == "type"


def test_every_message_travels_on_some_port() -> None:
    assert {cls for name in UNIONS for cls in typing.get_args(getattr(messages, name))} == set(MESSAGES)


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        (plain()[:3], "text", "text: missing"),
        (plain()[:1], "req", "req: missing"),
        (plain((1, "x")), "req", "Expected `int`, got `str`"),
        (plain((1, 1.5)), "req", "got `float`"),
        (plain((1, 2**64 - 1), (2, 5)), "model", "Expected `str | null`, got `int`"),
        (plain((2, b"m")), "model", "got `bytes`"),
        (plain((5, [["user"]])), "messages[0].content", "missing"),
        (plain((5, [["user", "x"], ["user", 5]])), "messages[1].content", "Expected `str`, got `int`"),
        (plain((5, [["user", "x", "y"]])), "messages[0].tool_calls", "got `str`"),
        (plain((6, None)), "params", "Expected `array`"),
        (with_params(0, "hot"), "params.temperature", "Expected `float | null`, got `str`"),
        (with_params(7, [[1, "x"]]), "params.logit_bias[0][1]", "Expected `float`, got `str`"),
        (with_params(7, [[1]]), "params.logit_bias[0]", "length 2, got 1"),
        (with_params(11, [1]), "params.stop[0]", "Expected `str`, got `int`"),
        (with_params(13, 1), "params.ignore_eos", "Expected `bool`, got `int`"),
        ([*plain(), 1], None, "at most length"),
        ([10], "req", "missing"),
        ([99], "type", "message type 99 is not accepted on this port"),
        ([-1], "type", "message type -1 is not accepted on this port"),
        (["x"], "type", "Expected `int`, got `str`"),
        ([], None, "at least length 1"),
        (5, None, "Expected `array`, got `int`"),
        ({"type": 10}, None, "Expected `array`, got `object`"),
        (None, None, "Expected `array`, got"),
    ],
)
def test_a_wrong_field_is_named_in_words(values: Any, field: str | None, words: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        Schema(messages.ClientToGateway).decode(msgspec.msgpack.encode(values))
    assert caught.value.field == field
    assert words in caught.value.message
    if field and field != "type":
        assert f"(Generate): {field}: " in caught.value.message


@pytest.mark.parametrize(
    "frame",
    [
        b"", b"\xc1", b"\x92\x0e", b"\xdd\xff\xff\xff\xff\x0a", b"\xdc\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000, b"\x81" * 100_000, b"\x92\x0f\xa3\xff\xff\xff", b"\x92\x10\xc7\x04\x05abcd", b"\x92\x0f\xd6\xffabcd",
        encode(GENERATE).replace(b"hi", b"\xff\xfe"), b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04\x95", b"{}", bytes(1000),
    ],
)  # fmt: skip
def test_bytes_that_are_no_message(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        Schema(messages.ClientToGateway).decode(frame)
    assert request_id(frame) in (0, 1)  # the one with a readable header keeps its number


def test_nested_arrays_deeper_than_the_stack_are_refused() -> None:
    deep = b"\x97\x0a\x01\xc0\xc0\xc0" + b"\x91" * 200_000
    with pytest.raises(ProtocolError):
        Schema(messages.ClientToGateway).decode(deep)
    assert request_id(deep) == 0  # what follows the number could not be skipped


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_size_limit_comes_before_decoding(over: int) -> None:
    frame = encode(GENERATE)
    schema: Schema[Any] = Schema(messages.ClientToGateway, max_bytes=len(frame) - over)
    if over <= 0:
        assert schema.decode(frame) == GENERATE
        return
    with pytest.raises(
        ProtocolError, match=f"message of {len(frame)} bytes is over the limit of {len(frame) - 1}"
    ) as caught:
        schema.decode(frame)
    assert caught.value.field == "message"


def test_client_ports_take_less_than_the_others() -> None:
    assert Schema(messages.ToKernel).max_bytes == limits.MAX_MESSAGE_BYTES == 16 * 2**20
    assert limits.MAX_CLIENT_MESSAGE_BYTES == 10 * 2**20


@pytest.mark.parametrize("seed", range(4))
def test_mutated_frames_decode_or_are_protocol_errors(seed: int) -> None:
    rng = random.Random(seed)
    good = [encode(spec_text.read_example(text)) for text, _ in spec_text.examples(spec_text.PAGE.read_text())]
    refused = 0
    for _ in range(3000):
        frame = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(frame))
            change = rng.randrange(4)
            if change == 0:
                frame[at] = rng.randrange(256)
            elif change == 1:
                del frame[at:]
                frame.append(rng.randrange(256))
            elif change == 2:
                frame[at:at] = rng.randbytes(rng.randint(1, 5))
            else:
                frame[at:at] = rng.choice(good)[:20]
        try:
            decoded = EVERYTHING.decode(bytes(frame))
        except ProtocolError:
            refused += 1
        else:
            assert EVERYTHING.decode(encode(decoded)) == decoded or "nan" in repr(decoded)
        assert isinstance(request_id(bytes(frame)), int)
    assert refused > 1500


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20))
def test_int32_blobs(values: list[int]) -> None:
    blob = pack_i32(values)
    assert len(blob) == 4 * len(values)
    assert list(unpack_i32(blob)) == values


def test_int32_blobs_are_little_endian_and_whole() -> None:
    assert pack_i32([1, -2]) == b"\x01\x00\x00\x00\xfe\xff\xff\xff"
    with pytest.raises(ProtocolError, match="5 bytes"):
        unpack_i32(b"12345")


def test_the_schema_hash_covers_numbers_fields_types_and_defaults() -> None:
    text = codec._describe(messages.Tokens)
    assert text.startswith("Tokens#12(req:")
    assert "logprobs:" in text
    assert text.endswith("=None)")
    assert len(codec.schema_hash()) == 16
    assert codec.schema_hash() == codec.SCHEMA_HASH
