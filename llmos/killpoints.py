"""Named places in the code at which a process can be made to kill itself, as `kill -9` at just that moment would. For tests of recovery.

`LLMOS_KILL_AT="NAME[:COUNT][@FILE],..."` arms some of them: the process dies when it gets there for the COUNT-th time (1 without it). With
`@FILE` only if it can rename FILE to FILE.PID, so that a process that is started again does not die of the same again, and whoever made
FILE learns which one it was. The variable is read once, when the process starts; without it `ARMED` is false and nothing here is called.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

VARIABLE = "LLMOS_KILL_AT"
POINTS: dict[str, str] = {
    "microkernel.start.begin": "nothing is read yet",
    "microkernel.start.restored": "the journal is read, no new segment is there",
    "microkernel.start.segment": "the new segment is there, and empty",
    "microkernel.start.ready": "before llmosd hears that it is ready",
    "microkernel.carry.some": "some sequences are in the new segment",
    "microkernel.carry.all": "all are in, the older segments are there",
    "microkernel.carry.deleted": "an older segment is deleted",
    "microkernel.greeted": "a peer said hello, and was not answered",
    "microkernel.received": "a message came, nothing is done about it",
    "microkernel.handled": "a message is handled, nothing is written",
    "microkernel.journal.before": "before a turn is written",
    "microkernel.journal.torn": "half of a turn is written",
    "microkernel.journal.after": "a turn is written, nobody heard of it",
    "microkernel.sent.one": "one of a turn's messages is sent",
    "microkernel.sent.all": "all of a turn's messages are sent",
    "microkernel.beat": "after a sign of life",
    "microkernel.death.heard": "the death of another process is handled",
    "executor.start.loaded": "the model is loaded, the microkernel does not know",
    "executor.start.announced": "it said what it can do",
    "executor.start.generation": "it got its generation",
    "executor.again.greeted": "it said hello to another microkernel",
    "executor.plan.received": "a plan came, nothing is computed",
    "executor.step.computed": "a step is computed, its result not sent",
    "executor.result.sent": "a result is sent",
    "executor.result.fifth": "five results are sent; with a plan in flight",
    "tokenizer.start.loaded": "the tokenizers are loaded, nobody can reach it",
    "tokenizer.received": "a message came, nothing is done about it",
    "tokenizer.encoded": "a prompt is encoded, nobody heard of it",
    "tokenizer.decoded": "tokens are text, nobody heard of it",
    "tokenizer.sent": "text is sent",
    "gateway.start.connected": "it reaches all services, clients can not reach it",
    "gateway.start.listening": "clients can reach it, llmosd does not know that it is ready",
    "gateway.client.received": "a client said something, nothing is done about it",
    "gateway.client.handled": "what a client said is passed on",
    "gateway.control.received": "a client asked a verb, nothing is done about it",
    "gateway.kernel.received": "the microkernel said something, nothing is done about it",
    "gateway.kernel.handled": "what the microkernel said is passed on",
    "gateway.text.received": "the tokenizer said something, nothing is done about it",
    "gateway.text.handled": "what the tokenizer said is passed on",
    "storage.start.registered": "the models are registered, the microkernel does not know it",
    "storage.received": "the microkernel said something, nothing is done about it",
    "storage.tenant.stored": "a tenant's limits are stored",
    "supervisor.start.first": "one child is started, the others not",
    "supervisor.start.ready": "all children are ready, it did not say so",
    "supervisor.death.seen": "a child died, it is not reaped",
    "supervisor.death.reaped": "a child is reaped, nobody was told",
    "supervisor.death.told": "a child's death is told, it is not started again",
    "supervisor.started": "a child is started again",
}
ARMED: Final = VARIABLE in os.environ


@dataclass(slots=True)
class _Trap:
    left: int
    file: str | None


class Traps:
    """The armed points of one process."""

    def __init__(self, text: str) -> None:
        self._traps: dict[str, _Trap] = {}
        for part in text.split(","):
            point, _, file = part.partition("@")
            name, _, count = point.partition(":")
            if name not in POINTS:
                raise ValueError(f"{VARIABLE}: no point {name!r}")
            self._traps[name] = _Trap(int(count or 1), file or None)

    def springs(self, name: str) -> bool:
        """Does the process die here and now?"""
        trap = self._traps.get(name)
        if trap is None:
            return False
        trap.left -= 1
        if trap.left > 0:
            return False
        if trap.file is None:
            return trap.left == 0
        try:
            os.rename(trap.file, f"{trap.file}.{os.getpid()}")
        except OSError:
            return False
        return True


_traps = Traps(os.environ[VARIABLE]) if ARMED else None


def reach(name: str, last_act: Callable[[], object] | None = None) -> None:
    """Die here if this point is armed; `last_act` is done before. To be called as `if ARMED: reach(...)`."""
    assert name in POINTS, name
    if _traps is not None and _traps.springs(name):
        if last_act is not None:
            last_act()
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
