"""`llmosctl restart SERVICE` against a whole daemon with the fake executor, while a stream runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from daemon import FAKE, running, wait_until

from llmos import Client
from llmos.services.executor.fake import STEP_MS_VARIABLE, fake_token

pytestmark = pytest.mark.slow
VOCAB = json.loads((Path(__file__).parents[2] / "llmos/assets/demo-model/config.json").read_text())["vocab_size"]
COUNT = 400
NAMES = ["executor.demo", "gateway", "microkernel", "storage", "tokenizer"]


@pytest.fixture(scope="module")
def daemon():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STEP_MS_VARIABLE, "5")
        with running(FAKE) as found:
            yield found


def ctl(daemon, *arguments):
    command = [Path(sys.executable).with_name("llmosctl"), "--run-dir", str(daemon.run_dir), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_goes_on(daemon, name):
    wait_until(lambda: len(daemon.children()) == 5, "all services")
    old = daemon.children()[name].pid
    with Client(daemon.run_dir) as client:
        stream = client.generate([1, 2, 3], stream=True, seed=7, max_tokens=COUNT, ignore_eos=True)
        tokens = list(next(iter(stream)).token_ids)
        done = ctl(daemon, "restart", name, "--json")
        assert done.returncode == 0, done.stderr + daemon.log
        for chunk in stream:
            assert chunk.offset == len(tokens)
            tokens += chunk.token_ids
        assert tokens == [fake_token(7, 3 + i, VOCAB) for i in range(COUNT)]
    answer = json.loads(done.stdout)
    assert (answer["service"], answer["old_pid"]) == (name, old)
    assert daemon.children()[name].pid == answer["pid"] != old
    assert f"{name} (pid {old}) is down" not in daemon.log


def test_all_services_are_replaced_while_streams_go_on(daemon):
    wait_until(lambda: len(daemon.children()) == 5, "all services")
    old = {name: child.pid for name, child in daemon.children().items()}
    with Client(daemon.run_dir) as client:
        streams = [
            client.generate([1, 2, 3], stream=True, seed=seed, max_tokens=COUNT, ignore_eos=True) for seed in range(4)
        ]
        done = ctl(daemon, "upgrade", "--json")
        assert done.returncode == 0, done.stderr + daemon.log
        for seed, stream in enumerate(streams):
            tokens = [token for chunk in stream for token in chunk.token_ids]
            assert tokens == [fake_token(seed, 3 + i, VOCAB) for i in range(COUNT)]
    rows = json.loads(done.stdout)
    assert [row["service"] for row in rows] == ["executor.demo", "storage", "tokenizer", "gateway", "microkernel"]
    assert {row["service"]: row["old_pid"] for row in rows} == old
    assert {row["service"]: row["pid"] for row in rows} == {
        name: child.pid for name, child in daemon.children().items()
    }
    assert not set(old.values()) & {row["pid"] for row in rows}


def test_an_unknown_service_is_answered_with_those_there_are(daemon):
    done = ctl(daemon, "restart", "nobody")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert f"no service 'nobody'; there are: {', '.join(NAMES)}" in done.stderr
