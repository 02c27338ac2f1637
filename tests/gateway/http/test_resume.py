"""A stream that was interrupted goes on exactly where its client was: after every event, with other processes, with its name or without."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from http_world import HttpWorld, events, fold
from loop_thread import wait_until

from llmos.codes import FinishReason

CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "stream_options": {"include_usage": True}}


def read(client: httpx.Client, body: dict[str, Any], last: str = "") -> list[tuple[str, str]]:
    answer = client.post("/v1/chat/completions", json=body, headers={"last-event-id": last} if last else {})
    assert answer.status_code == 200, answer.text
    return events(answer.text)


@pytest.mark.parametrize(
    "changes", [{"max_tokens": 20}, {"max_tokens": 40, "stop": ["er:"]}, {"max_tokens": 9, "n": 3}]
)
def test_after_every_event(world: HttpWorld, changes: dict[str, Any]) -> None:
    body = CHAT | changes
    with world.http() as client:
        whole = read(client, body)
        assert whole[-1][1] == "[DONE]"
        for place in range(len(whole) - 1):
            if changes.get("n") and ",0.0" in whole[place][0]:
                continue  # samples that were not asked for yet are other sequences the second time
            rest = read(client, body, whole[place][0])
            assert fold(whole[: place + 1] + rest) == fold(whole), whole[place]


def test_a_worker_that_stops_takes_nothing_along(world: HttpWorld) -> None:
    world.kernel.window = 30
    body = CHAT | {"max_tokens": 300}
    had = []
    with world.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        rid, block = int(answer.headers["llmos-rid"]), ""
        lines = answer.iter_lines()  # held: one that is let go of closes the connection, and who leaves cancels
        for line in lines:
            block += f"{line}\n"
            if not line:
                had += events(block)
                block = ""
            if len(had) > 5:
                break
        world.stop_worker()
    # Nobody cancelled it; on a quick machine it may have come to its end by now.
    assert rid in world.kernel.sequences or world.kernel.ended[rid].reason is FinishReason.LENGTH
    world.kernel.window = 4096
    world.start_worker()
    with world.http() as client:
        rest = read(client, body, had[-1][0])
        again = read(client, body, had[0][0])
    assert fold(had + rest) == fold(had[:1] + again)
    assert fold(had + rest).texts == {0: ("user:hi\n" * 40)[:300]}
    assert fold(had + rest).is_done


def test_with_a_name_who_leaves_may_come_back(world: HttpWorld) -> None:
    body = CHAT | {"max_tokens": 200}
    world.kernel.window = 16
    with world.http(headers={"idempotency-key": "mine"}) as client:
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            rid = int(answer.headers["llmos-rid"])
            lines = answer.iter_lines()
            first = next(lines)
        wait_until(lambda: not world.core.router._requests)
        assert rid in world.kernel.sequences or rid in world.kernel.ended
        world.kernel.window = 4096
        whole = read(client, body)
        assert fold(whole[:1] + read(client, body, whole[0][0])) == fold(whole)
    assert first.startswith(f"id: {whole[0][0].partition(':')[0][:6]}")
    assert json.loads(whole[0][1])["id"] == f"chatcmpl-{rid}"  # the same sequence


def test_without_a_name_who_leaves_ends_it(world: HttpWorld) -> None:
    world.kernel.window = 16
    with (
        world.http() as client,
        client.stream("POST", "/v1/chat/completions", json=CHAT | {"max_tokens": 200}) as answer,
    ):
        rid = int(answer.headers["llmos-rid"])
    wait_until(lambda: rid in world.kernel.ended)
    world.kernel.window = 4096


@pytest.mark.parametrize(
    "last", ["x", "1:", "1:5", "1:5.0,6.0", "1:5.0!!", "1:99999999999999999999.0", "1:9223372036854775808.0", "é:1.1"]
)
def test_an_id_that_never_was(world: HttpWorld, last: str) -> None:
    with world.http() as client:
        answer = client.post(
            "/v1/chat/completions", json=CHAT | {"max_tokens": 3}, headers={"last-event-id": last.encode()}
        )
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Last-Event-ID")


def test_the_id_of_anothers_stream(world: HttpWorld) -> None:
    with world.http() as client:
        whole = read(client, CHAT | {"max_tokens": 3})
    with world.http(world.add_key("bob")) as bob:
        answer = bob.post("/v1/chat/completions", json=CHAT, headers={"last-event-id": whole[0][0]})
    assert answer.status_code == 404
