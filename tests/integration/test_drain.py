"""SIGTERM to the whole daemon with the fake executor: what runs ends, or goes on after the next start."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path

import pytest
from daemon import FAKE, running, wait_until

from llmos import Client
from llmos.errors import LlmosError, Unavailable
from llmos.services.executor.fake import STEP_MS_VARIABLE, fake_token

pytestmark = pytest.mark.slow
VOCAB = json.loads((Path(__file__).parents[2] / "llmos/assets/demo-model/config.json").read_text())["vocab_size"]
COUNT = 300  # of 10 ms each


@pytest.fixture(autouse=True)
def slow_steps(monkeypatch):
    monkeypatch.setenv(STEP_MS_VARIABLE, "10")


def expected(seed, prompt_len):
    return tuple(fake_token(seed, prompt_len + i, VOCAB) for i in range(COUNT))


def config(drain_s):
    return FAKE + f"\n[daemon]\ndrain_s = {drain_s}\n"


def test_a_stream_ends_completely_after_sigterm():
    with running(config(60.0)) as daemon, Client(daemon.run_dir) as client:
        with client.generate([1, 2, 3], stream=True, seed=5, max_tokens=COUNT, ignore_eos=True) as stream:
            chunks = [next(iter(stream))]
            daemon.process.terminate()
            wait_until(lambda: "draining: 1 sequence runs" in daemon.log, "drain")
            with pytest.raises(Unavailable, match="stopping and takes no new work") as refusal:
                ask_once(daemon.run_dir)
            assert refusal.value.retry_after_s is not None
            chunks += stream
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == expected(5, 3)
        assert stream.completion.finish_reason == "length"
        assert daemon.process.wait(60) == 0
        assert "not ended" not in daemon.log


def test_what_the_time_does_not_suffice_for_goes_on_at_the_next_start():
    with running(config(0.2)) as daemon:
        with Client(daemon.run_dir) as client:
            stream = client.generate([1, 2, 3], stream=True, seed=6, max_tokens=COUNT, ignore_eos=True)
            first = next(iter(stream))
            reader = threading.Thread(target=read_to_the_end, args=(stream,))
            reader.start()
            assert daemon.stop() == 0
        reader.join()
        assert "1 not ended; the journal keeps what it holds for the next start" in daemon.log
        daemon.start_again()
        with Client(daemon.run_dir) as client:
            again = client.sequence(stream.rid).attach()
            tokens = tuple(token for chunk in again for token in chunk.token_ids)
            assert again.completion.finish_reason == "length"
        assert tokens == expected(6, 3)
        assert tokens[: len(first.token_ids)] == tuple(first.token_ids)


def test_what_is_asked_while_it_drains_the_next_one_does():
    with running(config(60.0)) as daemon, Client(daemon.run_dir) as client:
        with client.generate([1, 2, 3], stream=True, seed=7, max_tokens=COUNT, ignore_eos=True) as stream:
            next(iter(stream))
            daemon.process.terminate()
            wait_until(lambda: "draining: 1 sequence runs" in daemon.log, "drain")
            late = threading.Thread(
                target=lambda: done.append(client.generate([4, 5], seed=8, max_tokens=3, ignore_eos=True))
            )
            done = []
            late.start()
            list(stream)
        assert daemon.process.wait(60) == 0
        assert done == []
        daemon.start_again()
        late.join()
    assert done[0].token_ids == expected(8, 2)[:3]


def ask_once(run_dir):
    with Client(run_dir, reconnect_s=0) as client:
        client.generate([1], max_tokens=1)


def read_to_the_end(stream):
    with contextlib.suppress(LlmosError):
        list(stream)
