"""The CUDA backend with all our Triton kernels, in Triton's interpreter: the same tokens as transformers'. Slow, so it is small."""

from __future__ import annotations

import pytest
import small_models
from cpu_reference import check_logprobs, generate, prompt, saved_model
from device_reference import open_device
from plan_driver import PlanDriver
from transformers import Qwen3Config

from llmos.errors import ModelError
from llmos.services.executor.cuda.kernel_operations import KernelOperations
from llmos.services.executor.cuda.kv_pool import POISON_VARIABLE
from llmos.services.executor.cuda.operations import KERNELS_VARIABLE

pytestmark = pytest.mark.slow


@pytest.fixture
def heads_of_64(monkeypatch):
    sizes = small_models.SMALL | {"num_hidden_layers": 1, "vocab_size": 96}
    monkeypatch.setitem(small_models.CONFIGS, "heads-of-64", lambda: Qwen3Config(**sizes, head_dim=64))
    monkeypatch.setenv(KERNELS_VARIABLE, "interpret")
    monkeypatch.setenv(POISON_VARIABLE, "1")
    return saved_model("heads-of-64")


def test_chunks_and_decode_equal_generate(heads_of_64):
    model, directory = heads_of_64
    driver = PlanDriver(open_device(directory, page_size=16, num_pages=8, max_rows=2, step_tokens=32), chunk=14)
    assert isinstance(driver.backend.ops, KernelOperations)
    tokens = [token % 96 for token in prompt(18)]
    greedy = driver.add(tokens, 2, logprobs=2)
    driver.add(tokens[:5], 2, temperature=0.8, seed=3)
    driver.run()
    assert greedy.tokens == generate(model, tokens, 2)
    check_logprobs(model, greedy)


def test_what_the_kernels_can_not_do_is_refused(heads_of_64):
    _, directory = saved_model("llama-tied")
    with pytest.raises(ModelError, match="heads of 16"):
        open_device(directory, page_size=16, max_rows=2, step_tokens=16)
    with pytest.raises(ModelError, match="page_size 8"):
        open_device(heads_of_64[1], page_size=8, max_rows=2, step_tokens=16)
