"""Grammars through the whole daemon on the demonstration model: generated schemas, bombs, tools, and kill -9 in the middle."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from daemon import Daemon, running, wait_until
from demo_grammars import DEMO

from llmos import Client, InvalidRequest
from llmos.client.aio import AsyncClient

sys.path.append(str(Path(__file__).parents[2] / "bench"))
from structured import run_schemas

pytestmark = pytest.mark.slow
SHARE = 50
TEMPLATE = """\
{%- if tools %}{{- '<|system|>' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|end|>' }}{%- endif %}
{%- for message in messages %}{{- '<|' + message.role + '|>' + message.content + '<|end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}{# calls: <tool_call> #}
"""
LONG = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9999}},
        "required": ["n"],
    },
    "minItems": 20,
    "maxItems": 20,
}
LONG["items"]["additionalProperties"] = False
SAMPLING = {"temperature": 1.0, "seed": 11, "max_tokens": 400}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The demonstration model, once as it is and once with a chat template that knows tools."""
    tooled = tmp_path_factory.mktemp("tooled") / "model"
    tooled.mkdir()
    for file in DEMO.iterdir():
        if file.name != "chat_template.jinja":
            (tooled / file.name).symlink_to(file)
    (tooled / "chat_template.jinja").write_text(TEMPLATE)
    models = "".join(
        f'[[models]]\nname = "{name}"\npath = "{path}"\nthreads = 1\nnum_pages = 512\n'
        for name, path in (("demo", DEMO), ("tooled", tooled))
    )
    with running(models) as found:
        yield found


def test_a_share_of_the_generated_schemas(daemon: Daemon) -> None:
    """bench/structured.py runs 1,000 of them."""

    async def run():
        async with AsyncClient(daemon.run_dir) as client:
            return await run_schemas(client, range(SHARE), 200)

    tally = asyncio.run(run())
    assert tally.wrong == []
    assert tally.finished.total() >= SHARE // 2
    assert all(tally.finished[level] for level in range(1, 6))


def test_kill_9_of_the_executor_in_the_middle_changes_nothing(daemon: Daemon) -> None:
    with Client(daemon.run_dir) as client:
        expected = client.generate("Numbers:", json_schema=LONG, **SAMPLING)
        assert expected.finish_reason == "stop"
        jsonschema.validate(json.loads(expected.text), LONG)
        for name in ("executor.demo", "tokenizer"):
            victim = daemon.children()[name]
            got: list[int] = []
            with client.generate("Numbers:", json_schema=LONG, stream=True, **SAMPLING) as stream:
                for chunk in stream:
                    got += chunk.token_ids
                    if victim is not None and len(got) > len(expected.token_ids) // 3:
                        victim.send_signal(signal.SIGKILL)
                        victim = None
                assert victim is None
                assert (stream.completion.text, tuple(got)) == (expected.text, expected.token_ids)
            wait_until(lambda name=name: name in daemon.children(), f"{name} is there again")


def test_an_open_sequence_has_a_grammar_for_each_turn_and_forks_follow_their_own(daemon: Daemon) -> None:
    with Client(daemon.run_dir) as client, client.spawn("The fox is ") as seq:
        assert seq.generate(choice=["red", "blue"], max_tokens=9).text in ("red", "blue")
        seq.append(" and its number is ")
        kids = seq.fork(3)
        numbers = [kid.generate(regex="[0-9]{3}", temperature=2.0, max_tokens=9, min_tokens=8).text for kid in kids]
        assert all(len(number) == 3 and number.isdigit() for number in numbers)
        assert seq.generate(max_tokens=4, temperature=0.0).text


def test_bombs_are_refused_and_harm_nobody(daemon: Daemon) -> None:
    bombs = [
        {"regex": "(a{1000}){1000}"},
        {"regex": ""},
        {"json_schema": '{"type":"array","items":' * 500 + "{}" + "}" * 500},
        {"json_schema": {"enum": list(range(5000))}},
        {"json_schema": {"type": "array", "uniqueItems": True}},
        {"grammar": "start: B\nA: /a/{1000}\nB: A{1000}"},
    ]
    before = {name: process.pid for name, process in daemon.children().items()}
    with Client(daemon.run_dir) as client:
        for bomb in bombs:
            with pytest.raises(InvalidRequest) as caught:
                client.generate("x", **bomb)
            assert caught.value.field == "grammar"
        assert client.generate("x", choice=["ok"], max_tokens=5).text == "ok"
    assert {name: process.pid for name, process in daemon.children().items()} == before


def test_a_forced_call_comes_back_as_a_call(daemon: Daemon) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": schema}}]
    chat = [{"role": "user", "content": "How warm is it in Rome?"}]
    with Client(daemon.run_dir) as client:
        answer = client.generate(chat, model="tooled", tools=tools, tool_choice="function:weather", max_tokens=60)
        (call,) = answer.tool_calls
        assert call.name == "weather"
        jsonschema.validate(json.loads(call.arguments), schema)
        assert answer.content == ""
        free = client.generate(chat, model="tooled", tools=tools, max_tokens=8)
        assert free.tool_calls == ()
        assert free.content == free.text
        with pytest.raises(InvalidRequest, match="demo knows none") as caught:
            client.generate(chat, tools=tools)
        assert caught.value.field == "tools"
