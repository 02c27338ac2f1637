"""Forks and swaps on the real CPU backend: greedy output equals transformers' and that of an undisturbed run."""

from __future__ import annotations

import pytest
import torch
from cpu_reference import check_logprobs, generate, open_cpu, open_poisoned, prompt, saved_model
from plan_driver import PlanDriver, Seq

from llmos.protocol.codec import pack_i32, unpack_i32
from llmos.protocol.messages import RowAdd, StepPlan
from llmos.protocol.params import SamplingParams

pytestmark = pytest.mark.slow

KINDS = ("llama-tied", "qwen3", "mistral-window")
HOST_GIB = 0.01


def run_alone(directory, tokens: list[int], max_tokens: int, chunk: int, **params) -> Seq:
    driver = PlanDriver(open_cpu(directory), chunk=chunk)
    seq = driver.add(tokens, max_tokens, logprobs=2, **params)
    driver.run()
    return seq


@pytest.mark.parametrize("kind", KINDS)
def test_forks_that_share_a_partial_page_go_their_own_ways(kind):
    model, directory = saved_model(kind)
    driver = PlanDriver(open_cpu(directory), chunk=21)
    parent = driver.add(prompt(21), 40, logprobs=2)
    driver.step()
    child = driver.fork(parent, 40, prompt=[*prompt(21), *prompt(6, seed=1)], logprobs=2)
    assert (child.pages[:2], child.computed) == (parent.pages[:2], 21)
    assert child.pages[2] not in parent.pages
    driver.step()
    for _ in range(9):
        driver.step()
    late = driver.fork(parent, 40, prompt=[*parent.tokens[:27], *prompt(3, seed=2)], logprobs=2)
    assert late.computed == 27 < parent.computed, "the copied page holds tokens of the parent that are not the child's"
    twin = driver.fork(parent, 40, logprobs=2)
    driver.run()
    for seq in (parent, child, late):
        assert seq.tokens == generate(model, seq.prompt, 40)
        check_logprobs(model, seq)
    assert twin.tokens == parent.tokens
    assert twin.logprobs == parent.logprobs[-len(twin.logprobs) :]
    assert len(twin.logprobs) == 29
    for seq in (parent, child):
        alone = run_alone(directory, seq.prompt, 40, chunk=21)
        assert (seq.tokens, seq.logprobs) == (alone.tokens, alone.logprobs)


def test_sixty_four_forks_of_one_prompt():
    _, directory = saved_model("qwen3")

    def open_driver(num_pages: int) -> PlanDriver:
        return PlanDriver(open_cpu(directory, num_pages=num_pages, max_rows=65), chunk=100)

    driver = open_driver(13 + 64 + 64)  # a page to share, one of its own and one more for each
    parent = driver.add(prompt(100), 1)
    driver.step()  # page 13 holds 4 tokens; the parent has ended, so its pages are what the forks hold
    parent.pages, parent.computed = driver.free_pages[-13:], 100
    driver.free_pages = driver.free_pages[:-13]
    settings = [{"temperature": 0.9, "seed": seed, "logprobs": 1} for seed in range(64)]
    forks = [driver.fork(parent, 8, **params) for params in settings]
    assert len(driver.free_pages) == 64, "each has copied one page and shares 12"
    driver.run()

    apart = open_driver(64 * 14)
    others = [apart.add(prompt(100), 8, **params) for params in settings]
    for seq in others:
        seq.tokens = list(parent.tokens)
    apart.run()
    assert [seq.tokens for seq in forks] == [seq.tokens for seq in others]
    assert [seq.logprobs for seq in forks] == [seq.logprobs for seq in others]
    assert len({tuple(seq.tokens) for seq in forks}) > 60


LENGTHS = (5, 24, 39, 70)
MAX_TOKENS = 30


def swap_in_the_middle(backend) -> list[Seq]:
    """Two of four rows are swapped out half decoded, their pages are used by others, and they come back to other pages."""
    driver = PlanDriver(backend, chunk=32)
    seqs = [driver.add(prompt(length), MAX_TOKENS, logprobs=2) for length in LENGTHS]
    for _ in range(12):
        driver.step()
    swapped = seqs[1:3]
    before = {page for seq in swapped for page in seq.pages}
    for seq in swapped:
        assert 0 < len(seq.output) < MAX_TOKENS
        driver.swap_out(seq)
    for seed in (8, 9):
        driver.add(prompt(100, seed=seed), 20)
    for _ in range(4):
        driver.step()
    written = {page for seq in driver.seqs for page in seq.pages}
    assert before <= written, "the test is about pages that others have written"
    driver.run()
    driver.free_pages.sort(key=lambda page: page not in before)  # the last is taken first
    for seq in swapped:
        driver.swap_in(seq)
    assert not before.intersection(page for seq in swapped for page in seq.pages)
    driver.run()
    return seqs


@pytest.mark.parametrize("page_size", [8, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_swapping_changes_no_bit(dtype, page_size):
    model, directory = saved_model("llama3-rope-untied")

    def backend():
        return open_cpu(directory, dtype=dtype, page_size=page_size, num_pages=80, host_cache_gib=HOST_GIB)

    found = swap_in_the_middle(backend())
    driver = PlanDriver(backend(), chunk=32)
    expected = [driver.add(prompt(length), MAX_TOKENS, logprobs=2) for length in LENGTHS]
    driver.run()
    assert [seq.tokens for seq in found] == [seq.tokens for seq in expected]
    assert [seq.logprobs for seq in found] == [seq.logprobs for seq in expected]
    if dtype == "float32":
        assert [seq.tokens for seq in found] == [generate(model, prompt(length), MAX_TOKENS) for length in LENGTHS]


@pytest.mark.parametrize("lost", ["swap_out", "swap_in"])
def test_a_lost_swap_changes_the_output(lost, monkeypatch):
    """Guards the test above."""
    model, directory = saved_model("llama3-rope-untied")
    backend = open_cpu(directory, num_pages=80, host_cache_gib=HOST_GIB)
    monkeypatch.setattr(backend.host, lost, lambda pairs: None)
    found = swap_in_the_middle(backend)
    expected = [generate(model, prompt(length), MAX_TOKENS) for length in LENGTHS]
    assert [seq.tokens == tokens for seq, tokens in zip(found, expected)] == [True, False, False, True]


def test_swap_and_fork_in_one_plan():
    """One sequence leaves, its pages go to one that comes back, a third is forked; all in the same plan."""
    model, directory = saved_model("qwen3")
    driver = PlanDriver(open_cpu(directory, num_pages=40, host_cache_gib=HOST_GIB))
    seqs = [driver.add(prompt(length), MAX_TOKENS) for length in (20, 30, 40)]
    for _ in range(5):
        driver.step()
    first, second, third = seqs
    driver.swap_out(first)
    driver.step()
    pages = list(second.pages)
    driver.swap_out(second)
    driver.swap_in(first)
    assert set(first.pages) < set(pages)
    twin = driver.fork(third, MAX_TOKENS)
    driver.step()
    driver.swap_in(second)
    driver.run()
    for seq in (*seqs, twin):
        assert seq.tokens == generate(model, seq.prompt, MAX_TOKENS)


def test_a_plan_of_moves_alone_computes_nothing(monkeypatch):
    _, directory = saved_model("llama-tied")
    backend = open_cpu(directory, num_pages=4, host_cache_gib=HOST_GIB)
    backend.cache.words[2] = 5
    monkeypatch.setattr(backend.decoder, "forward", None)
    moves = (pack_i32(pair) for pair in ((2, 1), (1, 0), (0, 3)))
    output = backend.execute(StepPlan(1, 1, b"", (), b"", b"", b"", *moves))
    assert (output.samples, output.logprobs, output.failed) == (b"", (), b"")
    assert [int(page.unique()) for page in backend.cache.words] == [5, 0, 5, 5]


def test_nothing_not_even_nan_is_seen_behind_the_copied_tokens():
    _, directory = saved_model("llama-tied")
    tokens, params = [1, 2, 3, 4, 9], SamplingParams(temperature=0.0, seed=0)
    backend = open_poisoned(directory)
    poisoned = RowAdd(0, 1, pack_i32([*tokens[:4], 5, 7]), 6, 0, pack_i32([0]), params)
    backend.execute(StepPlan(1, 1, b"", (poisoned,), b"", pack_i32([0, 0, 5, 0]), b""))
    assert backend.execute(StepPlan(1, 2, b"", (), b"", b"", pack_i32([0]))).failed
    assert torch.isnan(backend.cache._storage[:, :, 0, :, 5]).any(), "the test is about a page that holds NaN"
    child = RowAdd(1, 2, pack_i32(tokens), 5, 4, pack_i32([1]), params)
    copies = {"copies": pack_i32([0, 1])}
    output = backend.execute(StepPlan(1, 3, b"", (child,), b"", b"", pack_i32([1]), **copies))
    assert output.failed == b""
    assert unpack_i32(output.samples)[2] == run_alone(directory, tokens, 1, chunk=4).output[0]
