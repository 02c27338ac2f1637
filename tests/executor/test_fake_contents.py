"""The fake backend's memory of what pages hold: honest plans pass, every planted mistake is caught and located."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from plan_driver import PlanDriver

from llmos.protocol.codec import pack_i32, unpack_i32
from llmos.protocol.messages import StepPlan
from llmos.services.executor.backend import Limits
from llmos.services.executor.fake import FakeBackend, fake_token
from llmos.services.executor.fake_contents import PageContents, text_hashes
from llmos.services.executor.page_moves import PageMoves


def test_a_hash_stands_for_the_whole_text():
    first, second = (text_hashes(np.array(tokens, dtype=np.int32)).tolist() for tokens in ([7, 8, 9, 7], [7, 5, 9, 7]))
    assert [a == b for a, b in zip(first, second)] == [True, False, False, False]
    assert len({0, *first, *second}) == 8


class Changed:
    """A backend whose plans are changed on the way."""

    def __init__(self, backend, change) -> None:
        self.backend = backend
        self.capabilities = backend.capabilities
        self.change = change

    def execute(self, plan: StepPlan):
        return self.backend.execute(self.change(plan))


def make_fake(*, check: bool = True, num_pages: int = 64) -> FakeBackend:
    return FakeBackend(
        Limits(8, 128), vocab_size=500, max_context=256, num_pages=num_pages, page_size=4, host_pages=40, check=check
    )


def fork_and_swap(backend) -> PlanDriver:
    """Forks from a partial page, then two sequences that change places between pages and host pages, in one plan."""
    driver = PlanDriver(backend, chunk=7)
    parent = driver.add(range(10, 20), 20, seed=1)
    for _ in range(5):
        driver.step()
    driver.fork(parent, 25, seed=2)
    late = driver.fork(parent, 20, prompt=[*parent.tokens[:10], 3, 4], seed=3)
    assert (late.computed, parent.computed) == (10, 13), "its copy holds two tokens of the parent that are not its own"
    first, second = driver.add(range(30, 50), 30, seed=4), driver.add(range(60, 75), 30, seed=5)
    for _ in range(6):
        driver.step()
    driver.swap_out(first)
    for _ in range(2):
        driver.step()
    driver.swap_out(second)
    driver.swap_in(first)
    for _ in range(2):
        driver.step()
    driver.swap_in(second)
    driver.run()
    return driver


def test_honest_plans_pass():
    driver = fork_and_swap(make_fake())
    for seq in driver.seqs:
        expected = [fake_token(seq.params.seed, len(seq.tokens) - 5 + i, 500) for i in range(5)]
        assert seq.tokens[-5:] == expected


def test_forks_swaps_prefix_hits_and_preemption_of_many_pass():
    driver = PlanDriver(make_fake(num_pages=300), chunk=5)
    parent = driver.add(range(33), 60, seed=1)
    for _ in range(10):
        driver.step()
    driver.add([*range(33), 7], 9, prefix_of=parent, seed=2)
    children = [driver.fork(parent, 40, seed=seed) for seed in range(3, 7)]
    driver.step()
    driver.release(children[0])
    driver.swap_out(children[1])
    for _ in range(9):
        driver.step()
    driver.swap_in(children[1])
    driver.run()
    assert [len(seq.output) for seq in driver.seqs] == [60, 9, 40, 40, 40, 40]


def replaced(**changes):
    """Change fields of a plan: {field: function of its int32 values}."""

    def change(plan: StepPlan) -> StepPlan:
        found = {name: pack_i32(make(unpack_i32(getattr(plan, name)).tolist())) for name, make in changes.items()}
        return msgspec.structs.replace(plan, **found)

    return change


def uncopied(plan: StepPlan) -> StepPlan:
    """The child writes into its parent's page."""
    source_of = dict(zip(*[iter(unpack_i32(plan.copies).tolist()[::-1])] * 2))
    adds = [
        msgspec.structs.replace(
            add, pages=pack_i32(source_of.get(page, page) for page in unpack_i32(add.pages).tolist())
        )
        for add in plan.row_adds
    ]
    return msgspec.structs.replace(plan, row_adds=tuple(adds), copies=b"")


MISTAKES = {
    "a copy is missing": (replaced(copies=lambda pairs: []), "needs its own text, not nothing"),
    "one of two copies is missing": (replaced(copies=lambda pairs: pairs[2:]), "needs its own text, not nothing"),
    "a copy has the wrong target": (
        replaced(copies=lambda pairs: [page if i % 2 == 0 else i for i, page in enumerate(pairs)]),
        "needs its own text, not nothing",
    ),
    "a copy has the wrong source": (
        replaced(copies=lambda pairs: [page if i % 2 else 63 for i, page in enumerate(pairs)]),
        "needs its own text, not another text",
    ),
    "a page is shared that must be copied": (uncopied, "needs its own text, not nothing"),
    "nothing is swapped out": (replaced(swap_out=lambda pairs: []), "needs its own text, not nothing"),
    "nothing is swapped in": (replaced(swap_in=lambda pairs: []), "needs its own text, not"),
    "one page is not swapped in": (replaced(swap_in=lambda pairs: pairs[2:]), "needs its own text, not"),
    "host pages in the wrong order": (
        replaced(swap_in=lambda pairs: [pairs[i - 2] if i % 2 == 0 else pairs[i] for i in range(len(pairs))]),
        "needs its own text, not another text",
    ),
    "pages swapped out to the wrong places": (
        replaced(swap_out=lambda pairs: [pairs[i - 2] if i % 2 else pairs[i] for i in range(len(pairs))]),
        "needs its own text, not another text",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_planted_mistake_is_caught(mistake):
    change, complaint = MISTAKES[mistake]
    with pytest.raises(AssertionError, match=rf"row \d, position \d+, page \d+: {complaint}"):
        fork_and_swap(Changed(make_fake(), change))
    fork_and_swap(Changed(make_fake(check=False), change))  # without the check nobody notices


def test_two_rows_that_write_into_one_page_are_caught():
    driver = PlanDriver(Changed(make_fake(), uncopied))
    parent = driver.add(range(10), 30, seed=1)
    for _ in range(4):
        driver.step()
    twin = driver.fork(parent, 30, seed=2)
    assert (twin.computed, parent.pages[3]) == (13, 60)
    with pytest.raises(AssertionError, match=r"row \d, position 14, page 60: would overwrite another text"):
        driver.run()


def test_swapping_in_before_swapping_out_is_caught(monkeypatch):
    in_order = PageContents.move

    def reversed_order(self, moves: PageMoves) -> None:
        in_order(self, PageMoves([], moves.swap_in, moves.copies))
        in_order(self, PageMoves(moves.swap_out, [], []))

    monkeypatch.setattr(PageContents, "move", reversed_order)
    with pytest.raises(AssertionError, match=r"row \d, position 0, page \d+: needs its own text, not another text"):
        fork_and_swap(make_fake())


def test_what_an_earlier_generation_left_is_void():
    backend = make_fake()
    parent = PlanDriver(backend).add(range(10), 20, seed=1)
    first = PlanDriver(backend)
    first.seqs.append(parent)
    first.step()
    backend.reset()
    second = PlanDriver(backend)
    second.fork(parent, 5, seed=1)
    with pytest.raises(AssertionError, match="position 0, page 63: needs its own text, not nothing"):
        second.run()
