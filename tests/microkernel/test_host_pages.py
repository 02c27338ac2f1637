"""The pool of host pages."""

from __future__ import annotations

from array import array

import pytest

from llmos.microkernel.host_pages import HostPool


def test_pages_given_back_wait_until_the_plan_that_may_read_them_is_issued():
    pool = HostPool(3)
    pages = pool.grant(2)
    assert (pages, pool.num_free) == (array("i", [0, 1]), 1)
    pool.release(pages[:1])
    assert pool.num_free == 1
    pool.check([1])
    pool.settle()
    assert (pool.num_free, pool.grant(2)) == (2, array("i", [2, 0]))


def test_a_page_that_is_lost_or_held_twice_is_our_bug():
    pool = HostPool(2)
    pages = pool.grant(1)
    for held in ([], [0, 0], [1]):
        with pytest.raises(AssertionError, match="lost or held twice"):
            pool.check(held)
    pool.check(list(pages))
    with pytest.raises(AssertionError, match="2 host pages asked, 1 free"):
        pool.grant(2)
