"""Every number and every text that a client may send, at the edge of what is allowed and beyond it (T14): the last good value passes, the
next one is refused by the field's name, and the microkernel never sees it.

The table must name each field of each message that clients send; a new field without an entry fails `test_every_field_has_an_entry`.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from gateway_world import model_info
from router_world import World

from llmos.errors import LlmosError, ProtocolError
from llmos.keys.roles import Role
from llmos.protocol import handshake, limits
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, encode, pack_i32
from llmos.protocol.params import Grammar, SamplingParams
from llmos.services.gateway.control import ControlRelay
from llmos.services.gateway.owners import Asker

SCHEMA: Schema[Any] = Schema(m.ClientToGateway, max_bytes=limits.MAX_CLIENT_MESSAGE_BYTES)
EXTREME: tuple[Any, ...] = (0, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**63))
NOT_FINITE = (math.nan, math.inf, -math.inf)
RID = 2**63 - 1


@dataclass(frozen=True)
class Number:
    low: float
    high: float
    is_float: bool = False
    may_be_nil: bool = False
    low_open: bool = False

    def values(self) -> Iterator[tuple[Any, bool]]:
        """(value, is it good)"""
        around: list[Any] = [self.low, self.high, self.low - 1, self.high + 1]
        if self.is_float:
            inside, outside = math.nextafter(self.high, -math.inf), math.nextafter(self.high, math.inf)
            around += [
                inside,
                outside,
                math.nextafter(self.low, -math.inf),
                math.nextafter(self.low, math.inf),
                *NOT_FINITE,
            ]
        for value in (*around, *EXTREME):
            if not (isinstance(value, int) and not -(2**63) <= value < 2**64):
                above = value > self.low if self.low_open else value >= self.low
                yield value, bool(above and value <= self.high)
        if not self.is_float:
            yield from ((value, False) for value in (*NOT_FINITE, 1.5))
        yield None, self.may_be_nil


@dataclass(frozen=True)
class Text:
    """Characters."""

    least: int
    most: int
    may_be_nil: bool = False

    def values(self) -> Iterator[tuple[Any, bool]]:
        for size in (self.least - 1, self.least, self.most, self.most + 1):
            if size >= 0:
                yield "a" * size, self.least <= size <= self.most
        yield 7, False
        yield None, self.may_be_nil


@dataclass(frozen=True)
class Given:
    """Neither ordered nor measured: each value with its verdict."""

    cases: tuple[tuple[Any, bool], ...]

    def values(self) -> Iterator[tuple[Any, bool]]:
        yield from self.cases


@dataclass(frozen=True)
class Ignored:
    """Overwritten or harmless whatever it is, as `why` says."""

    why: str

    def values(self) -> Iterator[tuple[Any, bool]]:
        yield from ()


REQ = Number(1, 2**63 - 1)
RIDS = Number(1, RID)
DEADLINE = Number(0, limits.MAX_DEADLINE_MS, is_float=True, may_be_nil=True, low_open=True)
OWNER = Ignored("gateways overwrite it")
MODEL = Given((("echo", True), ("", False), ("x", False), ("x" * 10_000, False), (1, False)))
OF_SEQUENCE = Given((*MODEL.cases, (None, False)))
PROMPT_BYTES = limits.MAX_PROMPT_BYTES
TEXT = Given(
    (
        ("a", True),
        ("a" * PROMPT_BYTES, True),
        ("a" * (PROMPT_BYTES + 1), False),
        ("é" * (PROMPT_BYTES // 2 + 1), False),
        (1, False),
    )
)
IDS = Given(
    ((pack_i32([1]), True), (pack_i32([255]), True), (pack_i32([256]), False), (pack_i32([-1]), False), (pack_i32([2**31 - 1]), False),
     (b"\1\0\0", False), (pack_i32([1] * 511), True), (pack_i32([1] * 512), False), (bytes(4 * (limits.MAX_PROMPT_TOKENS + 1)), False))
)  # fmt: skip
ANY_IDS = Given(
    ((b"", True), (pack_i32([255]), True), (pack_i32([256]), False), (pack_i32([-1]), False), (b"\1\0\0", False),
     (pack_i32([1] * 512), True), (bytes(4 * (limits.MAX_PROMPT_TOKENS + 1)), False))
)  # fmt: skip
CHAT = Given(
    (((m.ChatMessage("user", "a"),), True), ((m.ChatMessage("user", "a"),) * limits.MAX_CHAT_MESSAGES, True),
     ((m.ChatMessage("user", "a"),) * (limits.MAX_CHAT_MESSAGES + 1), False), ((), False),
     ((m.ChatMessage("u" * 4, "a" * (PROMPT_BYTES - 4)),), True), ((m.ChatMessage("u" * 4, "a" * (PROMPT_BYTES - 3)),), False),
     ((m.ChatMessage("a" * (PROMPT_BYTES + 1), ""),), False))
)  # fmt: skip
AFTER = Given(
    (((), True), ((1,), True), ((RID,), True), (tuple(range(1, limits.MAX_AFTER + 1)), True),
     (tuple(range(1, limits.MAX_AFTER + 2)), False),
     ((0,), False), ((-1,), False), ((RID + 1,), False), ((1, 1), False), (("x",), False))
)  # fmt: skip
NICE = Number(limits.MIN_NICE, limits.MAX_NICE)
KEY = Text(1, limits.MAX_REQUEST_ID_CHARS, may_be_nil=True)
PARENT = Number(1, RID, may_be_nil=True)
COUNT = Number(0, limits.UNLIMITED, may_be_nil=True)
PARAMS = Ignored("its fields have entries of their own")
NEITHER = Ignored("a plain flag")
MANY_BYTES = "a" * (limits.MAX_TOOLS_BYTES - 1)
TOOLS = Given(
    (((), True), ((m.Tool("f"),), True), ((m.Tool("a" * limits.MAX_TOOL_NAME_CHARS),), True),
     ((m.Tool("a" * (limits.MAX_TOOL_NAME_CHARS + 1)),), False), ((m.Tool(""),), False), ((m.Tool("a b"),), False),
     ((m.Tool("f"), m.Tool("f")), False), (tuple(m.Tool(f"f{n}") for n in range(limits.MAX_TOOLS)), True),
     (tuple(m.Tool(f"f{n}") for n in range(limits.MAX_TOOLS + 1)), False), ((m.Tool("f", MANY_BYTES),), True),
     ((m.Tool("f", MANY_BYTES + "a"),), False), ((m.Tool("f", None, "{}"),), True), ((m.Tool("f", None, "{"),), False),
     ((m.Tool("f", None, "[]"),), False), ((m.Tool("f", None, '{"type": "string"}'),), False))
)  # fmt: skip
CHOICE = Given((("auto", True), ("none", True), ("required", False), ("function:f", False), ("x", False), ("", False)))
TABLE: dict[type, dict[str, Any]] = {
    m.Generate: {
        "req": REQ, "model": MODEL, "text": TEXT, "token_ids": IDS, "messages": CHAT, "params": PARAMS, "client_request_id": KEY,
        "nice": NICE, "deadline_ms": DEADLINE, "parent": PARENT, "after": AFTER, "again": NEITHER, "tools": TOOLS, "tool_choice": CHOICE,
        "parallel_tool_calls": NEITHER,
    },
    m.Spawn: {
        "req": REQ, "model": MODEL, "text": TEXT, "token_ids": IDS, "messages": CHAT, "nice": NICE, "parent": PARENT, "after": AFTER,
        "client_request_id": KEY,
    },
    m.Append: {"req": REQ, "rid": RIDS, "model": OF_SEQUENCE, "text": TEXT, "token_ids": IDS},
    m.Continue: {"req": REQ, "rid": RIDS, "model": OF_SEQUENCE, "params": PARAMS, "deadline_ms": DEADLINE},
    m.Attach: {"req": REQ, "rid": RIDS, "offset": Number(0, 2**63 - 1)},
    m.Embed: dict.fromkeys(m.Embed.__struct_fields__, Ignored("needs an encoder: test_encodings.py")),
    m.Detokenize: {"req": REQ, "model": MODEL, "token_ids": ANY_IDS},
    m.Tokenize: {"req": REQ, "model": MODEL, "text": TEXT, "messages": CHAT, "tools": TOOLS},
    m.Ack: {"req": Ignored("of nobody: dropped"), "upto": Ignored("at most what was sent counts")},
    m.Cancel: {"req": Ignored("of nobody: dropped")},
    m.Hello: {
        "protocol": Ignored("one value is good"), "schema_hash": Ignored("one value is good"), "role": Ignored("one value is good"),
        "name": Text(0, limits.MAX_PEER_NAME_CHARS), "pid": Number(0, 2**31 - 1),
    },
    m.PsGet: {"req": REQ, "owner": OWNER},
    m.Kill: {
        "req": REQ, "rid": Number(1, RID), "owner": OWNER, "tenant": Ignored("below"), "job": Ignored("below"), "model": Ignored("below"),
    },
    m.StatusGet: {"req": REQ},
    m.MeasuresGet: {"req": REQ},
    m.ModelsGet: {"req": REQ},
    m.Nice: {"req": REQ, "rid": RIDS, "nice": NICE, "owner": OWNER},
    m.Suspend: {"req": REQ, "rid": RIDS, "pages": Number(0, 2), "owner": OWNER},
    m.TenantsGet: {"req": REQ, "owner": OWNER},
    m.TenantSet: {
        "req": REQ, "tenant": Text(1, limits.MAX_TENANT_NAME_CHARS),
        "weight": Number(0, limits.MAX_TENANT_WEIGHT, is_float=True, may_be_nil=True, low_open=True), "max_pages": COUNT,
        "guaranteed_pages": COUNT, "max_running": COUNT, "max_waiting": COUNT,
        "tokens_per_s": Number(0, limits.MAX_TENANT_TOKENS_PER_S, is_float=True, may_be_nil=True),
    },
    m.Fork: {"req": REQ, "rid": RIDS, "count": Number(1, limits.MAX_FORKS), "owner": OWNER},
    m.Deadline: {"req": REQ, "rid": RIDS, "deadline_ms": DEADLINE, "owner": OWNER},
    m.After: {"req": REQ, "rid": RIDS, "after": AFTER, "owner": OWNER},
    m.RecordWrite: {"req": REQ},
    m.RestartService: {"req": REQ, "name": Text(1, limits.MAX_SERVICE_NAME_CHARS)},
    **{kind: {"req": REQ, "rid": RIDS, "owner": OWNER} for kind in (m.Resume, m.Explain, m.Wait, m.Stat, m.Close)},
}  # fmt: skip
SAMPLING: dict[str, Any] = {
    "temperature": Number(0, limits.MAX_TEMPERATURE, is_float=True, may_be_nil=True),
    "top_k": Number(0, 2**31 - 1, may_be_nil=True),
    "top_p": Number(0, 1, is_float=True, may_be_nil=True, low_open=True),
    "min_p": Number(0, 1, is_float=True, may_be_nil=True),
    "repetition_penalty": Number(0, limits.MAX_REPETITION_PENALTY, is_float=True, may_be_nil=True, low_open=True),
    "presence_penalty": Number(-limits.MAX_PENALTY_ABS, limits.MAX_PENALTY_ABS, is_float=True),
    "frequency_penalty": Number(-limits.MAX_PENALTY_ABS, limits.MAX_PENALTY_ABS, is_float=True),
    "logit_bias": Given(
        (((), True), (((255, 1.0),), True), (((256, 1.0),), False), (((-1, 1.0),), False), (((1, limits.MAX_LOGIT_BIAS_ABS),), True),
         (((1, 1.0001e4),), False), (((1, -1.0001e4),), False), *((((1, value),), False) for value in NOT_FINITE),
         (((1, 0.0),) * limits.MAX_LOGIT_BIAS, True), (((1, 0.0),) * (limits.MAX_LOGIT_BIAS + 1), False))
    ),
    "seed": Number(0, 2**63 - 1, may_be_nil=True),
    "max_tokens": Number(1, limits.MAX_TOKENS, may_be_nil=True),
    "min_tokens": Number(0, limits.MAX_TOKENS),
    "stop": Given(
        ((("a" * limits.MAX_STOP_STRING_CHARS,), True), (("a" * (limits.MAX_STOP_STRING_CHARS + 1),), False), (("",), False),
         (("a",) * limits.MAX_STOP_STRINGS, True), (("a",) * (limits.MAX_STOP_STRINGS + 1), False))
    ),
    "stop_token_ids": Given(
        (((255,), True), ((256,), False), ((-1,), False), ((2**63,), False), ((1,) * limits.MAX_STOP_TOKEN_IDS, True),
         ((1,) * (limits.MAX_STOP_TOKEN_IDS + 1), False))
    ),
    "ignore_eos": NEITHER,
    "logprobs": Number(0, limits.MAX_LOGPROBS, may_be_nil=True),
    "prompt_logprobs": Number(0, limits.MAX_LOGPROBS, may_be_nil=True),
    "grammar": Given(
        ((None, True), (Grammar("regex", "a" * limits.MAX_REGEX_BYTES), True),
         (Grammar("regex", "a" * (limits.MAX_REGEX_BYTES + 1)), False),
         (Grammar("lark", "a" * limits.MAX_GRAMMAR_BYTES), True), (Grammar("lark", "a" * (limits.MAX_GRAMMAR_BYTES + 1)), False),
         (Grammar("choice", "é" * (limits.MAX_GRAMMAR_BYTES // 2 + 1)), False), (Grammar("other", ""), False), (7, False))
    ),
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "req": 1, "model": "echo", "text": None, "token_ids": None, "messages": None, "params": SamplingParams(), "rid": 1, "count": 1,
    "upto": 1, "protocol": 1, "schema_hash": "", "role": "client", "name": "gateway", "pid": 1, "nice": 0, "deadline_ms": None, "after": (),
    "tenant": None, "owner": None, "parent": None, "client_request_id": None, "offset": 0, "pages": 1, "again": False,
    "tools": (), "tool_choice": "auto", "parallel_tool_calls": True,
}  # fmt: skip
PROMPTED = (m.Generate, m.Append, m.Tokenize)
FIELDS = [(kind, name) for kind, fields in TABLE.items() for name in fields]


def message(kind: type, name: str, value: Any) -> Any:
    fields = {each.name: PLAIN.get(each.name) for each in msgspec.structs.fields(kind)}
    if name == "tools":
        fields["messages"] = (m.ChatMessage("user", "hi"),)
    elif kind in PROMPTED and name not in ("text", "token_ids", "messages"):
        fields["text"] = "hi"
    if kind is m.Detokenize:
        fields["token_ids"] = b""
    if kind is m.TenantSet:
        fields["tenant"] = "eve"
    if kind is m.Kill:
        fields["model"] = None
    if kind is m.Hello:
        fields |= {"protocol": handshake.PROTOCOL_VERSION, "schema_hash": handshake.SCHEMA_HASH}
    return kind(**(fields | {name: value}))


def refusal(request: Any) -> tuple[LlmosError | m.Error | None, list[m.Message]]:
    """How it is refused, and what the microkernel or the tokenizer was asked for."""
    try:
        decoded = SCHEMA.decode(encode(request))
    except ProtocolError as error:
        return error, []
    if isinstance(decoded, m.Hello):
        try:
            handshake.check_hello(decoded, frozenset({"client"}))
        except LlmosError as error:
            return error, []
        return None, []
    replies: list[m.Message] = []
    if isinstance(decoded, m.ControlVerb):
        asked: list[m.Message] = []
        relay = ControlRelay(lambda verb: asked.append(verb) or True, lambda _, reply: replies.append(reply), 8)
        relay.ask(Asker(b"root", "root", Role.ADMIN), decoded, 0.0)
    else:
        world = World()
        world.router.models = {"echo": model_info(eos_token_ids=())}
        world.client(b"a", decoded)
        replies, asked = world.listener.sent.get(b"a", []), world.kernel + world.text
    errors = [reply for reply in replies if isinstance(reply, m.Error)]
    return errors[0] if errors else None, asked


def check(request: Any, field: str, is_good: bool) -> None:
    refused, asked = refusal(request)
    if is_good:
        assert refused is None, refused
        assert asked or isinstance(request, m.Hello)
        return
    assert refused is not None, f"accepted, asked {asked}"
    assert asked == []
    prompt = {"text": "prompt", "token_ids": "prompt", "messages": "prompt"}
    named = (refused.field or "").removeprefix("params.").partition("[")[0]
    assert named in (field, prompt.get(field)), refused


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{kind.__name__}.{name}" for kind, name in FIELDS])
def test_a_field_of_a_message(kind: type, name: str) -> None:
    for value, is_good in TABLE[kind][name].values():
        check(message(kind, name, value), name, is_good)


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("kind", [m.Generate, m.Continue])
def test_a_field_of_sampling_parameters(kind: type, name: str) -> None:
    for value, is_good in SAMPLING[name].values():
        if name == "logprobs" and value is None and not is_good:
            continue
        params = SamplingParams(**({"stop_token_ids": (1,)} if name == "grammar" else {}) | {name: value})
        check(message(kind, "params", params), name, is_good)


@pytest.mark.parametrize(
    ("field", "limit"),
    [("tenant", Text(1, limits.MAX_TENANT_NAME_CHARS)), ("job", RIDS), ("model", Text(1, limits.MAX_MODEL_NAME_CHARS))],
)
def test_a_selector_of_kill(field: str, limit: Any) -> None:
    for value, is_good in limit.values():
        if value is not None:
            check(m.Kill(1, None, **{field: value}), field, is_good)


def test_every_field_has_an_entry() -> None:
    kinds = set(typing.get_args(m.ClientToGateway))
    assert set(TABLE) == kinds
    for kind in kinds:
        assert set(TABLE[kind]) == set(kind.__struct_fields__), kind
    assert set(SAMPLING) == set(SamplingParams.__struct_fields__)


def test_acknowledgements_beyond_all_reason_stay_here() -> None:
    world = World()
    world.stream()
    asked = len(world.kernel)
    for extreme in EXTREME:
        world.client(b"a", m.Ack(1, extreme))
        world.client(b"a", m.Ack(extreme, 1))
        world.client(b"a", m.Cancel(extreme))
    assert len(world.kernel) == asked  # nothing was sent to the client yet, so nothing was read
    assert world.errors() == []
