"""The daemon's process tree, with stand-ins for the children: order, failed starts, deaths, stopping, no orphans."""

from __future__ import annotations

import os
import re
import signal
import stat

import psutil
import pytest
from standin_daemon import NAMES, assert_clean, assert_gone, start, wait_for

__all__ = ["start"]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_serves_and_stops_without_a_trace(start, number):
    daemon = start()
    line = daemon.serving_line()
    assert re.fullmatch(
        rf"llmos is serving demo on {daemon.run_dir}/client\.sock \(pid {daemon.process.pid}, \d+\.\d s\); "
        rf'try: LLMOS_RUN_DIR={daemon.run_dir} llmosctl run "What is the capital of France\?"\n',
        line,
    )
    children = daemon.children()
    assert sorted(children) == NAMES
    assert (daemon.run_dir / "llmosd.lock").read_text() == f"{daemon.process.pid}\n"
    assert stat.S_IMODE(daemon.run_dir.stat().st_mode) == 0o700
    daemon.process.send_signal(number)
    assert daemon.process.stdout.read() == ""
    assert daemon.end() == 0
    assert_gone(children.values())
    assert_clean(daemon.run_dir)


def test_children_start_in_order_and_stop_in_reverse(start):
    daemon = start()
    daemon.serving_line()
    daemon.process.terminate()
    assert daemon.end() == 0
    events = re.findall(r"llmosd (\S+) (started|is ready|stopped)", daemon.log)
    place = {event: number for number, event in enumerate(events)}
    middle = ["storage", "tokenizer", "executor.demo"]
    assert events[:2] == [("microkernel", "started"), ("microkernel", "is ready")]
    assert {name for name, what in events[2:5] if what == "started"} == set(middle)  # in parallel
    assert all(place[(name, "is ready")] < place[("gateway", "started")] for name in middle)
    assert all(place[("gateway", "stopped")] < place[(name, "stopped")] for name in middle)
    assert events[-1] == ("microkernel", "stopped")
    assert len(events) == 15


def test_children_are_isolated_from_the_terminal(start):
    daemon = start()
    daemon.serving_line()
    for child in daemon.children().values():
        assert os.getsid(child.pid) == child.pid
        assert os.getpgid(child.pid) == child.pid
        assert os.readlink(f"/proc/{child.pid}/fd/0") == "/dev/null"
        assert os.readlink(f"/proc/{child.pid}/fd/2") == str(daemon.log_path)


def test_kill_9_of_the_daemon_leaves_no_child_and_the_next_start_works(start):
    daemon = start(executor__demo="deaf")
    daemon.serving_line()
    children = daemon.children()
    assert len(children) == 5
    daemon.process.kill()
    assert daemon.end() == -signal.SIGKILL
    assert_gone(children.values())
    assert (daemon.run_dir / "llmosd.lock").exists()

    second = start()
    assert f"(pid {second.process.pid}," in second.serving_line()
    second.process.terminate()
    assert second.end() == 0
    assert_clean(second.run_dir)


def test_a_second_start_is_refused_with_the_pid_of_the_first(start):
    first = start()
    first.serving_line()
    second = start()
    assert second.end() == 73
    assert second.log == f"llmosd: llmosd is already running on {first.run_dir} (pid {first.process.pid})\n"
    assert len(first.children()) == 5
    first.process.terminate()
    assert first.end() == 0


def test_a_typed_failure_at_start_stops_everything_with_its_reason(start):
    daemon = start(executor__demo="typed_failure")
    assert daemon.end() == 72
    lines = [line for line in daemon.log.splitlines() if line.startswith("llmosd: ")]
    assert lines == ["llmosd: executor.demo failed to start: model directory /nowhere has no config.json"]
    assert "gateway started" not in daemon.log
    assert "microkernel stopped" in daemon.log
    assert_clean(daemon.run_dir)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [("bug", "RuntimeError: wheel fell off"), ("silent_exit", "exited with code 5; its own words are above")],
)
def test_an_untyped_failure_at_start(start, behaviour, reason):
    daemon = start(tokenizer=behaviour)
    assert daemon.end() == 1
    assert f"\nllmosd: tokenizer failed to start: {reason}\n" in daemon.log
    assert_clean(daemon.run_dir)


def test_a_child_that_is_never_ready_runs_into_the_time_limit(start, tmp_path):
    config = tmp_path / "llmosd.toml"
    config.write_text("[daemon]\nstart_timeout_s = 0.5\n")
    daemon = start("--config", str(config), microkernel="never_ready")
    assert daemon.end() == 1
    assert "\nllmosd: microkernel failed to start: not ready within 0.5 s (daemon.start_timeout_s)\n" in daemon.log
    assert_clean(daemon.run_dir)


def test_a_child_that_is_killed_during_the_start_is_started_again(start):
    daemon = start()
    victim = wait_for(lambda: daemon.children().get("storage"), "storage")
    victim.kill()
    assert "is serving" in daemon.serving_line()
    assert daemon.log.count("storage started") == 2
    daemon.process.terminate()
    assert daemon.end() == 0
    assert_clean(daemon.run_dir)


def test_a_stop_during_the_start(start):
    daemon = start(storage="never_ready")
    wait_for(lambda: "storage started" in daemon.log, "start of storage")
    children = daemon.children()
    daemon.process.send_signal(signal.SIGINT)
    assert daemon.end() == 0
    assert_gone(children.values())
    assert_clean(daemon.run_dir)


@pytest.mark.parametrize("name", ["executor.demo", "gateway", "tokenizer", "storage"])
def test_a_dead_child_is_reported_and_started_again(start, name):
    daemon = start()
    daemon.serving_line()
    victim = daemon.children()[name]
    victim.kill()
    role = name.split(".")[0]
    down = f"down {role} {name} {victim.pid} replaced"
    wait_for(lambda: f"{name} is ready" in daemon.log.partition(f"{name} (pid {victim.pid}) is down")[2], "restart")
    told = wait_for(
        lambda: (
            daemon.told()[:] if f"{name}=RUNNING" in (daemon.told() or [""])[-1] and down in daemon.told() else None
        ),
        "report",
    )
    assert [line for line in told if line.startswith("down")] == [down]
    assert f"{name} (pid {victim.pid}) is down: killed by SIGKILL; starting it again in 0 s" in daemon.log
    assert sorted(daemon.children()) == NAMES
    assert daemon.children()[name].pid != victim.pid
    assert not psutil.pid_exists(victim.pid)  # reaped
    daemon.process.terminate()
    assert daemon.end() == 0
    assert_clean(daemon.run_dir)


def test_the_microkernel_is_started_again_and_everybody_is_told(start):
    daemon = start()
    daemon.serving_line()
    others = {name: child.pid for name, child in daemon.children().items() if name != "microkernel"}
    daemon.children()["microkernel"].kill()
    told = [daemon.run_dir / f"{name}.regreets.txt" for name in ("storage", "executor.demo")]
    wait_for(lambda: all(path.exists() for path in told), "news of the restart")
    assert {name: child.pid for name, child in daemon.children().items() if name != "microkernel"} == others
    everything = "report microkernel=RUNNING,storage=RUNNING,tokenizer=RUNNING,executor.demo=RUNNING,gateway=RUNNING"
    wait_for(lambda: daemon.told()[-1] == everything, "report to the new one")
    daemon.process.terminate()
    assert daemon.end() == 0
    assert_clean(daemon.run_dir)


def test_a_child_that_says_it_can_not_work_is_not_tried_again(start):
    daemon = start(executor__demo="hopeless_later")
    daemon.serving_line()
    victim = daemon.children()["executor.demo"]
    victim.kill()
    wait_for(lambda: "executor.demo=FATAL" in daemon.told()[-1], "report")
    assert "is down and stays down: exited with code 72: the model's files are gone" in daemon.log
    downs = [line for line in daemon.told() if line.startswith("down")]
    assert [line.endswith("replaced") for line in downs] == [True, False]
    assert daemon.log.count("executor.demo started") == 2
    daemon.process.terminate()
    assert daemon.end() == 0


def test_restarts_come_slower_and_slower_and_a_stop_ends_them(start):
    daemon = start(tokenizer="dies_later")
    daemon.serving_line()
    daemon.children()["tokenizer"].kill()
    wait_for(lambda: "starting it again in 0.4 s" in daemon.log, "third death")
    pauses = re.findall(r"tokenizer \(pid \d+\) is down: .*; starting it again in (\S+) s", daemon.log)
    assert pauses[:3] == ["0", "0.2", "0.4"]
    wait_for(lambda: "tokenizer=BACKOFF" in daemon.told()[-1], "report")
    daemon.process.terminate()
    assert daemon.end() == 0
    assert_clean(daemon.run_dir)


@pytest.mark.parametrize("how", ["stopped", "deaf"])
def test_a_child_that_hangs_is_killed_and_started_again(start, tmp_path, how):
    config = tmp_path / "llmosd.toml"
    config.write_text("[daemon]\nhang_timeout_s = 1.0\n")
    daemon = start("--config", str(config), **({"gateway": "deaf"} if how == "deaf" else {}))
    daemon.serving_line()
    victim = daemon.children()["gateway"]
    if how == "stopped":
        victim.suspend()
    wait_for(lambda: f"gateway (pid {victim.pid}) is down: killed by SIGKILL" in daemon.log, "kill")
    assert f"gateway (pid {victim.pid}) gave no sign of life for 1 s: killing it" in daemon.log
    wait_for(lambda: daemon.log.count("gateway is ready") == 2, "restart")
    daemon.process.terminate()
    assert daemon.end() == 0


def test_one_that_announced_long_work_may_be_silent_for_longer(start, tmp_path):
    config = tmp_path / "llmosd.toml"
    config.write_text("[daemon]\nhang_timeout_s = 1.0\n")
    daemon = start("--config", str(config), executor__demo="long_work")
    daemon.serving_line()
    wait_for((daemon.run_dir / "worked.txt").exists, "end of the work")
    assert "killing" not in daemon.log
    daemon.children()["executor.demo"].kill()
    daemon.process.terminate()
    assert daemon.end() == 0


def test_the_microkernel_may_have_a_service_killed(start):
    daemon = start()
    daemon.serving_line()
    victim = daemon.children()["executor.demo"]
    (daemon.run_dir / "kill.txt").write_text("executor.demo")
    wait_for(lambda: daemon.log.count("executor.demo is ready") == 2, "restart")
    assert f"executor.demo (pid {victim.pid}): it hangs in step 7: killing it" in daemon.log
    wait_for(lambda: f"down executor executor.demo {victim.pid} replaced" in daemon.told(), "report")
    daemon.process.terminate()
    assert daemon.end() == 0


def test_the_microkernel_is_told_of_every_change_at_start(start):
    daemon = start()
    daemon.serving_line()
    everything = "report microkernel=RUNNING,storage=RUNNING,tokenizer=RUNNING,executor.demo=RUNNING,gateway=RUNNING"
    told = wait_for(lambda: daemon.told()[:] if everything in daemon.told() else None, "last report")
    assert told[0].startswith("report microkernel=RUNNING,storage=ST")
    assert not any("=FATAL" in line or line.startswith("down") for line in told)


def test_what_a_dead_child_started_dies_with_it(start):
    daemon = start(storage="grandchild")
    daemon.serving_line()
    grandchild = psutil.Process(int((daemon.run_dir / "grandchild.txt").read_text()))
    assert grandchild.name() == "sleep"
    daemon.children()["storage"].kill()
    assert_gone([grandchild])


def test_a_child_that_does_not_stop_is_killed_after_the_grace_time(start, tmp_path):
    config = tmp_path / "llmosd.toml"
    config.write_text("[daemon]\nstop_timeout_s = 0.3\n")
    daemon = start("--config", str(config), gateway="deaf")
    daemon.serving_line()
    children = daemon.children()
    daemon.process.terminate()
    assert daemon.end() == 0
    assert "gateway does not stop: killing it" in daemon.log
    assert "gateway stopped (killed by SIGKILL)" in daemon.log
    assert_gone(children.values())


def test_a_second_ctrl_c_kills_at_once(start, tmp_path):
    config = tmp_path / "llmosd.toml"
    config.write_text("[daemon]\nstop_timeout_s = 1000.0\n")
    daemon = start("--config", str(config), gateway="deaf", storage="deaf")
    daemon.serving_line()
    daemon.process.send_signal(signal.SIGINT)
    wait_for(lambda: "stopping" in daemon.log, "first Ctrl-C")
    daemon.process.send_signal(signal.SIGINT)
    assert daemon.end() == 0
    assert "gateway stopped (killed by SIGKILL)" in daemon.log
    assert_clean(daemon.run_dir)
