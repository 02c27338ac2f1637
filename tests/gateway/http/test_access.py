"""Who gets in: every route by every kind of key; one-time links and the browser's session; limits before anything is parsed."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator

import httpx
import msgspec
import pytest
from http_world import HttpWorld
from loop_thread import wait_until

from llmos.http_links import make_link
from llmos.keys.roles import Role
from llmos.keys.secret import Secret
from llmos.services.gateway.http.openapi import make_document
from llmos.services.gateway.http.routes import ROUTES, Route

OPEN = {"/", "/page/{name}", "/livez", "/readyz", "/open"}
NEEDS_INSPECT = {
    "/progressz",
    "/metrics",
    "/llmos/v1/sequences",
    "/llmos/v1/sequences/{rid:int}/explain",
    "/llmos/v1/status",
    "/llmos/v1/services",
    "/llmos/v1/tenants",
}
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/responses": {"input": "a", "max_output_tokens": 2},
    "/v1/messages": {"model": "echo", "max_tokens": 2, "messages": [{"role": "user", "content": "a"}]},
    "/v1/messages/count_tokens": {"model": "echo", "messages": [{"role": "user", "content": "a"}]},
    "/tokenize": {"text": "a"},
    "/detokenize": {"tokens": [97]},
    "/llmos/v1/sequences/{rid:int}/nice": {"nice": 3},
}
NOBODYS = 4711


@pytest.fixture(scope="module")
def world() -> Iterator[HttpWorld]:
    with HttpWorld(max_body=1 << 16) as running:
        yield running


@pytest.fixture(scope="module")
def keys(world: HttpWorld) -> dict[str, Secret]:
    made = {role.word: world.add_key("alice", role) for role in Role}
    made["revoked"] = world.add_key("alice", Role.ADMIN)
    world.revoke(made["revoked"])
    made["wrong"] = Secret.make()
    return made


def call(client: httpx.Client, route: Route, rid: int = NOBODYS) -> httpx.Response:
    path = route.path.replace("{rid:int}", str(rid)).replace("{name:path}", "echo").replace("{name}", f"resp_1_{rid}")
    body = msgspec.json.encode(BODIES[route.path]) if route.path in BODIES else None
    return client.request(route.method, path, content=body)


def name_of(route: Route) -> str:
    return f"{route.method} {route.path}"


@pytest.mark.parametrize("route", ROUTES, ids=name_of)
@pytest.mark.parametrize("who", ["no key", "wrong", "revoked"])
def test_without_a_live_key_nothing_is_answered(
    world: HttpWorld, keys: dict[str, Secret], route: Route, who: str
) -> None:
    with world.http(keys[who]) if who in keys else world.stranger() as client:
        before = len(world.kernel.controls) + len(world.kernel.seen)
        answer = call(client, route)
        if route.path in OPEN:
            assert route.is_open
            return
        assert answer.status_code == 401
        error = answer.json()["error"]
        assert error["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert len(world.kernel.controls) + len(world.kernel.seen) == before


@pytest.mark.parametrize("route", ROUTES, ids=name_of)
@pytest.mark.parametrize("role", [role.word for role in Role])
def test_roles(world: HttpWorld, keys: dict[str, Secret], route: Route, role: str) -> None:
    with world.http(keys[role]) as client:
        answer = call(client, route)
    may = role != "submit" or route.path not in NEEDS_INSPECT
    assert (answer.status_code == 403) is not may, answer.text
    if not may:
        assert answer.json()["error"]["code"] == "permission_denied"


def test_a_stranger_does_not_learn_which_routes_there_are(world: HttpWorld, keys: dict[str, Secret]) -> None:
    with world.stranger() as client:
        assert client.get("/nothing").status_code == 401
        assert client.delete("/v1/models").status_code == 401
    with world.http(keys["submit"]) as client:
        assert client.get("/nothing").json()["error"]["code"] == "no_such_route"
        refused = client.delete("/v1/models")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET")


@pytest.mark.parametrize("path", ["explain", "fork", "suspend", "resume", "nice", "kill", ""])
def test_another_tenants_sequence_answers_like_one_that_is_not_there(
    world: HttpWorld, keys: dict[str, Secret], path: str
) -> None:
    bob = world.add_key("bob", Role.INSPECT)
    world.kernel.paused = True
    with world.http(keys["submit"]) as alice, world.http(bob) as other:
        made = alice.post("/v1/responses", json={"input": "a", "background": True}).json()
        rid = int(made["id"].rpartition("_")[2])
        method = "GET" if path in ("", "explain") else "POST"
        body = {"nice": 3} if path == "nice" else {}
        answers = [
            other.request(method, f"/llmos/v1/sequences/{number}/{path}".rstrip("/"), json=body if body else None)
            for number in (rid, NOBODYS)
        ]
        assert [answer.status_code for answer in answers] == [404, 404]
        texts = [re.sub(str(number), "N", answer.text) for answer, number in zip(answers, (rid, NOBODYS))]
        assert texts[0] == texts[1]
        assert alice.post(f"/llmos/v1/sequences/{rid}/kill").json() == {"killed": [rid]}
    world.kernel.paused = False


def test_a_revoked_key_ends_what_it_reads(world: HttpWorld) -> None:
    key = world.add_key("carol")
    world.kernel.window = 8
    body = {"prompt": "abc", "max_tokens": 400, "stream": True}
    with world.http(key) as client, client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("id: ")
        world.revoke(key)
        rest = list(lines)
    world.kernel.window = 4096
    assert any('"code":"invalid_api_key"' in line for line in rest)
    assert "data: [DONE]" not in rest


def test_a_link_opens_one_session_once(world: HttpWorld, keys: dict[str, Secret]) -> None:
    token = make_link(world.path, world.admin.id)
    with world.stranger() as browser:
        opened = browser.get("/open", params={"token": token})
        assert (opened.status_code, opened.headers["location"]) == (303, "/")
        cookie = opened.headers["set-cookie"].lower()
        assert all(word in cookie for word in ("httponly", "samesite=strict", "max-age="))
        assert browser.get("/v1/models").status_code == 200
        body = {"prompt": "a", "max_tokens": 2}
        assert browser.post("/v1/completions", json=body).status_code == 403  # not asked by our own page
        ours = {"origin": world.url}
        assert browser.post("/v1/completions", json=body, headers=ours).status_code == 200
        theirs = {"origin": "http://evil.example", "sec-fetch-site": "cross-site"}
        assert browser.post("/v1/completions", json=body, headers=theirs).status_code == 403
    with world.stranger() as late:
        assert late.get("/open", params={"token": token}).status_code == 401
        assert late.get("/open", params={"token": "x" * 43}).status_code == 401
        assert late.get("/open").status_code == 401


@pytest.mark.parametrize("forged", ["", "a.b.c", "{id}.99999999999.00", "{id}.1.{good}", "..", "{id}.9e9.x"])
def test_a_forged_session_is_nobodys(world: HttpWorld, forged: str) -> None:
    with world.stranger() as browser:
        browser.get("/open", params={"token": make_link(world.path, world.admin.id)})
        good = browser.cookies["llmos_session"].rpartition(".")[2]
    value = forged.format(id=world.admin.id, good=good)
    with world.stranger(cookies={"llmos_session": value}) as client:
        assert client.get("/v1/models").status_code == 401


def test_a_session_ends_with_its_key(world: HttpWorld) -> None:
    key = world.add_key("dave", Role.ADMIN)
    with world.stranger() as browser:
        browser.get("/open", params={"token": make_link(world.path, key.id)})
        assert browser.get("/v1/models").status_code == 200
        world.revoke(key)
        assert browser.get("/v1/models").status_code == 401


def test_bodies_are_limited_before_they_are_parsed(world: HttpWorld, keys: dict[str, Secret]) -> None:
    with world.http(keys["submit"]) as client:
        told = client.post("/v1/completions", content=b"x" * (1 << 17))
        assert (told.status_code, told.json()["error"]["code"]) == (413, "request_too_large")
        untold = client.post("/v1/completions", content=iter([b"x" * (1 << 16), b"x"]))
        assert untold.status_code == 413
        assert client.get("/v1/models").status_code == 200


def test_a_head_without_end_is_cut_off(world: HttpWorld) -> None:
    host, port = world.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\n")
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b"x-long: " + b"a" * 1000 + b"\r\n")
        connection.settimeout(10)
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # what it still had to say may be lost with it
            while chunk := connection.recv(4096):
                answer += chunk
    assert not answer or b" 431 " in answer


def test_livez_says_no_more_than_yes(world: HttpWorld) -> None:
    with world.stranger() as client:
        assert client.get("/livez").json() == {"status": "ok"}
        assert client.get("/readyz").json() == {"status": "ok"}


def test_the_document_has_every_route(world: HttpWorld, keys: dict[str, Secret]) -> None:
    with world.http(keys["submit"]) as client:
        found = client.get("/openapi.json").json()
        assert client.get("/docs").text.count("<section>") == len(ROUTES)
    assert found == msgspec.json.decode(msgspec.json.encode(make_document()))
    listed = {(method.upper(), path) for path, operations in found["paths"].items() for method in operations}
    assert listed == {(route.method, re.sub(r"\{(\w+)(:\w+)?\}", r"{\1}", route.path)) for route in ROUTES}
    opened = {path for path, each in found["paths"].items() for one in each.values() if one.get("security") == []}
    assert opened == OPEN


def test_nothing_is_left_open(world: HttpWorld) -> None:
    wait_until(lambda: len(world.core.router) == 0)
    assert all(not session.requests and not session._sinks for session in world.core.sessions.each())
