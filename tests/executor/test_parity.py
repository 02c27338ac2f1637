"""The CPU backend against transformers in float32: greedy output token for token, log-probabilities to 1e-4, however it is batched."""

from __future__ import annotations

import pytest
import torch
from cpu_reference import NEW_TOKENS, check_logprobs, generate, open_cpu, open_poisoned, prompt, saved_model
from plan_driver import PlanDriver
from small_models import CONFIGS

from llmos.codes import FinishReason
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import RowAdd, StepPlan
from llmos.protocol.params import SamplingParams

pytestmark = pytest.mark.slow

LENGTHS = (3, 17, 40, 90, 1, 64)


@pytest.mark.parametrize("kind", CONFIGS)
def test_alone_equals_generate(kind):
    model, directory = saved_model(kind)
    driver = PlanDriver(open_cpu(directory))
    seq = driver.add(prompt(40), NEW_TOKENS, logprobs=5)
    driver.run()
    assert seq.tokens == generate(model, prompt(40))
    check_logprobs(model, seq)
    assert len(set(seq.output)) > 20, "the random model must not repeat itself, or this test says little"


@pytest.mark.parametrize("kind", CONFIGS)
def test_mixed_batch_with_chunks_prefix_hits_and_preemption_equals_generate(kind):
    model, directory = saved_model(kind)
    driver = PlanDriver(open_cpu(directory), chunk=13)
    seqs = [driver.add(prompt(length), NEW_TOKENS, logprobs=2) for length in LENGTHS[:3]]
    for _ in range(9):
        driver.step()
    seqs += [driver.add(prompt(length), NEW_TOKENS, logprobs=2) for length in LENGTHS[3:]]
    hit = driver.add([*prompt(40), *prompt(9)], NEW_TOKENS, prefix_of=seqs[2], logprobs=2)
    assert len(hit.pages) == 5, "40 shared tokens are 5 pages"
    for _ in range(20):
        driver.step()
    preempted = [seqs[1], seqs[3]]
    for seq in preempted:
        assert len(seq.output) > 0
        driver.release(seq)
    driver.run()
    for seq in (*seqs, hit):
        assert seq.tokens == generate(model, seq.prompt)
        check_logprobs(model, seq)
    assert driver.same_decode_plans > 10


def test_sliding_window_changes_the_output():
    """Guards the window tests: with a window as long as the context the same weights must say something else."""
    model, _ = saved_model("mistral-window")
    plain, _ = saved_model("mistral")
    assert generate(model, prompt(40)) != generate(plain, prompt(40))


@pytest.mark.parametrize("chunk", [300, 64, 2000])
@pytest.mark.parametrize("kind", ["llama-tied", "mistral-window"])
def test_long_prompt_spans_query_blocks(kind, chunk):
    model, directory = saved_model(kind)
    driver = PlanDriver(open_cpu(directory, page_size=16), chunk=chunk)
    seqs = [driver.add(prompt(length), 70, logprobs=1) for length in (310, 256, 257)]
    driver.run()
    for seq in seqs:
        assert seq.tokens == generate(model, seq.prompt, 70)
        check_logprobs(model, seq)


def test_many_shards():
    model, directory = saved_model("llama3-rope-untied", max_shard_size="30KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    driver = PlanDriver(open_cpu(directory))
    seq = driver.add(prompt(20), NEW_TOKENS)
    driver.run()
    assert seq.tokens == generate(model, prompt(20))


def test_tiny_pool_reuses_dirty_pages():
    """Sequences one after the other over the same few pages; the driver hands out the last freed page first."""
    model, directory = saved_model("qwen3")
    driver = PlanDriver(open_cpu(directory, num_pages=12, max_rows=1))
    seqs = [driver.add(prompt(length), 30) for length in (60, 5, 33)]
    driver.run()
    for seq in seqs:
        assert seq.tokens == generate(model, seq.prompt, 30)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(dtype):
    model, directory = saved_model("llama-tied")
    backend = open_cpu(directory, dtype=dtype)
    assert backend.capabilities.dtype == dtype
    assert backend.cache.dtype == getattr(torch, dtype)
    driver = PlanDriver(backend)
    seq = driver.add(prompt(30), 20, logprobs=0)
    driver.run()
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([seq.tokens])).logits[0], -1)
    chosen = expected[29:-1].gather(1, torch.tensor(seq.output)[:, None])[:, 0]
    found = torch.tensor([entry.logprob for entry in seq.logprobs])
    assert (found - chosen).abs().mean() < 0.1


def requests(count: int) -> list[tuple[list[int], dict]]:
    """Different prompts and settings; number 0 is the one that is watched."""
    settings = [
        {"temperature": 0.9, "seed": 1234},
        {"temperature": 0.0},
        {"temperature": 1.3, "top_p": 0.8, "seed": 5},
        {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2, "seed": 6},
        {"temperature": 1.0, "min_p": 0.05, "logit_bias": ((3, 2.0),), "seed": 7},
    ]
    lengths = (24, 3, 70, 111, 9, 40, 1)
    return [(prompt(lengths[i % 7], seed=i), settings[i % 5]) for i in range(count)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "watched",
    [
        {"temperature": 0.9, "seed": 1234},
        {"temperature": 0.9, "top_p": 0.9, "seed": 99},
        {"temperature": 1.1, "top_k": 20, "frequency_penalty": 0.4, "seed": 3},
    ],
)
def test_same_tokens_and_same_bits_alone_and_among_31_others(watched, dtype):
    _, directory = saved_model("qwen2")
    alone = PlanDriver(open_cpu(directory, dtype=dtype))
    expected = alone.add(prompt(24), NEW_TOKENS, logprobs=3, **watched)
    alone.run()

    crowd = PlanDriver(open_cpu(directory, num_pages=1024, dtype=dtype))
    others = [crowd.add(tokens, 50, **params) for tokens, params in requests(15)]
    seq = crowd.add(prompt(24), NEW_TOKENS, logprobs=3, **watched)
    others += [crowd.add(tokens, 90, **params) for tokens, params in requests(16)]
    crowd.run()
    assert len(others) == 31
    assert seq.tokens == expected.tokens
    assert seq.logprobs == expected.logprobs


NEVER_7 = {"logit_bias": ((7, -1000.0),)}


def test_a_row_with_nan_fails_alone():
    _, directory = saved_model("llama-tied")
    healthy = PlanDriver(open_cpu(directory))
    expected = healthy.add([1, 2, 3], 30, **NEVER_7)
    healthy.run()

    driver = PlanDriver(open_poisoned(directory))
    good = driver.add([1, 2, 3], 30, **NEVER_7)
    bad = driver.add([*range(8, 48), 7], 30)
    driver.run()
    assert bad.failed == FinishReason.NUMERICAL_ERROR
    assert bad.output == []
    assert good.tokens == expected.tokens
    dirty = driver.free_pages[-8:]
    after = driver.add([1, 2, 3], 30, **NEVER_7)
    driver.step()
    assert set(after.pages) <= set(dirty), "the test is about pages that held NaN"
    driver.run()
    assert after.tokens == expected.tokens


def test_a_failed_row_is_reported_until_it_is_freed():
    _, directory = saved_model("llama-tied")
    backend = open_poisoned(directory)
    add = RowAdd(3, 1, pack_i32([1, 7]), 2, 0, pack_i32([0]), SamplingParams(seed=0))
    failure = pack_i32([3, FinishReason.NUMERICAL_ERROR])
    for plan in (
        StepPlan(1, 1, b"", (add,), b"", pack_i32([3, 0, 2, 1]), b""),
        StepPlan(1, 2, b"", (), b"", b"", pack_i32([3])),  # planned before the first result was back
        StepPlan(1, 3, b"", (), b"", b"", None),
    ):
        output = backend.execute(plan)
        assert (output.samples, output.failed) == (b"", failure)
    again = RowAdd(3, 2, pack_i32([1, 2]), 2, 0, pack_i32([0]), SamplingParams(seed=0))
    output = backend.execute(StepPlan(1, 4, pack_i32([3]), (again,), b"", pack_i32([3, 0, 2, 1]), b""))
    assert output.failed == b""
    assert len(output.samples) == 12


def test_reset_forgets_all_rows():
    _, directory = saved_model("llama-tied")
    backend = open_cpu(directory)
    first = PlanDriver(backend)
    first.add(prompt(20), 64)
    first.step()
    backend.reset()
    second = PlanDriver(backend)
    seq = second.add(prompt(20), 10)
    second.run()
    assert len(seq.output) == 10
