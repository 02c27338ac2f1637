"""What a request asks of the microkernel, such that asking it again, of one that was started in place of one that died, does not do
it twice. Pure.

    SeqSubmit, SeqSpawn     they have a `client_request_id`, if not the client's then one of ours: asked again, the microkernel
                            names the sequence that it made
    SeqAppend, SeqContinue  Stat tells how long the sequence was before; asked again they expect that length, so the microkernel
                            knows whether it has done it already
    SeqAttach               may be asked any number of times
"""

from __future__ import annotations

from typing import Any

from msgspec import structs

from llmos.protocol.messages import Message, SeqAppend, SeqAttach, SeqContinue, SeqSpawn, SeqSubmit, Stat, Stats

Wanted = SeqSubmit | SeqSpawn | SeqAppend | SeqContinue | SeqAttach
_LEAST_DEADLINE_MS = 0.001


class Question:
    """`wanted`: as the client wants it, its tokens may be added later. `received`: when it came, by the gateway's clock, from where
    its deadline counts. `found`: the number of a sequence that is there already, and only to be read.
    """

    def __init__(self, wanted: Wanted, received: float = 0.0) -> None:
        self.wanted = wanted
        self.found = 0
        self.was_asked = False  # a microkernel may have done it
        self._received = received
        self._length: int | None = None  # of the sequence before it

    @property
    def is_submit(self) -> bool:
        """It makes a one-shot sequence."""
        return isinstance(self.wanted, SeqSubmit)

    def complete(self, **tokens: Any) -> None:
        """Add what came from the tokenizer."""
        self.wanted = structs.replace(self.wanted, **tokens)

    def message(self, now: float) -> Message:
        """What to ask now."""
        wanted = self.wanted
        if self.found:
            return SeqAttach(wanted.req, self.found, wanted.owner)
        if isinstance(wanted, (SeqAppend, SeqContinue)):
            if self._length is None:
                return Stat(wanted.req, wanted.rid, wanted.owner)
            wanted = structs.replace(wanted, expect=self._length if self.was_asked else None)
        if isinstance(wanted, (SeqSubmit, SeqContinue)):
            wanted = structs.replace(wanted, deadline_ms=deadline_left(wanted.deadline_ms, now - self._received))
        return wanted

    def sent(self, message: Message) -> None:
        """It is on its way to a microkernel."""
        self.was_asked |= not isinstance(message, Stat)

    def measured(self, message: Stats) -> None:
        """Nothing was asked yet but how long the sequence is."""
        self._length = message.num_tokens


def deadline_left(deadline_ms: float | None, elapsed_s: float) -> float | None:
    """What is left of a deadline when the microkernel can be asked; never 0, so that it refuses in its own words."""
    return None if deadline_ms is None else max(_LEAST_DEADLINE_MS, deadline_ms - elapsed_s * 1000)
