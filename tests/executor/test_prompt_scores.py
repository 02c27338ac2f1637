"""Log-probabilities of prompts by the CPU backend against transformers' log-softmax: in chunks, beside others, and after a preemption."""

from __future__ import annotations

import pytest
import torch
from cpu_reference import TOLERANCE, open_cpu, open_poisoned, prompt, saved_model
from device_reference import open_device, open_poisoned_device
from small_models import SMALL

from llmos.codes import FinishReason
from llmos.protocol.codec import pack_i32, unpack_i32
from llmos.protocol.messages import RowAdd, StepPlan
from llmos.protocol.params import SamplingParams
from llmos.protocol.prompt_logprobs import unpack_records
from llmos.services.executor import prompt_scores
from llmos.services.executor.backend import Limits
from llmos.services.executor.fake import FakeBackend

pytestmark = pytest.mark.slow


def score(backend, tokens: list[int], top: int, chunk: int, *, sample: bool = False, prompt_len: int | None = None):
    """Prefill in pieces; the records as they come, which must follow each other."""
    count = len(tokens) if prompt_len is None else prompt_len
    pages = -(-(len(tokens) + 1) // backend.capabilities.page_size)
    params = SamplingParams(temperature=0.0, seed=0, prompt_logprobs=top)
    add = RowAdd(0, 1, pack_i32(tokens), count, 0, pack_i32(range(pages)), params)
    found = []
    for step, start in enumerate(range(0, len(tokens), chunk), 1):
        length = min(chunk, len(tokens) - start)
        is_last = sample and start + length == len(tokens)
        prefill = pack_i32([0, start, length, int(is_last)])
        output = backend.execute(StepPlan(1, step, b"", (add,) if step == 1 else (), b"", prefill, b""))
        assert bool(output.samples) == is_last
        for result in output.results:
            assert (result.row, result.start) == (0, len(found))
            found += unpack_records(result.values, top)
        assert len(found) == min(start + length + 1, count)
    backend.execute(StepPlan(1, 1000, pack_i32([0]), (), b"", b"", b""))
    return found


def check(model, tokens: list[int], top: int, found) -> None:
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), -1)
    assert [token for token, _ in found] == tokens[: len(found)]
    first = found[0][1]
    assert first.logprob != first.logprob
    assert first.top_ids == (-1,) * top
    for position, (token, entry) in enumerate(found[1:], 1):
        here = expected[position - 1]
        assert abs(entry.logprob - here[token].item()) < TOLERANCE
        best = here.topk(top).values
        assert torch.allclose(torch.tensor(entry.top_logprobs), best, atol=TOLERANCE, rtol=0)
        assert torch.allclose(here[list(entry.top_ids)], best, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunk", [1000, 16, 7, 1])
@pytest.mark.parametrize("kind", ["llama-tied", "mistral-window", "qwen3"])
def test_equal_to_transformers_however_it_is_cut(kind, chunk, monkeypatch):
    model, directory = saved_model(kind)
    monkeypatch.setattr(prompt_scores, "_MAX_LOGITS", 5 * SMALL["vocab_size"])  # five positions at a time
    backend = open_cpu(directory)
    check(model, prompt(40), 3, score(backend, prompt(40), 3, chunk))
    check(model, prompt(40), 0, score(backend, prompt(40), 0, chunk, sample=True))


@pytest.mark.parametrize("chunk", [1000, 7])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_device_backend_gives_the_same(chunk, deterministic):
    model, directory = saved_model("qwen3")
    backend = open_device(directory, max_rows=4, dtype="float32", deterministic=deterministic)
    check(model, prompt(40), 3, score(backend, prompt(40), 3, chunk))
    check(model, prompt(40), 0, score(backend, prompt(40), 0, chunk, sample=True))
    bad = open_poisoned_device(saved_model("llama-tied")[1])
    params = SamplingParams(seed=0, prompt_logprobs=0)
    add = RowAdd(3, 1, pack_i32([1, 7, 2]), 3, 0, pack_i32([0]), params)
    output = bad.execute(StepPlan(1, 1, b"", (add,), b"", pack_i32([3, 0, 3, 0]), b""))
    assert list(unpack_i32(output.failed)) == [3, FinishReason.NUMERICAL_ERROR]
    assert output.results == ()


def test_what_was_generated_is_not_scored_again():
    """A sequence that comes back with output: records for its prompt only."""
    model, directory = saved_model("llama-tied")
    found = score(open_cpu(directory), prompt(40), 2, 8, sample=True, prompt_len=25)
    assert len(found) == 25
    check(model, prompt(40), 2, found)


def test_more_best_ones_than_the_vocabulary_has_are_not_there():
    _, directory = saved_model("llama-tied")
    found = score(open_cpu(directory), prompt(5), 200, 100)
    assert all(set(entry.top_ids[160:]) == {-1} for _, entry in found[1:])
    assert all(entry.top_logprobs[160] == float("-inf") for _, entry in found[1:])


def test_bad_numbers_fail_the_row_though_nothing_is_sampled():
    _, directory = saved_model("llama-tied")
    backend = open_poisoned(directory)
    params = SamplingParams(seed=0, prompt_logprobs=0)
    add = RowAdd(3, 1, pack_i32([1, 7, 2]), 3, 0, pack_i32([0]), params)
    output = backend.execute(StepPlan(1, 1, b"", (add,), b"", pack_i32([3, 0, 3, 0]), b""))
    assert list(unpack_i32(output.failed)) == [3, FinishReason.NUMERICAL_ERROR]
    assert output.results == ()


@pytest.mark.parametrize("chunk", [100, 6, 1])
def test_the_fake_is_certain(chunk):
    found = score(FakeBackend(Limits(4, 100)), [3, 4, 5, 6, 7, 8, 9], 2, chunk)
    assert [token for token, _ in found] == [3, 4, 5, 6, 7, 8, 9]
    assert [entry.logprob for _, entry in found[1:]] == [0.0] * 6
    assert found[0][1].logprob != found[0][1].logprob


def test_bad_numbers_fail_the_row_of_the_cuda_backend_though_nothing_is_sampled():
    _, directory = saved_model("llama-tied")
    backend = open_poisoned_device(directory)
    add = RowAdd(3, 1, pack_i32([1, 7, 2]), 3, 0, pack_i32([0]), SamplingParams(seed=0, prompt_logprobs=0))
    backend.submit(StepPlan(1, 1, b"", (add,), b"", pack_i32([3, 0, 2, 0]), b""))
    backend.submit(StepPlan(1, 2, b"", (), b"", pack_i32([3, 2, 1, 1]), b""))
    for _ in range(2):
        output = backend.collect()
        assert list(unpack_i32(output.failed)) == [3, FinishReason.NUMERICAL_ERROR]
        assert (output.samples, output.results) == (b"", ())
