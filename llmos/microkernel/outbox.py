"""Effects of the microkernel: messages to peers, with all tokens of one event gathered into one batch per gateway."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmos.microkernel.commit import Outcome
from llmos.microkernel.sequence import NOBODY, Sequence
from llmos.protocol.messages import Message, ResultEntry, RowLogprobs, SeqEnd, SeqTokens, TokenEntry, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Send:
    """Deliver `message` to `peer`."""

    peer: int
    message: Message


@dataclass(slots=True)
class _Batch:
    entries: list[TokenEntry] = field(default_factory=list)
    ends: list[SeqEnd] = field(default_factory=list)
    columns: bytes = b""
    results: list[ResultEntry] = field(default_factory=list)


class Outbox:
    """Collects effects until `drain`. A sequence's tokens always precede its end."""

    def __init__(self) -> None:
        self._sends: list[Send] = []
        self._batches: dict[int, _Batch] = {}

    def send(self, peer: int, message: Message) -> None:
        self._sends.append(Send(peer, message))

    def tokens(self, outcome: Outcome, logprobs: tuple[RowLogprobs, ...]) -> bytes:
        """All tokens of a step, to their readers. At most one step is handled between two drains.

        Returns them all as int64[n,3] (rid, offset in the output, token).
        """
        if outcome.batches is not None and not logprobs:
            for peer, columns_of_peer in outcome.batches:
                self._batch(peer).columns = columns_of_peer
            return outcome.everything
        rest: NDArray[np.bool_] = np.ones(len(outcome.tokens), bool)
        if logprobs:
            found = {(entry.row, entry.position): entry.logprobs for entry in logprobs}
            for place, address in enumerate(zip(outcome.rows.tolist(), outcome.positions.tolist())):
                if address in found:
                    rest[place] = False
                    if outcome.readers[place] != NOBODY:
                        self._entry(outcome, place, found[address])
        columns = np.empty((len(outcome.tokens), 3), "<i8")
        columns[:, 0], columns[:, 1], columns[:, 2] = outcome.rids, outcome.offsets, outcome.tokens
        everything = columns.tobytes()
        for peer in sorted(set(outcome.readers[rest].tolist()) - {NOBODY}):
            batch = self._batch(peer)
            assert not batch.columns
            chosen = rest & (outcome.readers == peer)
            batch.columns = everything if chosen.all() else columns[chosen].astype("<i8").tobytes()
        return everything

    def _entry(self, outcome: Outcome, place: int, logprobs: TokenLogprobs) -> None:
        seq = outcome.seqs[place]
        entry = TokenEntry(seq.rid, int(outcome.offsets[place]), (int(outcome.tokens[place]),), (logprobs,))
        self._batch(seq.reader).entries.append(entry)

    def results(self, found: list[tuple[Sequence, int, bytes]]) -> None:
        """What a step computed beside tokens, to the readers."""
        for seq, start, values in found:
            if seq.reader != NOBODY:
                self._batch(seq.reader).results.append(ResultEntry(seq.rid, start, values))

    def end(self, peer: int, end: SeqEnd) -> None:
        if peer != NOBODY:
            self._batch(peer).ends.append(end)

    def forget(self, peer: int) -> None:
        """Nothing more for a peer that is gone."""
        self._batches.pop(peer, None)
        self._sends = [send for send in self._sends if send.peer != peer]

    def drain(self) -> list[Send]:
        """All effects since the last drain, batches first: a waiting client beats a control answer."""
        if not self._sends and not self._batches:
            return []
        sends = [
            Send(peer, SeqTokens(tuple(batch.entries), tuple(batch.ends), batch.columns, tuple(batch.results)))
            for peer, batch in self._batches.items()
        ] + self._sends
        self._sends = []
        self._batches = {}
        return sends

    def _batch(self, peer: int) -> _Batch:
        batch = self._batches.get(peer)
        if batch is None:
            batch = self._batches[peer] = _Batch()
        return batch
