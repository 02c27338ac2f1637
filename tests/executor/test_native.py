"""The compiled kernels between the products against torch in float64, over odd sizes, and the decoder's independence of chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_reference import open_cpu, prompt, saved_model
from plan_driver import PlanDriver
from specs import make_spec

from llmos.services.executor import linear
from llmos.services.executor.cpu import TorchModel
from llmos.services.executor.kv_cache import KVCache

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not linear.has_native(), reason="kernels can not be compiled on this box"),
]
torch.set_num_threads(1)


def library(add, *arguments):
    """One kernel, compiled."""
    from llvmlite import ir

    from llmos.services.executor.native.machine import Compiled, add_runner

    module = ir.Module("test")
    add_runner(module)
    add(module, *arguments)
    return Compiled(module)


def run(compiled, name, arguments, rows):
    from llmos.services.executor.native.machine import Program

    Program(compiled, [(compiled.address(name), arguments)], 1).run(rows)


def test_norm():
    from llmos.services.executor.native.small import add_norm

    spec = make_spec(hidden_size=44, norm_eps=1e-5)
    x, weight = torch.zeros(3, 48), torch.zeros(48)
    x[:, :44], weight[:44] = torch.randn(3, 44) * 3, torch.randn(44)
    out = torch.full((3, 48), 9.0)
    run(library(add_norm, spec), "norm", [x.data_ptr(), out.data_ptr(), 48 * 4, weight.data_ptr()], 3)
    wide = x[:, :44].double()
    expected = wide * (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight[:44]
    assert torch.allclose(out[:, :44].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(out[:, 44:], torch.zeros(3, 4)), "the padding must stay 0"


def test_silu_over_all_sizes_of_gates():
    from llmos.services.executor.native.small import add_silu

    gate = torch.linspace(-120, 120, 2000)
    gate[:5] = torch.tensor([float("-inf"), float("inf"), float("nan"), 0.0, -0.0])
    up = torch.randn(2000)
    x, out = torch.cat((gate, up))[None].contiguous(), torch.empty(1, 2000)
    spec = make_spec(intermediate_size=2000)
    run(library(add_silu, spec), "silu", [x.data_ptr(), 16000, out.data_ptr(), 8000], 1)
    expected = torch.nn.functional.silu(gate.double()) * up
    good = expected.isfinite()
    assert torch.allclose(out[0][good].double(), expected[good], rtol=1e-6, atol=1e-30)
    assert bool(out[0][2].isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "page", "window"), [(4, 2, 16, 4, 0), (3, 3, 48, 1, 9), (10, 1, 80, 7, 0)]
)
def test_attention_over_scattered_pages(dtype, heads, kv_heads, size, page, window):
    from llmos.services.executor.native.attend import add_attend

    spec = make_spec(num_heads=heads, num_kv_heads=kv_heads, head_dim=size)
    cache = KVCache(spec, 64, page, dtype)
    generator = torch.Generator().manual_seed(size)
    layer = cache.slots[1]
    layer.copy_(torch.randn(layer.shape, generator=generator))
    tables = np.random.default_rng(0).permutation(64).astype(np.int32).reshape(2, 32)
    rows, positions = np.array([1, 0, 1, 1]), np.array([0, 20, 31, 8])
    q = torch.randn(4, heads * size, generator=generator)
    out = torch.empty_like(q)
    step = np.array([0, 0, 0, tables.ctypes.data, tables.strides[0], rows.ctypes.data, positions.ctypes.data])
    scratch = torch.empty(heads * 64)
    stride = heads * size * 4
    offset = layer.numel() // 2 * dtype.itemsize
    name = str(dtype).removeprefix("torch.")
    arguments = [step.ctypes.data, q.data_ptr(), stride, out.data_ptr(), stride, layer.data_ptr(), offset, window]
    compiled = library(add_attend, spec, page, name)
    run(compiled, "attend", [*arguments, scratch.data_ptr(), 64 * 4], 4)
    planes = layer.view(2, 64, kv_heads, page, size).double()
    for index, (row, position) in enumerate(zip(rows, positions)):
        seen = planes[:, tables[row]].transpose(2, 3).reshape(2, -1, kv_heads, size)[:, : position + 1]
        seen = seen[:, -window:] if window else seen
        k, v = seen.repeat_interleave(heads // kv_heads, 2)
        scores = torch.einsum("hd,thd->ht", q[index].view(heads, size).double(), k) * size**-0.5
        expected = torch.einsum("ht,thd->hd", scores.softmax(1), v).reshape(-1)
        assert torch.allclose(out[index].double(), expected, rtol=1e-5, atol=1e-6), f"query {index}"


@pytest.mark.parametrize("weights", ["as_is", "int4"])
def test_same_bits_however_the_prompt_is_cut(weights):
    """Chunks, preemption and a second thread change nothing, not even in the last bit."""
    _, directory = saved_model("llama-tied")
    found = []
    for chunk, threads in ((300, 1), (13, 1), (64, 2)):
        backend = open_cpu(directory, dtype="bfloat16", weights=weights, page_size=16, threads=threads)
        driver = PlanDriver(backend, chunk=chunk)
        seq = driver.add(prompt(150), 12, logprobs=3)
        for _ in range(8):
            driver.step()
        if chunk == 64:
            driver.release(seq)
        driver.run()
        torch.set_num_threads(1)
        found.append((seq.tokens, seq.logprobs))
    assert found[0] == found[1] == found[2]


def test_a_shape_the_kernels_do_not_fit_runs_in_torch():
    _, directory = saved_model("llama-linear-bias")
    assert isinstance(open_cpu(directory).model, TorchModel)
    _, directory = saved_model("llama-tied")
    assert not isinstance(open_cpu(directory).model, TorchModel)
