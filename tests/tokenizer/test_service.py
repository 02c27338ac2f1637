from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers as tiny

from llmos.codes import ErrorCode
from llmos.config import Config, ModelConfig
from llmos.errors import ModelError
from llmos.ports.endpoint import RunDir
from llmos.ports.memory import MemoryDialer, MemoryListener
from llmos.ports.sync import Dialer
from llmos.protocol import limits
from llmos.protocol.codec import Schema, unpack_i32
from llmos.protocol.messages import (
    ChatMessage,
    DecodeClose,
    Decoded,
    DecodedItem,
    DecodeItem,
    DecodeOpen,
    DecodeStep,
    Encode,
    Encoded,
    Error,
    GatewayToTokenizer,
    ModelInfoGet,
    ModelInfoList,
    TokenizerToGateway,
)
from llmos.protocol.params import Grammar
from llmos.services.tokenizer.models import load_model
from llmos.services.tokenizer.service import ROLES, TextService, load_models

ANSWERS = Schema(TokenizerToGateway)


class World:
    """A service and its gateways in one thread; `serve` runs until all encodings have answered."""

    def __init__(self, tmp_path: Path) -> None:
        good = tiny.model_dir(
            tmp_path / "good", tiny.byte_level(), tokenizer_config={"chat_template": "{{ messages[0].content }}"}
        )
        bare = tiny.model_dir(tmp_path / "bare")
        models = (
            ModelConfig("good", str(good)),
            ModelConfig("bare", str(bare)),
            ModelConfig("bad", str(tmp_path / "nowhere")),
        )
        self.table = load_models(Config(models=models))
        self.listener: MemoryListener[Any] = MemoryListener("text", Schema(GatewayToTokenizer), ROLES)
        self.service = TextService(self.table, self.listener.send, self.listener.core.forget)
        self.listener.core.on_greet = self.service.greeted

    def gateway(self, name: str = "gateway") -> MemoryDialer[Any]:
        dialer = self.listener.connect(ANSWERS)
        dialer.greet("gateway", name)
        return dialer

    def serve(self) -> None:
        async def work() -> None:
            while (found := self.listener.receive()) is not None:
                self.service.handle(*found)
            await asyncio.gather(*self.service._tasks)

        asyncio.run(work())

    def ask(self, gateway: MemoryDialer[Any], *messages: Any) -> list[Any]:
        for message in messages:
            gateway.send(message)
        self.serve()
        answers = []
        while (answer := gateway.receive()) is not None:
            answers.append(answer)
        return answers


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(tiny.byte_level().encode(text).ids)


def test_encode_text_messages_and_pieces(tmp_path: Path) -> None:
    world = World(tmp_path)
    gateway = world.gateway()
    text, chat, pieces = world.ask(
        gateway,
        Encode(1, "good", "The fox", None),
        Encode(2, "good", None, (ChatMessage("user", "The fox"),)),
        Encode(3, "good", "fox", None, pieces=True),
    )
    assert text.req == 1
    assert tuple(unpack_i32(text.token_ids)) == tuple(unpack_i32(chat.token_ids)) == ids_of("The fox")
    assert "".join(pieces.pieces) == "fox"


def test_text_that_continues_has_no_special_tokens_in_front(tmp_path: Path) -> None:
    world = World(tmp_path)
    path = tiny.model_dir(tmp_path / "bos", tiny.with_bos(tiny.byte_level()))
    world.table.add(load_model("bos", path))
    begin, short, long, empty = world.ask(
        world.gateway(),
        Encode(1, "bos", "fox", None),
        Encode(2, "bos", "fox", None, continues=True),
        Encode(3, "bos", "fox " * 1000, None, continues=True),
        Encode(4, "bos", "", None, continues=True),
    )
    assert tuple(unpack_i32(begin.token_ids)) == (0, *ids_of("fox"))
    assert tuple(unpack_i32(short.token_ids)) == ids_of("fox")
    by_req = {answer.req: tuple(unpack_i32(answer.token_ids)) for answer in (long, empty)}
    assert by_req == {3: ids_of("fox " * 1000), 4: ()}


def test_long_text_is_encoded_in_a_thread_and_short_ones_overtake_it(tmp_path: Path) -> None:
    world = World(tmp_path)
    long = "The quick brown fox " * 2000
    first, second = world.ask(world.gateway(), Encode(1, "good", long, None), Encode(2, "good", "x", None))
    assert (first.req, second.req) == (2, 1)
    assert tuple(unpack_i32(second.token_ids)) == ids_of(long)


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (Encode(9, "none", "x", None), ErrorCode.NOT_FOUND, "model"),
        (Encode(9, "bad", "x", None), ErrorCode.MODEL, "path"),
        (Encode(9, "bare", "x", None), ErrorCode.INVALID_REQUEST, "text"),
        (Encode(9, "bare", "x" * 9000, None), ErrorCode.INVALID_REQUEST, "text"),
        (Encode(9, "bare", None, (ChatMessage("user", "x"),)), ErrorCode.INVALID_REQUEST, "messages"),
        (Encode(9, "good", None, None), ErrorCode.INVALID_REQUEST, "text"),
        (Encode(9, "good", "x", (ChatMessage("user", "x"),)), ErrorCode.INVALID_REQUEST, "text"),
        (Encode(9, "good", None, ()), ErrorCode.INVALID_REQUEST, "messages"),
        (Encode(9, "good", None, (ChatMessage("boss", "x"),)), ErrorCode.INVALID_REQUEST, "messages"),
        (Encode(9, "good", "é" * (limits.MAX_PROMPT_BYTES // 2 + 1), None), ErrorCode.INVALID_REQUEST, "text"),
        (Encode(9, "good", None, (ChatMessage("user", "x"),) * 1025), ErrorCode.INVALID_REQUEST, "messages"),
        (Encode(9, "good", None, (ChatMessage("user", "x" * 2**21),) * 2), ErrorCode.INVALID_REQUEST, "messages"),
        (Encode(9, "good", "é" * (limits.MAX_PROMPT_BYTES // 2), None), ErrorCode.CONTEXT_TOO_LONG, "text"),
    ],
    ids=lambda value: None,
)
def test_refusals_name_the_field_and_answer_the_request(
    tmp_path: Path, request_: Any, code: ErrorCode, field: str
) -> None:
    world = World(tmp_path)
    gateway = world.gateway()
    answer, after = sorted(world.ask(gateway, request_, Encode(10, "good", "ok", None)), key=lambda found: found.req)
    assert isinstance(answer, Error)
    assert (answer.req, answer.code, answer.field) == (9, code, field)
    assert isinstance(after, Encoded)


def test_model_info_lists_what_can_be_served(tmp_path: Path) -> None:
    world = World(tmp_path)
    (answer,) = world.ask(world.gateway(), ModelInfoGet(4))
    assert isinstance(answer, ModelInfoList)
    assert [(info.model, info.has_chat_template, info.vocab_size) for info in answer.models] == [
        ("good", True, 512),
        ("bare", False, 512),
    ]
    assert world.table.describe() == (
        "good: vocab 512, chat template; bare: vocab 512, no tokenizer (token ids only); bad: failed"
    )


def test_streams_of_one_step_are_answered_together_in_order(tmp_path: Path) -> None:
    world = World(tmp_path)
    gateway = world.gateway()
    party = ids_of("🎉")
    items = (
        DecodeItem(7, ids_of("fox"), False),
        DecodeItem(8, party[:2], False),
        DecodeItem(9, ids_of("ab") + ids_of("XY") + ids_of("zz"), False),
        DecodeItem(10, (1, 2), True),
    )
    answers = world.ask(
        gateway,
        DecodeOpen(7, "good", ()),
        DecodeOpen(8, "good", ()),
        DecodeOpen(9, "good", ("XY",)),
        DecodeOpen(10, "bare", ("XY",)),
        DecodeStep(items),
        DecodeStep((DecodeItem(8, party[2:], True), DecodeItem(7, (), True))),
    )
    used = len(ids_of("ab") + ids_of("XY"))
    assert answers == [
        Decoded(
            (
                DecodedItem(7, "fox", len(ids_of("fox"))),
                DecodedItem(8, "", 2),
                DecodedItem(9, "ab", used, "XY"),
                DecodedItem(10, "", 2, None, True),
            )
        ),
        Decoded((DecodedItem(8, "🎉", len(party) - 2, None, True), DecodedItem(7, "", 0, None, True))),
    ]


def test_tokens_that_arrive_after_a_stop_string_do_not_count(tmp_path: Path) -> None:
    world = World(tmp_path)
    gateway = world.gateway()
    step = DecodeStep((DecodeItem(1, ids_of("x"), False),))
    last = DecodeStep((DecodeItem(1, (), True),))
    answers = world.ask(gateway, DecodeOpen(1, "good", ("x",)), step, step, last)
    assert [answer.items[0] for answer in answers] == [
        DecodedItem(1, "", 1, "x"),
        DecodedItem(1, "", 0),
        DecodedItem(1, "", 0, None, True),
    ]
    world.ask(gateway, DecodeClose(1))
    (gone,) = world.ask(gateway, step)
    assert gone.code == ErrorCode.NOT_FOUND


def test_an_unknown_stream_is_an_error_and_the_others_are_served(tmp_path: Path) -> None:
    world = World(tmp_path)
    step = DecodeStep((DecodeItem(5, (1,), False), DecodeItem(1, ids_of("fox"), False)))
    error, decoded = world.ask(world.gateway(), DecodeOpen(1, "good", ()), step)
    assert (error.req, error.code, error.field) == (5, ErrorCode.NOT_FOUND, "stream")
    assert decoded.items[0].text == "fox"


@pytest.mark.parametrize(
    ("message", "code", "field"),
    [
        (DecodeOpen(1, "good", ()), ErrorCode.INVALID_REQUEST, "stream"),
        (DecodeOpen(2, "none", ()), ErrorCode.NOT_FOUND, "model"),
        (DecodeOpen(2, "good", ("",)), ErrorCode.INVALID_REQUEST, "stop"),
        (DecodeOpen(2, "good", ("x",) * (limits.MAX_STOP_STRINGS + 1)), ErrorCode.INVALID_REQUEST, "stop"),
    ],
)
def test_streams_that_can_not_be_opened(tmp_path: Path, message: DecodeOpen, code: ErrorCode, field: str) -> None:
    world = World(tmp_path)
    (answer,) = world.ask(world.gateway(), DecodeOpen(1, "good", ()), message)
    assert (answer.req, answer.code, answer.field) == (message.stream, code, field)


def test_a_gateway_that_greets_anew_has_no_streams_and_others_keep_theirs(tmp_path: Path) -> None:
    world = World(tmp_path)
    old, other = world.gateway("z"), world.gateway("h")
    step = DecodeStep((DecodeItem(1, ids_of("fox"), False),))
    assert world.ask(old, DecodeOpen(1, "good", ()), step)[0].items[0].text == "fox"
    world.ask(other, DecodeOpen(1, "good", ()))
    new = world.gateway("z")
    (answer,) = world.ask(new, step)
    assert answer.code == ErrorCode.NOT_FOUND
    assert world.ask(other, step)[0].items[0].text == "fox"
    assert len(world.listener.core.peers) == 2  # the old connection was forgotten
    (refused,) = world.ask(old, step)
    assert refused.field == "hello"


def test_nothing_to_serve_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        load_models(Config(models=(ModelConfig("bad", str(tmp_path / "nowhere")),)))


@pytest.mark.slow
def test_the_process_serves_while_it_encodes_a_long_prompt(tmp_path: Path) -> None:
    path = tiny.model_dir(tmp_path / "model", tiny.byte_level())
    config = tmp_path / "llmosd.toml"
    config.write_text(f'[[models]]\nname = "m"\npath = "{path}"\n')
    with tempfile.TemporaryDirectory(prefix="llt-") as folder:
        arguments = ["--run-dir", folder, "--config", str(config), "--name", "tokenizer", "--no-supervisor"]
        command = [sys.executable, "-P", "-m", "llmos.services.tokenizer", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready tokenizer\n"
            _check_live(Dialer(RunDir(folder), "text", ANSWERS))
            loaded = Path(f"/proc/{process.pid}/maps").read_text()
            assert "torch" not in loaded
            process.terminate()
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
        assert (process.returncode, errors) == (0, "")


def _check_live(dialer: Dialer[Any]) -> None:
    try:
        dialer.greet("gateway", "gateway", 10)
        long = "The quick brown fox 你好 " * 100_000
        dialer.send(Encode(1, "m", long, None))
        dialer.send(DecodeOpen(1, "m", ()))
        steps, slowest = 0, 0.0
        while True:
            started = time.monotonic()
            dialer.send(DecodeStep((DecodeItem(1, (300,), False),)))
            answer = dialer.expect(60)
            if isinstance(answer, Encoded):
                break
            assert isinstance(answer, Decoded)
            steps, slowest = steps + 1, max(slowest, time.monotonic() - started)
        assert steps > 20  # a blocked loop would answer the prompt first
        assert len(answer.token_ids) % 4 == 0
        assert len(answer.token_ids) > 4 * 500_000
    finally:
        dialer.close()


def test_a_grammar_is_compiled_beside_a_text_or_alone(tmp_path: Path) -> None:
    world = World(tmp_path)
    choice = Grammar("choice", '["a", "b"]')
    both, alone, ids_only, refused, none = sorted(
        world.ask(
            world.gateway(),
            Encode(1, "good", "fox", None, grammar=choice),
            Encode(2, "good", None, None, grammar=choice),
            Encode(3, "good", "fox", None),
            Encode(4, "good", "fox", None, grammar=Grammar("json_schema", '{"not": {}}')),
            Encode(5, "bare", None, None, grammar=choice),
        ),
        key=lambda answer: answer.req,
    )
    made = Grammar("lark", 'start: "a" | "b"\n')
    assert (tuple(unpack_i32(both.token_ids)), both.grammar) == (ids_of("fox"), made)
    assert (alone.token_ids, alone.grammar) == (b"", made)
    assert ids_only.grammar is None
    for answer in (refused, none):
        assert isinstance(answer, Error)
        assert (answer.code, answer.field) == (ErrorCode.INVALID_REQUEST, "grammar")
    infos = {info.model: info.has_grammar for info in world.table.infos()}
    assert infos == {"good": True, "bare": False}


def test_a_fake_model_has_no_grammars(tmp_path: Path) -> None:
    assert not load_model("m", tiny.model_dir(tmp_path, tiny.byte_level()), fake=True).info.has_grammar
