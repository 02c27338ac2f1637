"""Records of ended sequences, so that a client can still collect: kept for a time, bounded in number and tokens, oldest first to go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llmos.microkernel.expiry import Expiry
from llmos.microkernel.sequence import Sequence

MAX_RECORDS = 100_000
MAX_TOKENS = 50_000_000  # 200 MB


class Archive(Mapping[int, Sequence]):
    """By rid, in order of their ends. Invariant: `num_tokens` counts the tokens of all records, and the words of their results."""

    def __init__(self, retention_s: float) -> None:
        self._retention_s = retention_s
        self._records: dict[int, Sequence] = {}
        self._age = Expiry()
        self.num_tokens = 0

    def __getitem__(self, rid: int) -> Sequence:
        return self._records[rid]

    def __iter__(self) -> Iterator[int]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def keep(self, seq: Sequence) -> None:
        assert seq.ended_at is not None
        self._records[seq.rid] = seq
        self._age.touch(seq.rid, seq.ended_at)
        self.num_tokens += _size(seq)

    def next_to_forget(self, now: float) -> Sequence | None:
        """Whose time is over, or who has to make room; it is taken out."""
        rid = self._age.older_than(now - self._retention_s)
        if rid is None and (len(self) > MAX_RECORDS or self.num_tokens > MAX_TOKENS):
            rid = self._age.oldest()
        if rid is None:
            return None
        self._age.drop(rid)
        seq = self._records.pop(rid)
        self.num_tokens -= _size(seq)
        return seq

    def check(self) -> None:
        """Assert the invariants; O(records)."""
        assert self.num_tokens == sum(map(_size, self.values()))
        assert all(seq.reason is not None and not seq.page_table for seq in self.values())


def _size(seq: Sequence) -> int:
    return len(seq.tokens) + len(seq.result)
