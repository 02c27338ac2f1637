"""The transition table, the policy and the plan: pure parts of the supervisor."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llmos.codes import ServiceState
from llmos.config import Config, ModelConfig
from llmos.ports.endpoint import RunDir
from llmos.supervisor.plan import ServiceSpec, make_plan
from llmos.supervisor.policy import Action, RestartPolicy, on_exit
from llmos.supervisor.service import Service
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
    ("FATAL", "STARTING"),  # only if somebody asks for it
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


POLICY = RestartPolicy(first_pause_s=0.2, longest_pause_s=30.0, stable_s=10.0, most_in_a_row=10)


@pytest.mark.parametrize(
    ("state", "starting_up", "deaths", "hopeless", "action"),
    [
        (ServiceState.STOPPING, True, 1, False, Action.EXPECTED),
        (ServiceState.STOPPING, False, 99, True, Action.EXPECTED),
        (ServiceState.STARTING, True, 1, False, Action.ABORT_START),
        (ServiceState.RUNNING, True, 1, False, Action.ABORT_START),
        (ServiceState.RUNNING, False, 1, False, Action.RESTART),
        (ServiceState.STARTING, False, 10, False, Action.RESTART),
        (ServiceState.STARTING, False, 11, False, Action.GIVE_UP),
        (ServiceState.STARTING, False, 1, True, Action.GIVE_UP),
    ],
)
def test_what_an_exit_means(state, starting_up, deaths, hopeless, action):
    assert on_exit(state, POLICY, deaths, starting_up=starting_up, hopeless=hopeless) is action


def test_a_start_goes_on_though_a_child_is_killed_but_not_for_ever():
    def answer(deaths: int) -> Action:
        return on_exit(ServiceState.STARTING, POLICY, deaths, starting_up=True, hopeless=False, killed=True)

    assert (answer(1), answer(10), answer(11)) == (Action.RESTART, Action.RESTART, Action.ABORT_START)


def test_pauses_grow_from_nothing_to_the_longest():
    assert [POLICY.pause_s(deaths) for deaths in range(1, 12)] == [
        *(0.0, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6),
        *(30.0, 30.0),
    ]


def test_a_stable_life_clears_the_record():
    service = Service(ServiceSpec("gateway", "gateway", ()))
    for death in range(1, 4):
        service.count_death(POLICY.stable_s, now=float(death))
        assert service.deaths_in_a_row == death
    service.ready_at = 100.0
    service.count_death(POLICY.stable_s, now=109.9)
    assert service.deaths_in_a_row == 4
    service.count_death(POLICY.stable_s, now=110.0)
    assert service.deaths_in_a_row == 1


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
