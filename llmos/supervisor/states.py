"""States of a child process and the transitions that are allowed; everything else is a bug.

    STOPPED --> STARTING --> RUNNING --> STOPPING --> STOPPED
                 |  |  ^        |  |
                 |  |  +-BACKOFF<--+   (dead, waits to be started again: policy.py)
                 |  +--> STOPPING
                 +-----> FATAL <---+   (dead, and stays dead unless somebody asks for it: then STARTING again)

A pid exists in STARTING, RUNNING and STOPPING, and only there. STARTING ends by ServiceReady, RUNNING by the exit of
the process.
"""

from __future__ import annotations

from llmos.codes import ServiceState

_S = ServiceState
TRANSITIONS: dict[ServiceState, frozenset[ServiceState]] = {
    _S.STOPPED: frozenset({_S.STARTING}),
    _S.STARTING: frozenset({_S.RUNNING, _S.STOPPING, _S.BACKOFF, _S.FATAL}),
    _S.RUNNING: frozenset({_S.STOPPING, _S.BACKOFF, _S.FATAL}),
    _S.BACKOFF: frozenset({_S.STARTING, _S.STOPPED, _S.FATAL}),
    _S.STOPPING: frozenset({_S.STOPPED}),
    _S.FATAL: frozenset({_S.STARTING}),
}
HAS_PROCESS = frozenset({_S.STARTING, _S.RUNNING, _S.STOPPING})


def check(old: ServiceState, new: ServiceState) -> None:
    """Assert that a service may go from `old` to `new`."""
    assert new in TRANSITIONS[old], f"service state {old.name} -> {new.name}"
