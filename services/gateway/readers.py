"""Which request here reads which sequence, pure.

The microkernel knows one reader per sequence, and of it only that it is at this gateway. So a request that leaves while another
one is asking for the same sequence must not take its reader away: what the leaving one has to say (SeqDetach, SeqCancel) is kept
until the microkernel has answered. If it gave the sequence to the other one, the first had been replaced and says nothing; if it
refused, the message is sent after all.

States of a sequence: unread -> read (begins) -> unread (ends, replaced, leaves, the microkernel died). Invariant: a sequence that the
microkernel sends to this gateway is read by a request, or the message that stops it is on its way or kept.
"""

from __future__ import annotations

from llmos.protocol.messages import Message, SeqCancel, SeqDetach
from llmos.services.gateway.streams import Stream


class Readers:
    """Sequences by rid."""

    def __init__(self) -> None:
        self._reading: dict[int, Stream] = {}
        self._asking: dict[int, set[int]] = {}  # numbers of the requests that have asked for it and have no answer yet
        self._kept: dict[int, SeqDetach | SeqCancel] = {}

    def get(self, rid: int) -> Stream | None:
        return self._reading.get(rid)

    def asks(self, stream: Stream) -> None:
        """It wants to read its sequence. Idempotent."""
        self._asking.setdefault(stream.rid, set()).add(stream.number)

    def answered(self, stream: Stream, kernel: list[Message], *, is_granted: bool) -> None:
        """The microkernel's answer to it, or nobody waits for it any more."""
        if is_granted:
            self._kept.pop(stream.rid, None)
        asking = self._asking.get(stream.rid, set())
        asking.discard(stream.number)
        if not asking:
            self._asking.pop(stream.rid, None)
            if stream.rid in self._kept:
                kernel.append(self._kept.pop(stream.rid))

    def begins(self, stream: Stream) -> Stream | None:
        """Its output comes here from now on; returns the request that read it until now."""
        older = self._reading.get(stream.rid)
        self._reading[stream.rid] = stream
        return older if older is not stream else None

    def stops(self, rid: int) -> Stream | None:
        """No more output comes: it ended, or another gateway has it. Returns the request that read it."""
        self._kept.pop(rid, None)
        return self._reading.pop(rid, None)

    def leaves(self, message: SeqDetach | SeqCancel, kernel: list[Message]) -> None:
        """Its reader does not want more."""
        if message.rid in self._asking:
            self._kept[message.rid] = message
        else:
            kernel.append(message)

    def forget(self, stream: Stream, kernel: list[Message]) -> None:
        """A request that is over."""
        self.answered(stream, kernel, is_granted=False)
        if self._reading.get(stream.rid) is stream:
            del self._reading[stream.rid]

    def clear(self) -> None:
        """The microkernel is gone."""
        self._reading.clear()
        self._asking.clear()
        self._kept.clear()
