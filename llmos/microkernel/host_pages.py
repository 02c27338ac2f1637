"""Pages of host memory for KV that was swapped out of the pool. Ids only; the memory is the executor's.

A plan copies out before it copies in, so a host page that a plan reads may be written by the next plan but not by the same: pages given
back are grantable again after `settle`, when the plan that may read them was issued. Invariant: free + given back + held = num_pages.
"""

from __future__ import annotations

from array import array
from collections import deque


class HostPool:
    """Each page belongs to at most one sequence."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free: deque[int] = deque(range(num_pages))
        self._given_back: list[int] = []

    @property
    def num_free(self) -> int:
        """Pages that can be granted now."""
        return len(self._free)

    def grant(self, count: int) -> array[int]:
        """The caller has checked `num_free`."""
        assert count <= len(self._free), f"{count} host pages asked, {len(self._free)} free"
        return array("i", [self._free.popleft() for _ in range(count)])

    def release(self, pages: array[int]) -> None:
        self._given_back.extend(pages)

    def settle(self) -> None:
        """Every copy that was ordered is in an issued plan."""
        self._free.extend(self._given_back)
        self._given_back.clear()

    def check(self, held: list[int]) -> None:
        """Assert the invariant, given all pages that sequences hold."""
        everywhere = [*self._free, *self._given_back, *held]
        assert sorted(everywhere) == list(range(self.num_pages)), "host pages lost or held twice"
