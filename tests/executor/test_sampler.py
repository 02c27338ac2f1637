"""The sampler against a plain float64 loop, its distribution, and its independence of batch mates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import RowAdd
from llmos.protocol.params import SamplingParams
from llmos.services.executor import gumbel, noise, sampler
from llmos.services.executor.rows import RowTable

torch.set_num_threads(1)


def make_table(params: list[SamplingParams], tokens: list[list[int]] | None = None, prompt_len: int = 2) -> RowTable:
    table = RowTable(max_rows=len(params), max_context=64, page_size=64, num_pages=1)
    for row, entry in enumerate(params):
        known = tokens[row] if tokens else [1, 2, 3]
        table._add(RowAdd(row, row, pack_i32(known), min(prompt_len, len(known)), 0, pack_i32([0]), entry))
    return table


def sample_all(logits: torch.Tensor, table: RowTable) -> sampler.Sampled:
    return sampler.sample(logits.clone(), np.arange(len(logits)), table)


def reference_filter(logits: np.ndarray, params: SamplingParams, tokens: list[int], prompt_len: int) -> np.ndarray:
    """Scores in float64, -inf for what is filtered out: written from the definitions, one token at a time."""
    scores = logits.astype(np.float64)
    output = tokens[prompt_len:]
    for token in set(tokens):
        penalty = params.repetition_penalty or 1.0
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(output):
        scores[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    for token, bias in params.logit_bias:
        scores[token] += bias
    if len(output) < params.min_tokens:
        scores[list(params.stop_token_ids)] = -math.inf
    if params.temperature == 0:
        return scores
    scores = scores / (1.0 if params.temperature is None else params.temperature)
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    keep = order[: params.top_k] if params.top_k else order
    share = {token: math.exp(scores[token] - scores[order[0]]) for token in keep}
    total, reached, nucleus = sum(share.values()), 0.0, []
    for token in keep:
        if reached < (params.top_p or 1.0):
            nucleus.append(token)
        reached += share[token] / total
    kept = {token for token in nucleus if share[token] >= (params.min_p or 0.0)}
    return np.array([score if token in kept else -math.inf for token, score in enumerate(scores)])


def reference_token(logits: np.ndarray, params: SamplingParams, tokens: list[int], prompt_len: int) -> int:
    scores = reference_filter(logits, params, tokens, prompt_len)
    if params.temperature == 0:
        return int(scores.argmax())
    noisy = [score + noise.gumbel(params.seed, len(tokens), token) for token, score in enumerate(scores)]
    return int(np.argmax(noisy))


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([None, 0.0, 1e-40, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 0, 1, 2, 7, 40, 400, 10**6]),
    top_p=st.sampled_from([None, 1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([None, 0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([None, 1.0, 0.7, 1.8]),
    presence_penalty=st.sampled_from([0.0, 0.8, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.6]),
    logit_bias=st.sampled_from([(), ((3, 4.0), (9, -1e4))]),
    min_tokens=st.sampled_from([0, 3, 8]),
    stop_token_ids=st.sampled_from([(), (0, 5)]),
    seed=st.integers(0, 2**63 - 1),
    logprobs=st.sampled_from([None, 0, 4]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(PARAMS, min_size=1, max_size=6), st.integers(0, 2**31), st.sampled_from([24, 300]))
def test_every_row_equals_the_reference(params, seed, vocab_size):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3.0, size=(len(params), vocab_size)).astype(np.float32)
    tokens = [rng.integers(0, vocab_size, size=rng.integers(1, 12)).tolist() for _ in params]
    found = sample_all(torch.from_numpy(logits), make_table(params, tokens))
    expected = [
        reference_token(logits[row], entry, tokens[row], min(2, len(tokens[row]))) for row, entry in enumerate(params)
    ]
    assert found.tokens.tolist() == expected
    assert found.positions.tolist() == [len(entry) for entry in tokens]
    assert found.failed == ()
    check_logprobs(found, logits, params)


def check_logprobs(found: sampler.Sampled, logits: np.ndarray, params: list[SamplingParams]) -> None:
    wanted = [row for row, entry in enumerate(params) if entry.logprobs is not None]
    assert [entry.row for entry in found.logprobs] == wanted
    for entry in found.logprobs:
        raw = logits[entry.row].astype(np.float64)
        logprobs = raw - np.log(np.exp(raw).sum())
        best = np.argsort(-logprobs)[: params[entry.row].logprobs].tolist()
        assert entry.logprobs.logprob == pytest.approx(logprobs[found.tokens[entry.row]], abs=1e-5)
        assert list(entry.logprobs.top_ids) == best
        assert list(entry.logprobs.top_logprobs) == pytest.approx(logprobs[best].tolist(), abs=1e-5)


CHI_SQUARE_999 = {5: 20.52, 7: 24.32, 11: 31.26}  # 99.9 % quantile by degrees of freedom


@pytest.mark.parametrize(
    ("params", "cells"),
    [
        ({"temperature": 1.0}, 12),
        ({"temperature": 0.7}, 12),
        ({"temperature": 1.0, "top_k": 6}, 6),
        ({"temperature": 1.5, "top_k": 8}, 8),
    ],
)
def test_distribution_is_the_softmax(params, cells):
    logits = np.random.default_rng(5).normal(size=12).astype(np.float32)
    draws = 20_000
    entry = SamplingParams(seed=0, **params)
    counts = np.zeros(12)
    keys = gumbel.stream_keys(np.arange(draws, dtype=np.int64), np.full(draws, 3))
    table = make_table([SamplingParams(seed=seed, **params) for seed in range(500)])
    for first in range(0, draws, 500):
        table.sampling.seed[:] = np.arange(first, first + 500)
        found = sample_all(torch.from_numpy(logits).expand(500, -1).clone(), table)
        counts += np.bincount(found.tokens, minlength=12)
    assert len(keys) == draws
    scores = reference_filter(logits, entry, [1, 2, 3], 2)
    expected = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum() * draws
    assert counts[expected == 0].sum() == 0
    assert (expected > 0).sum() == cells
    statistic = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert statistic < CHI_SQUARE_999[cells - 1]


def test_positions_and_seeds_draw_independently():
    """Over positions of one seed, and over neighbouring seeds: uniform logits give every token its share."""
    vocab_size, draws = 8, 8000
    logits = torch.zeros(draws, vocab_size)
    ids = torch.arange(vocab_size)
    for keys in (
        gumbel.stream_keys(np.full(draws, 42), np.arange(draws)),
        gumbel.stream_keys(np.arange(draws), np.full(draws, 42)),
    ):
        tokens = gumbel.choose(logits, ids, keys).numpy()
        counts = np.bincount(tokens, minlength=vocab_size)
        assert ((counts - draws / 8) ** 2 / (draws / 8)).sum() < CHI_SQUARE_999[7]
        pairs = np.bincount(tokens[:-1] * 8 + tokens[1:], minlength=64)
        expected = (draws - 1) / 64
        assert ((pairs - expected) ** 2 / expected).sum() < 103.4  # 63 degrees of freedom


def test_vectorised_hash_equals_the_definition():
    seeds = np.array([0, 1, 2**63 - 1, 123456789])
    positions = np.array([0, 5, 2**20, 77])
    keys = gumbel.stream_keys(seeds, positions)
    assert keys.tolist() == [noise.stream_key(int(s), int(p)) for s, p in zip(seeds, positions)]
    ids = torch.tensor([0, 1, 31999, 151935, 2**31 - 1])
    found = gumbel.token_hashes(keys, ids).long() & 0xFFFFFFFF
    expected = [[noise.token_hash(key, token) for token in ids.tolist()] for key in keys.tolist()]
    assert found.tolist() == expected


def test_hash_is_pinned():
    """These numbers are a promise: the same seed gives the same tokens in every later version."""
    assert noise.stream_key(1234, 17) == noise.mix64(1234 ^ noise.mix64(17 ^ noise.SAMPLING_DOMAIN))
    assert noise.stream_key(0, 0) == PINNED_KEY
    assert noise.token_hash(PINNED_KEY, 5) == PINNED_HASH
    assert noise.gumbel(7, 3, 11) == pytest.approx(PINNED_GUMBEL, abs=1e-12)


PINNED_KEY = 0x5AA8E05330EB93CE
PINNED_HASH = 0x77B556B9
PINNED_GUMBEL = 1.4084210518031637


def test_float32_estimate_is_within_its_margin():
    rng = np.random.default_rng(0)
    hashes = np.concatenate([rng.integers(0, 2**32, 200_000), np.arange(4096), 2**32 - 1 - np.arange(4096)])
    exact = -np.log(-np.log((hashes + 0.5) / 2**32))
    estimate = gumbel._estimate(torch.from_numpy(hashes.astype(np.uint32).view(np.int32).copy()))
    assert np.isfinite(exact).all()
    assert np.abs(estimate.numpy() - exact).max() < gumbel._MARGIN / 2


def test_same_token_alone_and_among_others():
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(scale=2.0, size=(32, 5000)).astype(np.float32))
    settings_list = [
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 2.0, "top_p": 0.99},  # more than the first candidates: sorts the whole vocabulary
        {"temperature": 0.8, "top_k": 50},
        {"temperature": 0.8, "top_k": 1000, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.0},
        {"temperature": 1.0, "repetition_penalty": 1.5},
    ]
    params = [SamplingParams(seed=row, logprobs=row % 3, **settings_list[row % 8]) for row in range(32)]
    together = sample_all(logits, make_table(params))
    for row in range(32):
        alone = sample_all(logits[row : row + 1], make_table([params[row]]))
        assert alone.tokens[0] == together.tokens[row]
        assert alone.logprobs[0].logprobs == together.logprobs[row].logprobs


def test_non_finite_rows_are_reported_and_harm_nobody():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    params = [SamplingParams(temperature=1.0, seed=row, logprobs=1) for row in range(5)]
    expected = sample_all(logits, make_table(params))
    broken = logits.clone()
    broken[1, 3], broken[2, 0], broken[4, 49] = math.nan, math.inf, -math.inf
    found = sample_all(broken, make_table(params))
    assert found.failed == (1, 2, 4)
    assert found.rows.tolist() == [0, 3]
    assert found.tokens.tolist() == expected.tokens[[0, 3]].tolist()
    assert [entry.row for entry in found.logprobs] == [0, 3]


def test_a_row_with_nothing_left_to_choose_fails():
    params = [
        SamplingParams(temperature=1.0, seed=1, min_tokens=5, stop_token_ids=tuple(range(10))),
        SamplingParams(seed=1),
    ]
    found = sample_all(torch.randn(2, 10), make_table(params))
    assert found.failed == (0,)
    assert found.rows.tolist() == [1]


def test_ties():
    """Greedy takes the smallest id; tokens equal to the last kept one are kept."""
    greedy = sample_all(torch.tensor([[0.0, 3.0, 3.0, 1.0]]), make_table([SamplingParams(temperature=0.0, seed=0)]))
    assert greedy.tokens.tolist() == [1]
    params = [SamplingParams(temperature=1.0, top_k=1, seed=seed) for seed in range(200)]
    found = sample_all(torch.tensor([[0.0, 3.0, 3.0, 1.0]]).expand(200, -1), make_table(params))
    assert set(found.tokens.tolist()) == {1, 2}


def test_token_ids_outside_the_vocabulary_are_ignored():
    params = SamplingParams(temperature=0.0, seed=0, logit_bias=((99, 5.0),), min_tokens=9, stop_token_ids=(99,))
    assert sample_all(torch.tensor([[0.0, 1.0]]), make_table([params], [[0, 1, 1]])).tokens.tolist() == [1]
