"""`llmosctl batch`: files are checked before anything is sent, answers are appended once, interrupted runs go on."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from http_world import HttpWorld

from llmos.ctl.batch_file import Output, read_requests
from llmos.ctl.batch_run import LAST, BatchRun, Server
from llmos.errors import InvalidRequest, Unavailable

CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


def line(custom_id: str, body: object = CHAT, url: str = "/v1/chat/completions") -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{text}\n" for text in lines))
    return path


def run(requests: Path, answers: Path, server: Server, transport: httpx.AsyncBaseTransport | None = None) -> Output:
    output = Output(answers)
    try:
        asyncio.run(BatchRun(server, output, 4, lambda: None, transport).run(read_requests(requests)))
    finally:
        output.close()
    return output


def mocked(respond: Callable[[httpx.Request], httpx.Response]) -> tuple[Server, httpx.MockTransport]:
    return Server("http://x", "k", verify=True, give_up_s=1e6), httpx.MockTransport(respond)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "no JSON"),
        ("[]", "JSON object"),
        (line(""), "custom_id"),
        (json.dumps({"custom_id": "a", "url": "/v1/completions", "body": {}, "more": 1}), "unknown field 'more'"),
        (line("a", url="/v1/files"), "none of /v1/chat/completions"),
        (line("a", body=[]), "body"),
        (line("a", body={"stream": True}), "no streams"),
        (json.dumps({"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}}), "only POST"),
        (line("first"), "was there before"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, problem: str) -> None:
    requests = write(tmp_path / "in", line("first"), "", text)
    with pytest.raises(InvalidRequest, match=problem) as refusal:
        list(read_requests(requests))
    assert f"{requests}:3:" in refusal.value.message


def test_answers_of_a_real_worker(tmp_path: Path) -> None:
    requests = write(
        tmp_path / "in",
        *(line(f"chat-{number}") for number in range(20)),
        line("text", {"model": "echo", "prompt": "abc", "max_tokens": 6}, "/v1/completions"),
        line("wrong", CHAT | {"temperature": -1}),
    )
    with HttpWorld() as world:
        server = Server(world.url, world.admin.text, verify=True, give_up_s=60)
        output = run(requests, tmp_path / "out", server)
        again = run(requests, tmp_path / "out", server)
        assert {seq.nice for seq in world.kernel.ended.values()} == {LAST}
        assert len(world.kernel.ended) == 21
    answers = {
        entry["custom_id"]: entry["response"] for entry in map(json.loads, (tmp_path / "out").read_text().splitlines())
    }
    assert len(answers) == 22
    assert answers["chat-7"]["body"]["choices"][0]["message"]["content"] == "user"
    assert answers["text"]["body"]["choices"][0]["text"] == "abcabc"
    assert answers["wrong"]["status_code"] == 400
    assert answers["wrong"]["body"]["error"]["param"] == "temperature"
    assert (output.failed, again.failed) == (1, 1)


def test_an_interrupted_run_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    requests = write(tmp_path / "in", line("a"), line("b"), line("c"))
    asked: Counter[str] = Counter()

    def respond(request: httpx.Request) -> httpx.Response:
        asked[request.headers["idempotency-key"]] += 1
        return httpx.Response(200, json={"ok": True})

    run(requests, tmp_path / "out", *mocked(respond))
    whole = (tmp_path / "out").read_text()
    (tmp_path / "out").write_text(whole[:-10])  # killed while it wrote
    run(requests, tmp_path / "out", *mocked(respond))
    answers = [json.loads(text)["custom_id"] for text in (tmp_path / "out").read_text().splitlines()]
    assert sorted(answers) == ["a", "b", "c"]
    assert sorted(asked.values()) == [1, 1, 2]  # the same key again


def test_busy_and_restarting_servers_are_waited_for(tmp_path: Path) -> None:
    requests = write(tmp_path / "in", line("a"))
    script = iter([httpx.Response(503), httpx.ConnectError("gone"), httpx.Response(429), httpx.Response(200, json=1)])

    def respond(request: httpx.Request) -> httpx.Response:
        step = next(script)
        if isinstance(step, Exception):
            raise step
        return step

    output = run(requests, tmp_path / "out", *mocked(respond))
    assert output.done == {"a"}
    assert output.failed == 0


def test_nobody_is_waited_for_without_end(tmp_path: Path) -> None:
    requests = write(tmp_path / "in", line("a"))
    server = Server("http://x", "k", verify=True, give_up_s=0.0)
    with pytest.raises(Unavailable, match="503"):
        run(requests, tmp_path / "out", server, httpx.MockTransport(lambda request: httpx.Response(503)))
    assert (tmp_path / "out").read_text() == ""


def test_a_file_that_is_something_else_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious\n")
    with pytest.raises(InvalidRequest, match="not an answer"):
        Output(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "precious\n"
