"""A whole daemon over HTTP: the first key, llmosctl env and open, official clients, several workers, and kill -9 of a worker mid-stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from daemon import FAKE, running, wait_until
from http_world import events, fold

from llmos.keys.keyfile import KeyFile
from llmos.keys.roles import Role
from llmos.services.executor.fake import STEP_MS_VARIABLE

pytestmark = pytest.mark.slow
HTTP = FAKE + '\n[http]\naddress = "127.0.0.1:0"\nworkers = 2\n'
BODY = {"prompt": [5, 6, 7], "max_tokens": 300, "ignore_eos": True, "seed": 3, "stream": True}


@pytest.fixture(scope="module")
def daemon():
    os.environ[STEP_MS_VARIABLE] = "5"
    try:
        with running(HTTP) as started:
            yield started
    finally:
        del os.environ[STEP_MS_VARIABLE]


def ctl(daemon, *arguments):
    command = [Path(sys.executable).with_name("llmosctl"), "--run-dir", str(daemon.run_dir), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def env(daemon):
    return json.loads(ctl(daemon, "env", "--json").stdout)


@pytest.fixture
def client(env):
    headers = {"authorization": f"Bearer {env['OPENAI_API_KEY']}"}
    with httpx.Client(base_url=env["OPENAI_BASE_URL"], headers=headers, timeout=60.0, verify=False) as made:
        yield made


def test_the_first_start_makes_a_key_for_this_machine_only(daemon, env):
    url = env["ANTHROPIC_BASE_URL"]
    assert f" and {url} (pid" in daemon.serving_line
    assert daemon.listening() == {url.removeprefix("http://")}
    for name in ("admin.key", "keys.json"):
        assert (daemon.home / "state" / name).stat().st_mode & 0o777 == 0o600
    assert (daemon.run_dir / "http.json").stat().st_mode & 0o777 == 0o600
    (key,) = KeyFile(daemon.home / "state").read()
    assert key.rights is Role.ADMIN
    assert env["OPENAI_API_KEY"] not in daemon.log


def test_a_shell_takes_what_env_prints(daemon, env):
    shown = ctl(daemon, "env").stdout
    script = f"{shown}\necho $OPENAI_BASE_URL $OPENAI_API_KEY"
    told = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert told == [env["OPENAI_BASE_URL"], env["OPENAI_API_KEY"]]


def test_open_gives_a_link_that_works_once(daemon):
    url = json.loads(ctl(daemon, "open", "--json").stdout)["url"]
    assert httpx.get(url, verify=False).status_code == 303
    assert httpx.get(url, verify=False).status_code == 401


def test_the_official_client(env):
    with openai.OpenAI(base_url=env["OPENAI_BASE_URL"], api_key=env["OPENAI_API_KEY"]) as client:
        answer = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=20,
            n=2,
            logprobs=True,
            top_logprobs=2,
        )
        made = [len(choice.logprobs.content) for choice in answer.choices]
        assert sum(made) == answer.usage.completion_tokens


def test_a_worker_dies_and_its_streams_go_on_where_they_were(daemon, client):
    """Each stream is cut at another place; what its client has at the end is what an uninterrupted one has."""
    body = BODY | {"stream_options": {"include_usage": True}}
    path = "/chat/completions"
    chat = {key: value for key, value in body.items() if key != "prompt"} | {
        "messages": [{"role": "user", "content": "a"}]
    }
    whole = fold(events(client.post(path, json=chat).text))
    assert whole.is_done
    for after in (1, 40, 120):
        victims = [daemon.children()[name] for name in ("http.0", "http.1")]
        had = _interrupted(client, path, chat, after, victims)
        rest = _retried(client, path, chat, had[-1][0])
        found = fold(had + rest)
        assert found.texts == whole.texts
        assert (found.reasons, found.is_done, len(found.texts)) == (whole.reasons, True, 1)
        assert found.usage["completion_tokens"] == whole.usage["completion_tokens"]


def _interrupted(client, path, body, after, victims):
    """The events until all workers died, which they do at the one with this number."""
    had, block = [], ""
    try:
        with client.stream("POST", path, json=body) as answer:
            for line in answer.iter_lines():
                block += f"{line}\n"
                if line:
                    continue
                had, block = had + events(block), ""
                if len(had) == after:
                    for victim in victims:
                        victim.kill()
    except httpx.RemoteProtocolError:
        return had
    raise AssertionError("nobody noticed")


def _retried(client, path, body, last):
    """While no worker lives, connections wait: llmosd holds the socket. One that a dying worker had taken is lost with it."""
    for _ in range(100):
        try:
            answer = client.post(path, json=body, headers={"last-event-id": last})
        except httpx.TransportError:
            continue
        if answer.status_code != 503:
            assert answer.status_code == 200, answer.text
            return events(answer.text)
    raise AssertionError("no worker came back")


def test_the_daemon_notices_nothing_else(daemon, env, client):
    url = f"{env['ANTHROPIC_BASE_URL']}/llmos/v1/services"

    def services():
        return client.get(url).json()["services"]

    wait_until(lambda: all(row["state"] == "running" for row in services()), "all workers are back")
    restarts = {row["name"]: row["restarts"] for row in services()}
    assert restarts["microkernel"] == restarts["executor.demo"] == restarts["gateway"] == 0
    assert restarts["http.0"] >= 3


def test_nothing_is_left(daemon):
    processes = list(daemon.children().values())
    assert daemon.stop() == 0
    assert not (daemon.run_dir / "http.json").exists()
    wait_until(lambda: not any(psutil.pid_exists(process.pid) for process in processes), "all gone")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('address = "0.0.0.0:0"', "no live key"),
        ('address = "0.0.0.0:0"', "plain text"),
        ('address = "0.0.0.0:0"\ntls_cert = "no.pem"\ntls_key = "no.pem"', "no file"),
    ],
)
def test_a_wide_address_needs_keys_and_encryption(tmp_path, lines, words):
    config = tmp_path / "llmosd.toml"
    config.write_text(f'{FAKE}\n[http]\n{lines}\n[storage]\nstate_dir = "{tmp_path}/state"\n')
    if words != "no live key":
        KeyFile(tmp_path / "state").add("test", "alice", Role.SUBMIT)
    command = [Path(sys.executable).with_name("llmosd"), "--config", str(config), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, words in done.stderr) == (72, True), done.stderr
    config.write_text(config.read_text().replace(lines, 'address = "0.0.0.0:0"\nbehind_proxy = true'))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode == 0) is (words != "no live key")
