"""The transition table, the policy and the plan: pure parts of the supervisor."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmos.codes import ServiceState
from llmos.config import Config, ModelConfig
from llmos.ports.endpoint import RunDir
from llmos.supervisor.plan import make_plan
from llmos.supervisor.policy import Action, on_exit
from llmos.supervisor.states import HAS_PROCESS, TRANSITIONS, check

ALLOWED = {
    ("STOPPED", "STARTING"),
    ("STARTING", "RUNNING"),
    ("STARTING", "STOPPING"),
    ("STARTING", "BACKOFF"),
    ("STARTING", "FATAL"),
    ("RUNNING", "STOPPING"),
    ("RUNNING", "BACKOFF"),
    ("RUNNING", "FATAL"),
    ("BACKOFF", "STARTING"),
    ("BACKOFF", "STOPPED"),
    ("BACKOFF", "FATAL"),
    ("STOPPING", "STOPPED"),
}


def test_the_transition_table():
    assert set(TRANSITIONS) == set(ServiceState)
    for old in ServiceState:
        for new in ServiceState:
            if (old.name, new.name) in ALLOWED:
                check(old, new)
            else:
                with pytest.raises(AssertionError, match=f"{old.name} -> {new.name}"):
                    check(old, new)


def test_a_process_is_made_in_starting_only():
    entering = {
        (old, new) for old in ServiceState for new in TRANSITIONS[old] if new in HAS_PROCESS and old not in HAS_PROCESS
    }
    assert {new for _, new in entering} == {ServiceState.STARTING}


@pytest.mark.parametrize(
    ("state", "starting_up", "action"),
    [
        (ServiceState.STOPPING, True, Action.EXPECTED),
        (ServiceState.STOPPING, False, Action.EXPECTED),
        (ServiceState.STARTING, True, Action.ABORT_START),
        (ServiceState.RUNNING, True, Action.ABORT_START),
        (ServiceState.RUNNING, False, Action.REPORT),
        (ServiceState.STARTING, False, Action.REPORT),
    ],
)
def test_what_an_exit_means(state, starting_up, action):
    assert on_exit(state, starting_up=starting_up) is action


def test_the_plan_names_services_and_commands():
    config = Config(models=(ModelConfig("demo"), ModelConfig("big", "/models/big")))
    stages = make_plan(config, Path("/etc/llmosd.toml"), RunDir("/run/llmosd"))
    assert [[spec.name for spec in stage] for stage in stages] == [
        ["microkernel"],
        ["storage", "tokenizer", "executor.demo", "executor.big"],
        ["gateway"],
    ]
    common = ("--run-dir", "/run/llmosd", "--name")
    assert stages[0][0].command == (
        *(sys.executable, "-P", "-m", "llmos.microkernel.main"),
        *(*common, "microkernel", "--config", "/etc/llmosd.toml"),
    )
    assert stages[1][3].role == "executor"
    assert stages[1][3].command == (
        *(sys.executable, "-P", "-m", "llmos.services.executor"),
        *(*common, "executor.big", "--config", "/etc/llmosd.toml", "--model", "big"),
    )


def test_without_a_file_children_get_no_config_option():
    stages = make_plan(Config(), None, RunDir("/run/llmosd"))
    assert all("--config" not in spec.command for stage in stages for spec in stage)
