"""Whom a page counts for, against a naive model: all holders of each page in the order in which they came."""

from __future__ import annotations

import random
from array import array

import pytest

from llmos.microkernel.pages import PagePool
from llmos.microkernel.payers import Payers
from llmos.microkernel.tenants import TenantLimits, TenantTable

NAMES = ("alice", "bob", "carol")


def make() -> tuple[PagePool, Payers, list]:
    tenants = TenantTable(lambda name: TenantLimits())
    all_tenants = [tenants.get(name) for name in NAMES]
    return PagePool(8, lambda page: None), Payers(8, tenants), all_tenants


def test_the_next_holder_pays_when_the_first_lets_go():
    pool, payers, (alice, bob, carol) = make()
    pages = array("i", pool.grant(2))
    payers.take(pages, alice)
    for tenant in (bob, carol):
        payers.share(pages, tenant)
        pool.share_used(pages)
    assert [tenant.pages for tenant in (alice, bob, carol)] == [2, 0, 0]
    for tenant, expected in ((alice, [0, 2, 0]), (bob, [0, 0, 2])):
        payers.leave(pages, tenant, pool.refs)
        assert pool.release(pages, 1) == []
        assert [each.pages for each in (alice, bob, carol)] == expected
    payers.leave(pages, carol, pool.refs)
    payers.free(pool.release(pages, 1))
    assert [each.pages for each in (alice, bob, carol)] == [0, 0, 0]


def test_a_guest_that_leaves_changes_nothing():
    pool, payers, (alice, bob, _) = make()
    pages = array("i", pool.grant(1))
    payers.take(pages, alice)
    payers.share(pages, bob)
    pool.share_used(pages)
    payers.leave(pages, bob, pool.refs)
    pool.release(pages, 1)
    assert (alice.pages, bob.pages) == (1, 0)
    payers.check({pages[0]: [alice.index]})


def test_who_holds_a_page_twice_pays_until_both_are_gone():
    pool, payers, (alice, bob, _) = make()
    pages = array("i", pool.grant(1))
    payers.take(pages, alice)
    payers.share(pages, bob)
    payers.fork(pages, alice)
    pool.share_used(pages)
    pool.share_used(pages)
    for expected in ((1, 0), (0, 1)):
        payers.leave(pages, alice, pool.refs)
        pool.release(pages, 1)
        assert (alice.pages, bob.pages) == expected


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_sharing_and_letting_go(seed: int):
    rng = random.Random(seed)
    pool, payers, tenants = make()
    tables: list[tuple[int, array]] = []
    for step in range(300):
        kind = rng.random()
        if kind < 0.3 and pool.available:
            index = rng.randrange(3)
            table = array("i", pool.grant(rng.randint(1, pool.available)))
            payers.take(table, tenants[index])
            tables.append((index, table))
        elif kind < 0.55 and tables:
            _, table = rng.choice(tables)
            index, part = rng.randrange(3), table[: rng.randint(1, len(table))]
            payers.share(part, tenants[index])
            pool.share_used(part)
            tables.append((index, part))
        elif kind < 0.65 and tables:
            index, table = rng.choice(tables)
            payers.fork(table, tenants[index])
            pool.share_used(table)
            tables.append((index, table))
        elif tables:
            index, table = tables.pop(rng.randrange(len(tables)))
            payers.leave(table, tenants[index], pool.refs)
            freed = pool.release(table, step)
            if freed:
                payers.free(freed)
            pool.complete(step)
        holders: dict[int, list[int]] = {}
        for index, table in tables:
            for page in table:
                holders.setdefault(page, []).append(index)
        payers.check(holders)
