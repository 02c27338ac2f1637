"""Services that hang with the interpreter's lock held, so that ZeroMQ's own thread goes on and the work loop does not: streams are a pause
longer, and exact. All services, and SIGSTOP: `python bench/flood.py --scenario stuck --scenario stopped`.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest
from daemon import FAKE, running, wait_until

from llmos import Client
from llmos.services.base import HANG_VARIABLE
from llmos.services.executor.fake import STEP_MS_VARIABLE, fake_token

pytestmark = pytest.mark.slow
VOCAB = json.loads((Path(__file__).parents[2] / "llmos/assets/demo-model/config.json").read_text())["vocab_size"]
LIMIT = "[daemon]\nhang_timeout_s = 1.0\n"


def test_hung_services_are_killed_and_the_stream_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HANG_VARIABLE, "1")
    monkeypatch.setenv(STEP_MS_VARIABLE, "4")
    with running(LIMIT + FAKE) as daemon, Client(daemon.run_dir) as client:
        victims = {name: daemon.children()[name] for name in ("executor.demo", "tokenizer", "gateway", "microkernel")}
        stream = client.generate([1], stream=True, seed=3, max_tokens=300, ignore_eos=True)
        ids = list(next(stream).token_ids)
        for victim in victims.values():
            victim.send_signal(signal.SIGUSR1)
        for chunk in stream:
            ids += chunk.token_ids
        assert ids == [fake_token(3, 1 + place, VOCAB) for place in range(300)]
        for name, victim in victims.items():
            wait_until(lambda victim=victim: not psutil.pid_exists(victim.pid), f"{name} is killed")
            assert f"{name} (pid {victim.pid})" in daemon.log
