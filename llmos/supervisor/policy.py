"""What to do when a child exits: one pure function, so that the restart policy is a table and not a habit.

Today a death while running is reported and the service stays down (state FATAL), whichever service it is: the daemon
keeps running, so that what is left can be inspected and sequences end with a typed reason. Restarts with backoff will
be further answers of `on_exit`.
"""

from __future__ import annotations

from enum import Enum

from llmos.codes import ServiceState


class Action(Enum):
    """What the supervisor does about an exit."""

    EXPECTED = "expected"  # it was asked to stop
    ABORT_START = "abort_start"  # the daemon can not start: stop everything, say why
    REPORT = "report"  # log it, tell the microkernel, keep running


def on_exit(state: ServiceState, *, starting_up: bool) -> Action:
    """The answer to the exit of a process in `state`; `starting_up` until the daemon as a whole serves."""
    if state is ServiceState.STOPPING:
        return Action.EXPECTED
    return Action.ABORT_START if starting_up else Action.REPORT
