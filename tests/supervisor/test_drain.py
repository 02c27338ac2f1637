"""How long the daemon waits for what runs: the pure part, and llmosd with stand-ins."""

from __future__ import annotations

import re
import signal
import time

import pytest
from standin_daemon import assert_clean, start, wait_for

from llmos.protocol.messages import Draining
from llmos.supervisor.drain import Drain

__all__ = ["start"]


def test_it_ends_when_nothing_runs_and_the_last_words_have_passed():
    drain = Drain(10.0, now=100.0)
    assert drain.time_left(100.0) == 10.0  # nothing is known yet
    drain.heard(Draining(3, 5.0))
    assert (drain.running, drain.time_left(104.0)) == (3, 6.0)
    drain.heard(Draining(0, 299.0))
    assert (drain.running, drain.time_left(105.0)) == (0, 5.0)
    drain.heard(Draining(0, 300.0))
    assert drain.time_left(105.3) == 0.0
    drain.heard(None)  # the microkernel died: another one will know
    assert drain.time_left(106.0) == 4.0


def test_it_ends_when_time_is_up():
    drain = Drain(0.5, now=100.0)
    drain.heard(Draining(3, 5.0))
    assert drain.time_left(100.6) == 0.0
    assert Drain(0.0, now=100.0).time_left(100.0) == 0.0


def test_progress_is_told_once_a_second():
    drain = Drain(10.0, now=100.0)
    assert drain.word(100.0) is None  # nothing to tell
    drain.heard(Draining(3, 0.0))
    assert drain.word(100.1) == "3 sequences run"
    assert drain.word(101.0) is None
    drain.heard(Draining(1, 0.0))
    assert drain.word(101.1) == "1 sequence runs"


def configured(tmp_path, drain_s):
    config = tmp_path / "llmosd.toml"
    config.write_text(f"[daemon]\ndrain_s = {drain_s}\n")
    return ("--config", str(config))


@pytest.mark.slow
def test_it_waits_until_nothing_runs(start, tmp_path):
    daemon = start(*configured(tmp_path, 1000.0))
    daemon.serving_line()
    running = daemon.run_dir / "generating.txt"
    running.write_text("3")
    daemon.process.terminate()
    wait_for(lambda: "draining: 3 sequences run, 1000 s left" in daemon.log, "progress")
    daemon.children()["gateway"].kill()  # meanwhile the daemon does its work
    wait_for(lambda: daemon.log.count("gateway is ready") == 2, "restart")
    running.write_text("0")
    assert daemon.end() == 0
    assert "drain" in daemon.told()
    assert "did not end" not in daemon.log
    assert_clean(daemon.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("drain_s", [0.0, 0.3])
def test_it_does_not_wait_longer_than_configured(start, tmp_path, drain_s):
    daemon = start(*configured(tmp_path, drain_s))
    daemon.serving_line()
    (daemon.run_dir / "generating.txt").write_text("2")
    daemon.process.terminate()
    assert daemon.end() == 0
    assert ("2 not ended; the journal keeps" in daemon.log) == bool(drain_s)
    assert ("drain" in daemon.told()) == bool(drain_s)


@pytest.mark.slow
def test_a_second_signal_does_not_wait(start, tmp_path):
    daemon = start(*configured(tmp_path, 1000.0))
    daemon.serving_line()
    (daemon.run_dir / "generating.txt").write_text("2")
    daemon.process.send_signal(signal.SIGINT)
    wait_for(lambda: "draining: 2 sequences run" in daemon.log, "first Ctrl-C")
    daemon.process.send_signal(signal.SIGINT)
    assert daemon.end() == 0
    assert "killing it" not in daemon.log  # it is a stop like any other
    assert_clean(daemon.run_dir)


@pytest.mark.slow
def test_progress_in_the_log_is_a_line_a_second(start, tmp_path):
    daemon = start(*configured(tmp_path, 2.5))
    daemon.serving_line()
    (daemon.run_dir / "generating.txt").write_text("2")
    began = time.monotonic()
    daemon.process.terminate()
    assert daemon.end() == 0
    assert 2.5 <= time.monotonic() - began < 30
    assert len(re.findall(r"draining: 2 sequences run, \d s left", daemon.log)) in (2, 3)
