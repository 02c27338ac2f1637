"""Services that somebody wants to be started again: `llmosctl restart`. llmosd with stand-ins."""

from __future__ import annotations

import pytest
from standin_daemon import NAMES, assert_clean, start, wait_for

from llmos.codes import ServiceState
from llmos.supervisor.policy import Action, RestartPolicy, on_exit

__all__ = ["start"]
EVERYTHING = "report microkernel=RUNNING,storage=RUNNING,tokenizer=RUNNING,executor.demo=RUNNING,gateway=RUNNING"


def ask(daemon, name):
    """As the microkernel does for an administrator."""
    draft = daemon.run_dir / "restart.new.txt"
    draft.write_text(name)
    draft.rename(daemon.run_dir / "restart.txt")


def test_what_an_exit_means_when_another_process_is_wanted():
    policy = RestartPolicy()
    assert on_exit(ServiceState.STOPPING, policy, 99, starting_up=False, hopeless=True, renewing=True) is Action.RENEW
    assert on_exit(ServiceState.STOPPING, policy, 0, starting_up=False, hopeless=False) is Action.EXPECTED


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_service_can_be_renewed(start, name):
    daemon = start()
    daemon.serving_line()
    before = {service: child.pid for service, child in daemon.children().items()}
    wait_for(lambda: daemon.told()[-1:] == [EVERYTHING], "report")
    ask(daemon, name)
    wait_for(lambda: daemon.log.count(f"{name} is ready") == 2, "restart")
    after = {service: child.pid for service, child in daemon.children().items()}
    assert {service for service in NAMES if before[service] != after[service]} == {name}
    assert f"{name} stopped (exited with code 0); starting it again" in daemon.log
    assert "is down" not in daemon.log
    down = f"down {name.split('.')[0]} {name} {before[name]} replaced asked"
    wait_for(lambda: down in daemon.told() and daemon.told()[-1] == EVERYTHING, "report")
    daemon.process.terminate()
    assert daemon.end() == 0
    assert_clean(daemon.run_dir)


@pytest.mark.slow
def test_one_that_does_not_stop_is_killed(start, tmp_path):
    config = tmp_path / "llmosd.toml"
    config.write_text("[daemon]\nstop_timeout_s = 0.3\n")
    daemon = start("--config", str(config), storage="deaf")
    daemon.serving_line()
    ask(daemon, "storage")
    wait_for(lambda: daemon.log.count("storage is ready") == 2, "restart")
    assert "storage does not stop: killing it" in daemon.log
    assert "storage stopped (killed by SIGKILL); starting it again" in daemon.log
    daemon.process.terminate()
    assert daemon.end() == 0


@pytest.mark.slow
def test_it_is_no_death(start):
    """A pause comes after the second death in a row; a restart that was asked for is none."""
    daemon = start()
    daemon.serving_line()
    for number in range(2, 5):
        ask(daemon, "tokenizer")
        wait_for(lambda number=number: daemon.log.count("tokenizer is ready") == number, "restart")
    daemon.children()["tokenizer"].kill()
    wait_for(lambda: daemon.log.count("tokenizer is ready") == 5, "restart after the death")
    assert "killed by SIGKILL; starting it again in 0 s" in daemon.log
    daemon.process.terminate()
    assert daemon.end() == 0


@pytest.mark.slow
def test_one_that_was_given_up_gets_another_chance(start):
    daemon = start(executor__demo="hopeless_later")
    daemon.serving_line()
    daemon.children()["executor.demo"].kill()
    wait_for(lambda: "executor.demo=FATAL" in daemon.told()[-1], "report")
    (daemon.run_dir / "executor.demo.started.txt").unlink()  # what it lacked is there again
    ask(daemon, "executor.demo")
    wait_for(lambda: daemon.told()[-1] == EVERYTHING, "report")
    daemon.process.terminate()
    assert daemon.end() == 0


@pytest.mark.slow
def test_an_unknown_name_harms_nobody(start):
    daemon = start()
    daemon.serving_line()
    ask(daemon, "nobody")
    wait_for(lambda: "can not start nobody again: no such service" in daemon.log, "refusal")
    assert sorted(daemon.children()) == NAMES
    daemon.process.terminate()
    assert daemon.end() == 0
