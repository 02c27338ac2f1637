"""The page pool: exact page ids and order, and a Hypothesis state machine against a naive model."""

from __future__ import annotations

from array import array
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmos.microkernel.pages import PagePool


def test_pages_are_granted_in_ring_order_and_come_back_behind_the_others():
    pool = PagePool(6, lambda page: None)
    first = pool.grant(3)
    assert first == [0, 1, 2]
    pool.release(first, after_step=1)
    assert pool.grant(2) == [3, 4]  # 0..2 are in quarantine
    pool.complete(1)
    assert pool.grant(4) == [5, 2, 1, 0]


def test_quarantine_lasts_until_the_last_step_that_could_touch_the_page():
    pool = PagePool(2, lambda page: None)
    (page,) = pool.grant(1)
    pool.release([page], after_step=7)
    pool.complete(6)
    assert pool.num_quarantined == 1
    pool.complete(7)
    assert (pool.num_quarantined, pool.available) == (0, 2)


def test_cached_pages_are_evicted_tail_first_and_least_recently_used_first():
    evicted: list[int] = []
    pool = PagePool(4, evicted.append)
    old, new = pool.grant(2), pool.grant(2)
    for page in (*old, *new):
        pool.know(page)
    pool.release(old, 0)
    pool.release(new, 0)
    pool.complete(0)
    assert pool.grant(3) == [1, 0, 3]
    assert evicted == [1, 0, 3]


def test_a_page_in_quarantine_can_be_shared_again():
    pool = PagePool(2, lambda page: None)
    (page,) = pool.grant(1)
    pool.know(page)
    pool.release([page], 3)
    pool.share(page)
    pool.complete(3)
    assert pool.refs[page] == 1
    pool.check()


def test_a_long_page_table_is_released_like_a_short_one():
    """From 16 pages on the pool uses vector operations: same states, same order."""
    for count in (15, 16, 40):
        pool = PagePool(50, lambda page: None)
        pages = array("i", pool.grant(count))
        shared = pages[: count // 2]
        pool.share_used(shared)
        assert pool.release(pages, 1) == list(reversed(pages[count // 2 :]))
        assert pool.release(shared, 2) == list(reversed(shared))
        pool.complete(2)
        assert pool.grant(50)[-count:] == [*reversed(pages[count // 2 :]), *reversed(shared)]
        pool.check()


def test_releasing_twice_is_our_bug():
    pool = PagePool(2, lambda page: None)
    pages = pool.grant(1)
    pool.release(pages, 0)
    with pytest.raises(AssertionError, match="released once too often"):
        pool.release(pages, 0)


class PoolMachine(RuleBasedStateMachine):
    """Random tables, sharing, release and completion; the model is a plain multiset of references."""

    def __init__(self) -> None:
        super().__init__()
        self.evicted: list[int] = []
        self.pool = PagePool(12, self.evicted.append)
        self.tables: list[list[int]] = []
        self.known: set[int] = set()
        self.step = 0

    @rule(count=st.integers(1, 5))
    def grow(self, count: int) -> None:
        if count <= self.pool.available:
            before = len(self.evicted)
            pages = self.pool.grant(count)
            assert len(set(pages)) == count
            assert not {p for table in self.tables for p in table} & set(pages), "granted a page that is in use"
            self.known -= set(self.evicted[before:])
            assert not self.known & set(pages)
            self.tables.append(pages)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def index(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(data.draw(st.sampled_from(self.tables))))
        self.pool.know(page)
        self.known.add(page)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def hit(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.known)))
        self.pool.share(page)
        self.tables.append([page])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        shared = table[: data.draw(st.integers(1, len(table)))]
        self.pool.share_used(array("i", shared))
        self.tables.append(shared)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def write_in_place(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.known)))
        if self.pool.refs[page] == 1:
            self.pool.forget(page)
            assert self.evicted[-1] == page
            self.known.discard(page)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        freed = self.pool.release(array("i", self.tables.pop(index)), self.step)
        assert set(freed) == {page for page in freed if all(page not in table for table in self.tables)}

    @rule()
    def issue(self) -> None:
        self.step += 1

    @rule(behind=st.integers(0, 2))
    def complete(self, behind: int) -> None:
        self.pool.complete(self.step - behind)

    @invariant()
    def consistent(self) -> None:
        self.pool.check()
        held = Counter(page for table in self.tables for page in table)
        assert [held[page] for page in range(12)] == self.pool.refs.tolist()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
