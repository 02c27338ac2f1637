"""The journal of a live microkernel has no more room, and gets some again. A limit on the size of its files stands in for the full disk: it
takes half a record and then nothing, in the same system call, for one process, and needs no file system of its own. Every call and every
error: tests/microkernel/test_journal_io.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
from daemon import FAKE, running, wait_until

from llmos import Client
from llmos.errors import Unavailable
from llmos.services.executor.fake import STEP_MS_VARIABLE, fake_token

pytestmark = pytest.mark.slow
VOCAB = json.loads((Path(__file__).parents[2] / "llmos/assets/demo-model/config.json").read_text())["vocab_size"]
COUNT = 200
NO_ROOM = 100  # bytes: less than a segment begins with


def expected(seed: int, count: int = COUNT) -> list[int]:
    return [fake_token(seed, 1 + place, VOCAB) for place in range(count)]


def is_refused(client: Client) -> bool:
    """At once: nobody knows when there is room."""
    try:
        client.generate([1], max_tokens=1)
    except Unavailable as error:
        return "journal" in error.message and error.retry_after_s is None
    return False


def test_what_runs_ends_new_work_is_refused_and_with_room_all_is_durable_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STEP_MS_VARIABLE, "10")
    with running(FAKE) as daemon, Client(daemon.run_dir) as client:
        microkernel = daemon.children()["microkernel"]
        options = {"max_tokens": COUNT, "ignore_eos": True, "stream": True}
        with client.generate([1], seed=3, **options) as stream:
            ids = list(next(stream).token_ids)
            microkernel.rlimit(psutil.RLIMIT_FSIZE, (NO_ROOM, psutil.RLIM_INFINITY))
            wait_until(lambda: is_refused(client), "new work is refused")
            for chunk in stream:
                ids += chunk.token_ids
        assert ids == expected(3)
        assert is_refused(client)
        assert microkernel.is_running()
        microkernel.rlimit(psutil.RLIMIT_FSIZE, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))
        wait_until(lambda: not is_refused(client), "new work is taken")
        rid = stream.rid
        with client.generate([1], seed=4, **options) as stream:
            ids = list(next(stream).token_ids)
            microkernel.kill()
            for chunk in stream:
                ids += chunk.token_ids
        assert ids == expected(4)
        assert "damaged" not in daemon.log
        # What ended while nothing could be written is known to the next microkernel, too.
        assert [token for chunk in client.sequence(rid).attach() for token in chunk.token_ids] == expected(3)
