"""The sampling kernels, token by token against the CPU executor's sampler, and against a float64 reference with a sort."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from llmos.kernels import row_table
from llmos.kernels.checks import KernelShapeError, KernelTypeError
from llmos.kernels.row_table import DeviceRows, DiffWriter
from llmos.kernels.row_update import apply_diff_reference
from llmos.kernels.sampling import TILE, Sampler
from llmos.kernels.sampling_reference import gumbel_reference, sample_reference
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import RowAdd
from llmos.protocol.params import SamplingParams
from llmos.services.executor import noise, sampler
from llmos.services.executor.rows import RowTable
from llmos.services.executor.sampling_columns import SamplingColumns

torch.set_num_threads(1)

PROMPT = 2


def device_rows(params, tokens=None, masks=None):
    """The device's table of rows with these parameters; `tokens[row]`, of which the first PROMPT are the prompt."""
    rows = DeviceRows("cpu", len(params), 64, 64, max_stops=32, max_biases=16)
    writer, columns = DiffWriter(rows), SamplingColumns(len(params))
    for row, entry in enumerate(params):
        known = tokens[row] if tokens else [1, 2, 3]
        mask = masks[row] if masks else -1
        columns.set(row, entry)
        low, high = row_table.split64(entry.seed)
        writer.add(
            row,
            {
                row_table.PROMPT_LENGTH: min(PROMPT, len(known)),
                row_table.TEMPERATURE: float(columns.temperature[row]),
                row_table.TOP_K: int(columns.top_k[row]),
                row_table.TOP_P: float(columns.top_p[row]),
                row_table.LOG_MIN_P: float(columns.log_min_p[row]),
                row_table.SEED_LOW: low,
                row_table.SEED_HIGH: high,
                row_table.LOGPROBS: int(columns.logprobs[row]),
                row_table.ADJUSTED: int(columns.special[row] or mask >= 0),
                row_table.REPETITION: entry.repetition_penalty or 1.0,
                row_table.PRESENCE: entry.presence_penalty,
                row_table.FREQUENCY: entry.frequency_penalty,
                row_table.MIN_TOKENS: entry.min_tokens,
                row_table.MASK: mask,
            },
            pages=[0],
            tokens=known,
            stops=entry.stop_token_ids,
            biases=entry.logit_bias,
        )
    apply_diff_reference(writer.finish(), rows)
    return rows


def cpu_rows(params, tokens=None):
    table = RowTable(max_rows=len(params), max_context=64, page_size=64, num_pages=1)
    for row, entry in enumerate(params):
        known = tokens[row] if tokens else [1, 2, 3]
        table._add(RowAdd(row, row, pack_i32(known), min(PROMPT, len(known)), 0, pack_i32([0]), entry))
    return table


def normal(rows, vocab_size, seed, scale=3.0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(scale=scale, size=(rows, vocab_size)).astype(np.float32))


def choose(logits, params, tokens=None, rows=None, **options):
    """A sampler that has sampled, and the tokens."""
    used = Sampler("cpu", len(logits), logits.shape[1])
    entries = torch.arange(len(logits), dtype=torch.int32) if rows is None else torch.tensor(rows, dtype=torch.int32)
    found = used.sample(logits, entries, device_rows(params, tokens), **options)
    assert not used._counts.any()
    return used, found.tolist()


def random_params(rng):
    pick = rng.choice
    return SamplingParams(
        temperature=pick([None, 0.0, 1e-40, 0.3, 1.0, 2.5]),
        top_k=pick([None, 0, 1, 2, 7, 40, 400, 10**6]),
        top_p=pick([None, 1.0, 0.95, 0.5, 0.01]),
        min_p=pick([None, 0.0, 0.02, 0.3, 1.0]),
        repetition_penalty=pick([None, 1.0, 0.7, 1.8]),
        presence_penalty=pick([0.0, 0.0, 0.8, -0.5]),
        frequency_penalty=pick([0.0, 0.0, 0.6]),
        logit_bias=pick([0, 0, 1]) * ((3, 4.0), (9, -1e4), (3, 1.0), (10**6, 1.0)),
        min_tokens=pick([0, 0, 3, 8]),
        stop_token_ids=pick([0, 1]) * (0, 5, 10**6),
        seed=int(rng.integers(0, 2**63)),
        logprobs=pick([None, 0, 4]),
    )


@pytest.mark.parametrize(("vocab_size", "seed"), [(24, 1), (24, 2), (300, 3), (TILE + 4, 4)])
def test_every_row_is_the_cpu_samplers(vocab_size, seed):
    rng = np.random.default_rng(seed)
    params = [random_params(rng) for _ in range(7)]
    tokens = [rng.integers(0, min(vocab_size, 24), size=rng.integers(1, 12)).tolist() for _ in params]
    logits = normal(len(params), vocab_size, seed)
    used, found = choose(logits, params, tokens)
    expected = sampler.sample(logits.clone(), np.arange(len(params)), cpu_rows(params, tokens))
    assert expected.failed == ()
    assert found == expected.tokens.tolist()
    reported = {entry.row: entry.logprobs for entry in expected.logprobs}
    for row, entry in enumerate(params):
        if entry.logprobs is not None:
            count = entry.logprobs
            assert float(used.logprobs[row]) == pytest.approx(reported[row].logprob, abs=1e-5)
            assert used.top_ids[row, :count].tolist() == list(reported[row].top_ids)
            assert used.top_logprobs[row, :count].tolist() == pytest.approx(reported[row].top_logprobs, abs=1e-5)


def test_the_vocabulary_of_qwen3_in_bfloat16():
    """151,936 tokens: a last tile that is nearly empty, a last group that is full; sampled as its own defaults say."""
    logits = normal(1, 151_936, 5, scale=2.5).bfloat16()
    rows = device_rows([SamplingParams(temperature=0.6, top_k=20, top_p=0.95, seed=9, logprobs=3)])
    entries = torch.zeros(1, dtype=torch.int32)
    expected, chosen, best = sample_reference(logits, entries, rows)
    used = Sampler("cpu", 1, 151_936, adjusts=False)
    assert used.sample(logits, entries, rows, adjust=False).tolist() == expected.tolist()
    assert float(used.logprobs[0]) == pytest.approx(float(chosen[0]), abs=2e-5)
    assert used.top_ids[0, :3].tolist() == [token for token, _ in best[0]]


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 0.97},  # nearly everything is kept: groups are listed in several steps
        {"top_k": 700, "top_p": 0.9},  # more than there are groups' peaks
        {"top_k": 3, "temperature": 5.0},
        {"min_p": 0.2, "top_p": 0.9},
        {"top_p": 1e-6},
        {"top_k": 1},
    ],
)
def test_flat_logits(settings):
    """The hard case for a search of a threshold: thousands of tokens of about the same probability."""
    params = [SamplingParams(**{"temperature": 1.0, **settings, "seed": 3})]
    logits = normal(1, TILE + 500, 6, scale=0.3)
    expected = sampler.sample(logits.clone(), np.arange(1), cpu_rows(params))
    assert choose(logits, params, adjust=False, report=False)[1] == expected.tokens.tolist()


def test_noise_is_the_executors():
    for seed, position in ((0, 0), (2**63 - 1, 77), (12345, 2**31 - 1)):
        found = gumbel_reference(seed, position, 50)
        assert found.tolist() == pytest.approx([noise.gumbel(seed, position, token) for token in range(50)], abs=1e-9)


CHI_SQUARE_999 = {5: 20.52, 11: 31.26}  # 99.9 % quantile by degrees of freedom


@pytest.mark.parametrize(("settings", "cells"), [({}, 12), ({"top_k": 6}, 6)])
def test_the_distribution(settings, cells):
    """Chi-square of 70 draws with seeds 0, 1, ... against the softmax of what is kept."""
    logits = torch.linspace(1.0, -1.0, 12).expand(70, -1)
    params = [SamplingParams(temperature=1.0, seed=seed, **settings) for seed in range(70)]
    _, found = choose(logits, params, adjust=False, report=False)
    counts = np.bincount(found, minlength=12)
    assert counts[cells:].sum() == 0
    expected = 70 * torch.softmax(logits[0, :cells], 0).double().numpy()
    assert ((counts[:cells] - expected) ** 2 / expected).sum() < CHI_SQUARE_999[cells - 1]


def test_a_row_does_not_depend_on_its_batch():
    logits = normal(6, 200, 7)
    settings_list = [
        {"top_p": 0.8},
        {"top_k": 9},
        {"temperature": 0.0},
        {},
        {"min_p": 0.1},
        {"repetition_penalty": 2.0},
    ]
    params = [
        SamplingParams(**{"temperature": 1.3, "seed": row, "logprobs": 2, **s}) for row, s in enumerate(settings_list)
    ]
    together, found = choose(logits, params)
    for row in range(6):
        alone, token = choose(logits[row : row + 1], [params[row]])
        assert token == [found[row]]
        assert torch.equal(alone.logprobs[0], together.logprobs[row])
        assert torch.equal(alone.top_logprobs[0, :2], together.top_logprobs[row, :2])


def test_bad_rows_and_empty_entries_harm_nobody():
    logits = normal(6, 90, 8)
    params = [SamplingParams(temperature=1.0, top_p=0.9, seed=row, logprobs=1) for row in range(6)]
    _, expected = choose(logits, params)
    broken = logits.clone()
    broken[1, 3], broken[2, 0], broken[4, 89] = math.nan, math.inf, -math.inf
    used, found = choose(broken, params)
    assert found == [expected[0], -1, -1, expected[3], -1, expected[5]]
    assert used.logprobs[[1, 2, 4]].tolist() == [0.0, 0.0, 0.0]
    used, found = choose(logits, params, rows=[5, -1, 2, -1, -1, 0])
    assert [found[i] for i in (1, 3, 4)] == [-1, -1, -1]
    assert used.sample(logits[:0], torch.zeros(0, dtype=torch.int32), device_rows(params)).tolist() == []


def test_a_row_of_which_everything_is_masked_fails():
    params = [
        SamplingParams(temperature=temperature, top_k=2, seed=1, min_tokens=5, stop_token_ids=tuple(range(10)))
        for temperature in (0.0, 1.0)
    ]
    assert choose(normal(3, 10, 9), [*params, SamplingParams(seed=1)])[1][:2] == [-1, -1]


def test_ties():
    """Greedy takes the smallest id, also across tiles; tokens equal to the last kept one are kept."""
    logits = torch.zeros(1, TILE + 9)
    logits[0, [70, TILE + 3]] = 5.0
    assert choose(logits, [SamplingParams(temperature=0.0, seed=0)], adjust=False)[1] == [70]
    for settings in ({"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}):
        params = [SamplingParams(temperature=1.0, seed=seed, **settings) for seed in range(8)]
        row = torch.tensor([[0.0, 3.0, 3.0, 1.0]]).expand(8, -1)
        expected = sampler.sample(row.clone(), np.arange(8), cpu_rows(params)).tokens.tolist()
        assert choose(row, params, adjust=False, report=False)[1] == expected
        assert set(expected) == {1, 2}


def test_only_allowed_tokens():
    """Bitmasks by row, with bit 31 and a partial last word; a row without one is free."""
    vocab_size, allowed_ids = 70, [3, 31, 32, 69]
    masks = torch.zeros(2, 3, dtype=torch.int64)
    for token in allowed_ids:
        masks[1, token // 32] |= 1 << (token % 32)
    masks = torch.where(masks >= 2**31, masks - 2**32, masks).int()
    params = [SamplingParams(temperature=1.0, seed=seed, top_p=0.99 if seed % 2 else None) for seed in range(8)]
    rows = device_rows(params, masks=[1] * 6 + [-1, 0])
    logits, entries = normal(8, vocab_size, 10, scale=0.5), torch.arange(8, dtype=torch.int32)
    found = Sampler("cpu", 8, vocab_size).sample(logits, entries, rows, allowed=masks).tolist()
    assert found == sample_reference(logits, entries, rows, masks)[0].tolist()
    assert set(found[:6]) <= set(allowed_ids)
    assert found[7] == -1  # nothing allowed


def test_wrong_arguments_are_named():
    rows = device_rows([SamplingParams(seed=0)])
    used, entries = Sampler("cpu", 1, 8, adjusts=False), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(KernelShapeError, match=r"logits must have shape \[batch, vocab_size=8\], has \[1, 9\]"):
        used.sample(torch.zeros(1, 9), entries, rows, adjust=False)
    with pytest.raises(KernelTypeError, match="rows must be int32, is int64"):
        used.sample(torch.zeros(1, 8), entries.long(), rows, adjust=False)
    with pytest.raises(KernelShapeError, match=r"adjusts \(needed for adjust\)"):
        used.sample(torch.zeros(1, 8), entries, rows)
    with pytest.raises(KernelShapeError, match="batch must be from 0 to 1, is 2"):
        used.sample(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int32), rows, adjust=False)
