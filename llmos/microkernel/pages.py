"""The page pool of one model: which KV page is free, used, cached or in quarantine. Ids only; tensors live in the executor.

Every page is in exactly one state:

    free        never written or forgotten; granted first, in ring order
    used        in refs[page] >= 1 page tables
    quarantine  in no page table, but a step that was issued before it was let go may still touch it
    cached      in no page table, its content is in the prefix cache; granted last, least recently used first

    free -> used -> quarantine -> free      (content unknown to the prefix cache)
                               -> cached -> used (prefix hit) | free (evicted)
    quarantine -> used                      (prefix hit while in quarantine)

Invariants: refs[page] = number of page tables that hold it; free + used + quarantine + cached = num_pages.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_BULK = 16  # from so many pages on one vector operation beats a loop


Pages = NDArray[np.int64]  # page ids


class _Ring:
    """Free pages, in the order in which they became free. Taking or putting back any number of them is a copy or two."""

    def __init__(self, num_pages: int) -> None:
        self._slots: Pages = np.arange(num_pages)
        self._first = 0
        self._count = num_pages

    def __len__(self) -> int:
        return self._count

    def take(self, count: int) -> Pages:
        """The first `count`; the caller has checked that they are there."""
        first, size = self._first, len(self._slots)
        end = first + count
        if end <= size:
            pages = self._slots[first:end].copy()
        else:
            pages = np.concatenate((self._slots[first:], self._slots[: end - size]))
        self._first, self._count = end % size, self._count - count
        return pages

    def put(self, pages: list[int]) -> None:
        size = len(self._slots)
        first = (self._first + self._count) % size
        before = min(len(pages), size - first)
        self._slots[first : first + before] = pages[:before]
        self._slots[: len(pages) - before] = pages[before:]
        self._count += len(pages)

    def all(self) -> list[int]:
        pages: list[int] = np.roll(self._slots, -self._first)[: self._count].tolist()
        return pages


class PagePool:
    """Grants and takes back pages. `on_evict(page)` is told when a cached page's content is given up."""

    def __init__(self, num_pages: int, on_evict: Callable[[int], None]) -> None:
        self.num_pages = num_pages
        self.refs: NDArray[np.int32] = np.zeros(num_pages, np.int32)
        self._free = _Ring(num_pages)
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._quarantine: deque[tuple[int, int]] = deque()  # (step, page)
        self._quarantined: dict[int, int] = {}  # page -> the step after which it is released
        self._known: set[int] = set()  # pages whose content the prefix cache knows
        self._on_evict = on_evict

    @property
    def available(self) -> int:
        """Pages that can be granted now."""
        return len(self._free) + len(self._cached)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantined)

    def num_cached_among(self, pages: list[int]) -> int:
        """How many of `pages` sharing would take out of `available`."""
        return sum(page in self._cached for page in pages)

    def forget(self, page: int) -> None:
        """Its one holder is about to write into this used page: the prefix cache must not count on its content."""
        assert self.refs[page] == 1
        if page in self._known:
            self._known.discard(page)
            self._on_evict(page)

    def grant(self, count: int) -> list[int]:
        """`count` pages with one reference each. The caller has checked `available`."""
        pages: list[int] = self.grant_array(count).tolist()
        return pages

    def grant_array(self, count: int) -> Pages:
        """The same, for many."""
        assert count <= self.available, f"{count} pages asked, {self.available} available"
        pages = self._free.take(min(count, len(self._free)))
        if len(pages) < count:
            pages = np.concatenate((pages, self._evict(count - len(pages))))
        assert not np.count_nonzero(self.refs[pages])
        self.refs[pages] = 1
        return pages

    def _evict(self, count: int) -> list[int]:
        """Give up the content of the cached pages that were used longest ago."""
        pages = [self._cached.popitem(last=False)[0] for _ in range(count)]
        self._known.difference_update(pages)
        for page in pages:
            self._on_evict(page)
        return pages

    def share(self, page: int) -> None:
        """One more page table holds `page` (prefix hit)."""
        if self.refs[page] == 0:
            assert page in self._known, f"page {page} has no content to share"
            if self._quarantined.pop(page, None) is None:
                del self._cached[page]
        self.refs[page] += 1

    def share_used(self, pages: array[int]) -> None:
        """One more page table holds all of `pages`, which others hold already (fork). No page is in it twice."""
        held = _ids(pages)
        counts = self.refs[held]
        assert counts.all(), "a page without holder can not be forked"
        counts += 1
        self.refs[held] = counts

    def release(self, pages: array[int], after_step: int) -> list[int]:
        """A page table lets go of `pages`. Returns those that nobody holds now.

        They become grantable when `complete(after_step)` is called; the last of `pages` is evicted first later.
        """
        if len(pages) >= _BULK:
            held = _ids(pages)
            counts = self.refs[held]
            counts -= 1
            self.refs[held] = counts
            assert counts.min() >= 0, "a page was released once too often"
            freed: list[int] = held[counts == 0][::-1].tolist()
        else:
            freed = []
            for page in reversed(pages):
                self.refs[page] -= 1
                assert self.refs[page] >= 0, f"page {page} released once too often"
                if self.refs[page] == 0:
                    freed.append(page)
        for page in freed:
            self._quarantined[page] = after_step
            self._quarantine.append((after_step, page))
        return freed

    def complete(self, step: int) -> None:
        """All steps up to `step` are done: end the quarantine of what they could touch."""
        # Pages of a swap wait for one step more than pages let go after it, so entries are not strictly in order of steps.
        freed = []
        while self._quarantine and self._quarantine[0][0] <= step:
            released_at, page = self._quarantine.popleft()
            # A page may have been shared, and even released again, since this entry was made.
            if self._quarantined.get(page) != released_at or self.refs[page]:
                continue
            del self._quarantined[page]
            if page in self._known:
                self._cached[page] = None
            else:
                freed.append(page)
        if freed:
            self._free.put(freed)

    def know(self, *pages: int) -> None:
        """The prefix cache has indexed the content of these used pages."""
        for page in pages:
            assert self.refs[page] > 0, f"page {page} was indexed, and nobody holds it"
        self._known.update(pages)

    def check(self) -> None:
        """Assert the invariants; O(pages)."""
        free, cached, quarantined = set(self._free.all()), set(self._cached), set(self._quarantined)
        used = set(np.flatnonzero(self.refs).tolist())
        assert len(free) == len(self._free), "a page is free twice"
        assert len(free) + len(cached) + len(quarantined) + len(used) == self.num_pages, "pages lost or in two states"
        assert free | cached | quarantined | used == set(range(self.num_pages))
        assert cached <= self._known
        assert not free & self._known


def _ids(pages: array[int]) -> Pages:
    """As an index. numpy would convert other integers at every use."""
    return np.frombuffer(pages, np.int32).astype(np.int64)
