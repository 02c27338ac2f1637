"""The CUDA backend on the CPU against transformers in float32, and against the CPU backend where there is sampling."""

from __future__ import annotations

import os

import pytest
import torch
from cpu_reference import check_logprobs, generate, open_cpu, prompt, saved_model
from device_reference import open_device, open_poisoned_device
from plan_driver import PlanDriver, Seq
from small_models import CONFIGS

from llmos.codes import FinishReason
from llmos.errors import ConfigError
from llmos.protocol.codec import pack_i32, unpack_i32
from llmos.protocol.messages import RowAdd, StepPlan
from llmos.protocol.params import Grammar, SamplingParams
from llmos.services.executor.cuda.device import Device, fatal_errors
from llmos.services.executor.cuda.kv_pool import POISON_VARIABLE

pytestmark = pytest.mark.slow

NEW_TOKENS = 16
HOST_GIB = 0.01


@pytest.mark.parametrize("kind", CONFIGS)
def test_alone_equals_generate(kind, monkeypatch):
    monkeypatch.setenv(POISON_VARIABLE, "1")
    model, directory = saved_model(kind)
    driver = PlanDriver(open_device(directory), chunk=30)
    seq = driver.add(prompt(40), NEW_TOKENS, logprobs=5)
    driver.run()
    assert seq.tokens == generate(model, prompt(40), NEW_TOKENS)
    check_logprobs(model, seq)


@pytest.mark.parametrize("kind", ["llama3-rope-untied", "qwen3", "qwen2-window"])
def test_chunks_prefix_hits_and_preemption_equal_generate(kind, monkeypatch):
    monkeypatch.setenv(POISON_VARIABLE, "1")
    model, directory = saved_model(kind)
    driver = PlanDriver(open_device(directory), chunk=13)
    seqs = [driver.add(prompt(length), NEW_TOKENS, logprobs=2) for length in (3, 17, 40)]
    for _ in range(5):
        driver.step()
    seqs.append(driver.add(prompt(33), NEW_TOKENS, logprobs=2))
    hit = driver.add([*prompt(40), *prompt(9)], NEW_TOKENS, prefix_of=seqs[2], logprobs=2)
    assert len(hit.pages) == 5, "40 shared tokens are 5 pages"
    for _ in range(6):
        driver.step()
    for seq in (seqs[1], seqs[3]):
        assert 0 < len(seq.output) < NEW_TOKENS
        driver.release(seq)
    driver.run()
    for seq in (*seqs, hit):
        assert seq.tokens == generate(model, seq.prompt, NEW_TOKENS)
        check_logprobs(model, seq)


def test_forks_and_swaps_equal_generate(monkeypatch):
    monkeypatch.setenv(POISON_VARIABLE, "1")
    model, directory = saved_model("qwen3")
    driver = PlanDriver(open_device(directory, num_pages=40, host_cache_gib=HOST_GIB), chunk=32)
    seqs = [driver.add(prompt(length), NEW_TOKENS) for length in (20, 29, 37)]
    for _ in range(5):
        driver.step()
    first, second, third = seqs
    driver.swap_out(first)
    driver.step()
    driver.swap_out(second)
    driver.swap_in(first)
    twin = driver.fork(third, NEW_TOKENS)
    driver.step()
    child = driver.fork(third, NEW_TOKENS, prompt=[*third.tokens[:27], *prompt(3, seed=2)])
    driver.swap_in(second)
    driver.run()
    for seq in (*seqs, twin, child):
        assert seq.tokens == generate(model, seq.prompt, NEW_TOKENS)


SETTINGS = (
    {"temperature": 0.9, "seed": 1234},
    {"temperature": 1.3, "top_p": 0.8, "seed": 5, "logprobs": 3},
    {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.2, "seed": 6},
    {"temperature": 1.0, "min_p": 0.05, "logit_bias": ((3, 2.0), (9, -3.0)), "seed": 2**40 + 7},
    {"temperature": 1.1, "presence_penalty": 0.7, "frequency_penalty": 0.4, "seed": 3},
    {"temperature": 1.0, "min_tokens": 12, "stop_token_ids": tuple(range(80)), "seed": 8},
)


def sampled(backend, count: int) -> list[Seq]:
    driver = PlanDriver(backend, chunk=25)
    seqs = [driver.add(prompt(10 + 9 * i), count, **params) for i, params in enumerate(SETTINGS)]
    driver.run()
    return seqs


def test_sampling_equals_the_cpu_backend():
    _, directory = saved_model("qwen2")
    found, expected = (sampled(open_backend(directory), 12) for open_backend in (open_device, open_cpu))
    assert [seq.tokens for seq in found] == [seq.tokens for seq in expected]
    for ours, theirs in zip(found[1].logprobs, expected[1].logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert ours.top_ids == theirs.top_ids


def test_a_row_with_nan_fails_alone_and_in_steps_that_were_submitted_before():
    _, directory = saved_model("llama-tied")
    backend = open_poisoned_device(directory)
    never_7 = SamplingParams(seed=0, temperature=0.0, logit_bias=((7, -1000.0),))
    good = RowAdd(1, 1, pack_i32([1, 2, 3]), 3, 0, pack_i32([1]), never_7)
    bad = RowAdd(3, 2, pack_i32([1, 7]), 2, 0, pack_i32([0]), SamplingParams(seed=0))
    failure = pack_i32([3, FinishReason.NUMERICAL_ERROR])
    backend.submit(StepPlan(1, 1, b"", (good, bad), b"", pack_i32([1, 0, 3, 1, 3, 0, 2, 1]), b""))
    backend.submit(StepPlan(1, 2, b"", (), b"", b"", pack_i32([3, 1])))
    tokens = []
    for position in (3, 4):
        output = backend.collect()
        assert output.failed == failure
        assert list(unpack_i32(output.samples))[:2] == [1, position]
        tokens.append(unpack_i32(output.samples)[2])
    output = backend.execute(StepPlan(1, 3, b"", (), b"", b"", None))
    assert (output.failed, len(output.samples)) == (failure, 12)
    again = RowAdd(3, 2, pack_i32([1, 2, 3]), 3, 0, pack_i32([0]), never_7)
    output = backend.execute(StepPlan(1, 4, pack_i32([3]), (again,), b"", pack_i32([3, 0, 3, 1]), b""))
    assert (output.failed, list(unpack_i32(output.samples))) == (b"", [3, 3, tokens[0]])


def test_who_gets_the_row_of_one_that_fails_in_flight_does_not_fail():
    _, directory = saved_model("llama-tied")
    backend = open_poisoned_device(directory)
    bad = RowAdd(3, 1, pack_i32([1, 7]), 2, 0, pack_i32([0]), SamplingParams(seed=0))
    good = RowAdd(3, 2, pack_i32([1, 2, 3]), 3, 0, pack_i32([1]), SamplingParams(seed=0, logit_bias=((7, -1000.0),)))
    backend.submit(StepPlan(1, 1, b"", (bad,), b"", pack_i32([3, 0, 2, 1]), b""))
    backend.submit(StepPlan(1, 2, pack_i32([3]), (good,), b"", pack_i32([3, 0, 3, 1]), b""))
    assert backend.collect().failed == pack_i32([3, FinishReason.NUMERICAL_ERROR])
    for output in (backend.collect(), backend.execute(StepPlan(1, 3, b"", (), b"", b"", pack_i32([3])))):
        assert (output.failed, len(output.samples)) == (b"", 12)


def test_rows_stop_on_the_device():
    """By a stop token, and at their last length: steps that were submitted already bring nothing more of them."""
    model, directory = saved_model("llama-tied")
    expected = generate(model, prompt(5), 6)[5:]
    backend = open_device(directory)
    stopping = SamplingParams(seed=0, temperature=0.0, stop_token_ids=(expected[1],))
    short = SamplingParams(seed=0, temperature=0.0, max_tokens=2)
    adds = [
        RowAdd(row, row, pack_i32(prompt(5)), 5, 0, pack_i32([row]), params)
        for row, params in enumerate((stopping, short))
    ]
    backend.submit(StepPlan(1, 1, b"", tuple(adds), b"", pack_i32([0, 0, 5, 1, 1, 0, 5, 1]), b""))
    backend.submit(StepPlan(1, 2, b"", (), b"", b"", pack_i32([0, 1])))
    outputs = [backend.collect()]
    backend.submit(StepPlan(1, 3, b"", (), b"", b"", None))
    outputs += [backend.collect(), backend.collect()]
    found = [list(unpack_i32(output.samples)) for output in outputs]
    assert found == [[0, 5, expected[0], 1, 5, expected[0]], [0, 6, expected[1], 1, 6, expected[1]], []]
    assert outputs[2].failed == b""


def test_a_look_behind_the_newest_token_is_noticed_by_poison(monkeypatch):
    monkeypatch.setenv(POISON_VARIABLE, "1")
    _, directory = saved_model("llama-tied")
    backend = open_device(directory)
    attend = backend.ops.paged_decode
    monkeypatch.setattr(
        backend.ops, "paged_decode", lambda q, i, rows, context, out: attend(q, i, rows, context + 1, out)
    )
    driver = PlanDriver(backend)
    seq = driver.add(prompt(9), 5)
    driver.run()
    assert (seq.failed, len(seq.output)) == (FinishReason.NUMERICAL_ERROR, 1)


def test_a_second_prompt_that_is_larger_than_all_before():
    """The buffer of differences grows while a step that used the old one is in flight."""
    model, directory = saved_model("llama-tied")
    backend = open_device(directory)
    backend.inputs._diff = backend.inputs._diff[:200]
    driver = PlanDriver(backend)
    seqs = [driver.add(prompt(20), 3)]
    driver.step()
    seqs.append(driver.add(prompt(300), 3))
    driver.run()
    assert [seq.tokens for seq in seqs] == [generate(model, seq.prompt, 3) for seq in seqs]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_mode_is_the_same_to_the_bit(dtype):
    """Alone and whole; or among others, in pieces, preempted in the middle and computed again."""
    _, directory = saved_model("qwen3")
    watched = {"temperature": 0.8, "seed": 11, "logprobs": 3}
    alone = PlanDriver(open_device(directory, dtype=dtype, deterministic=True))
    expected = alone.add(prompt(24), NEW_TOKENS, **watched)
    alone.run()
    crowd = PlanDriver(open_device(directory, dtype=dtype, deterministic=True), chunk=7)
    for length in (5, 33):
        crowd.add(prompt(length), 20)
    seq = crowd.add(prompt(24), NEW_TOKENS, **watched)
    for _ in range(10):
        crowd.step()
    assert 0 < len(seq.output) < NEW_TOKENS
    crowd.release(seq)
    crowd.run()
    assert seq.tokens == expected.tokens
    assert seq.logprobs == expected.logprobs


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), torch.OutOfMemoryError("no")])
def test_an_error_of_the_device_ends_the_process(error, monkeypatch):
    """Whoever goes on with a broken context gives wrong answers; another error is passed on."""

    class EndedError(Exception):
        pass

    def leave(code: int) -> None:
        raise EndedError(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(EndedError, match="70"), fatal_errors():
        raise error
    with pytest.raises(RuntimeError, match="ours"), fatal_errors():
        raise RuntimeError("ours")


def test_settings_that_do_not_fit_are_refused():
    _, directory = saved_model("llama-tied")
    with pytest.raises(ConfigError, match="max_step_tokens"):
        open_device(directory, max_rows=32, step_tokens=16)
    with pytest.raises(ConfigError, match="kv_cache_gib"):
        open_device(directory, num_pages=0, kv_cache_gib=1e-6)
    with pytest.raises(ConfigError, match="no GPU"):
        Device("cuda")


def test_a_grammar_is_refused_and_not_ignored():
    """The device can not be told of masks yet: a token that ignores a grammar must not pass for one that fits."""
    _, directory = saved_model("qwen2")
    driver = PlanDriver(open_device(directory))
    held = driver.add(prompt(9), 6, grammar=Grammar("regex", "a+"), stop_token_ids=(1,))
    free = driver.add(prompt(9), 6)
    driver.run()
    assert (held.failed, held.output) == (FinishReason.GRAMMAR_FAILED, [])
    assert len(free.output) == 6
