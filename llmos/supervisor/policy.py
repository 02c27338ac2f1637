"""What to do when a child exits: one pure function over its record, so that the restart policy is data and not a habit.

A service that died is started again: at once the first time, then after growing pauses, until it has been ready for a while, which
clears its record. It is given up (FATAL) if it says itself that its configuration or model can not work, or if it dies too often in a
row. The daemon keeps running whichever service that is, so that what is left can be inspected.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from llmos.codes import ServiceState


class Action(Enum):
    """What the supervisor does about an exit."""

    EXPECTED = "expected"  # it was asked to stop
    RENEW = "renew"  # it was asked to stop so that another one takes its place
    ABORT_START = "abort_start"  # the daemon can not start: stop everything, say why
    RESTART = "restart"
    GIVE_UP = "give_up"  # log it, tell the microkernel, keep running without it


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Seconds. The n-th restart in a row comes `first_pause_s * 2**(n-2)` after the death, the first at once."""

    first_pause_s: float = 0.2
    longest_pause_s: float = 30.0
    stable_s: float = 10.0  # so long after it was ready a death is the first of a new row
    most_in_a_row: int = 10

    def pause_s(self, deaths_in_a_row: int) -> float:
        """Before the restart that follows this many deaths."""
        if deaths_in_a_row <= 1:
            return 0.0
        return min(self.longest_pause_s, self.first_pause_s * 2.0 ** (deaths_in_a_row - 2))


def on_exit(
    state: ServiceState,
    policy: RestartPolicy,
    deaths_in_a_row: int,
    *,
    starting_up: bool,
    hopeless: bool,
    renewing: bool = False,
    killed: bool = False,
) -> Action:
    """The answer to the exit of a process in `state`. `deaths_in_a_row` counts this one; `starting_up` until the daemon as a whole
    serves; `hopeless`: the process said that what it was configured with can not work; `renewing`: another one was wanted;
    `killed`: by a signal, which is no fault of what is being started."""
    if state is ServiceState.STOPPING:
        return Action.RENEW if renewing else Action.EXPECTED
    if starting_up and not (killed and deaths_in_a_row <= policy.most_in_a_row):
        return Action.ABORT_START
    return Action.GIVE_UP if hopeless or deaths_in_a_row > policy.most_in_a_row else Action.RESTART
