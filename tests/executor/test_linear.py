"""The packed products against float64 products of the same weights; the promise that a row never depends on its neighbours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmos.errors import ConfigError, ModelError
from llmos.services.executor import linear
from llmos.services.executor.linear import make_linear
from llmos.services.executor.native.matmul import FORMATS, ROW_BLOCK
from llmos.services.executor.native.packing import dequantise, pack, quantise

SHAPES = [(1, 1), (16, 16), (64, 33), (200, 77), (512, 300), (1100, 24)]  # (in, out)
INTEGERS = ("int8", "int4")
needs_native = pytest.mark.skipif(not linear.has_native(), reason="kernels can not be compiled on this box")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors(rows, size_in, size_out, dtype=torch.float32, scale=0.05):
    generator = torch.Generator().manual_seed(rows * 7919 + size_in * 31 + size_out)
    weight = (torch.randn(size_out, size_in, generator=generator) * scale).to(dtype)
    bias = torch.randn(size_out, generator=generator).to(dtype)
    return torch.randn(rows, size_in, generator=generator), weight, bias


def layer_of(weight, bias, name):
    """The layer, and the weights in float64 that it should multiply with."""
    if name in INTEGERS:
        return make_linear(weight, bias, name), dequantise(*quantise(weight, name), name).double()
    weight = weight.to(getattr(torch, name))
    return make_linear(weight, bias), weight.double()


@needs_native
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("size_in", "size_out"), SHAPES)
def test_results_are_those_of_float64_to_float32_rounding(size_in, size_out, name):
    for rows in (1, 2, 3, 4, 7, 32, ROW_BLOCK + 1):
        x, weight, bias = tensors(rows, size_in, size_out)
        layer, exact = layer_of(weight, bias, name)
        y = layer(x)
        assert layer.kernel == f"native-{name}"
        assert y.dtype == torch.float32
        expected = F.linear(x.double(), exact, bias.double())
        largest_sum = float((x.double().abs() @ exact.abs().T).max())
        assert (y - expected).abs().max() <= 1e-6 * (largest_sum + 3), f"{rows} rows"


@needs_native
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_its_neighbours(name, threads):
    torch.set_num_threads(threads)
    _, weight, bias = tensors(1, 270, 100)
    layer, _ = layer_of(weight, bias, name)
    x = torch.randn(200, 270, generator=torch.Generator().manual_seed(1))
    together = layer(x)
    for rows in (*range(1, 20), 32, 95, 96, 97, 102, 193):
        assert torch.equal(layer(x[:rows]), together[:rows]), f"{rows} rows from the start"
        assert torch.equal(layer(x[200 - rows :]), together[200 - rows :]), f"{rows} rows from the end"


@needs_native
@pytest.mark.parametrize(("name", "levels"), [("int8", 127), ("int4", 7)])
def test_quantised_weights_are_half_a_step_away_at_most(name, levels):
    _, weight, _ = tensors(1, 300, 40)
    weight[3] = 0.0
    weight[4] *= 1e-20
    weight[5, 17] = 100.0  # takes its own group's precision, and no other's
    values, scales = quantise(weight, name)
    assert int(values.abs().max()) <= levels
    group = FORMATS[name].group
    steps = scales.float().repeat_interleave(group, 1)[:, :300]
    error = (dequantise(values, scales, name) - weight).abs()
    assert bool((error <= steps * 0.5 * (1 + 1e-5)).all())
    assert bool((error[5, group:] <= steps[5, group:] * 0.5 * (1 + 1e-5)).all())
    assert float(steps[5, group:].max()) < 0.05
    assert torch.equal(dequantise(values, scales, name)[3], torch.zeros(300))


@needs_native
def test_bytes_in_memory():
    """What a weight takes: 2, 1 and half a byte, and its share of a scale."""
    weight = torch.randn(160, 256)
    for name, bits in (("bfloat16", 16), ("int8", 8 + 16 / 128), ("int4", 4 + 16 / 32)):
        parts = [part for part in pack(weight, name) if part is not None]
        assert sum(part.numel() * part.element_size() for part in parts) * 8 == weight.numel() * bits


@needs_native
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite(bad):
    weight = torch.ones(2, 3, dtype=torch.bfloat16)
    weight[1, 2] = bad
    y = make_linear(weight)(torch.ones(1, 3))
    assert torch.equal(y[0].isfinite(), torch.tensor([True, False]))
    with pytest.raises(ModelError, match="int8"):
        make_linear(weight, None, "int8")


@needs_native
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e5, 1e30])
@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_very_small_and_large_weights(size, name):
    x, weight, bias = tensors(4, 100, 40, scale=size)
    layer, exact = layer_of(weight, bias * 0, name)
    largest_sum = float((x.double().abs() @ exact.abs().T).max())
    assert largest_sum > 0
    assert (layer(x) - x.double() @ exact.T).abs().max() <= 1e-6 * largest_sum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_kernels_torch_multiplies(monkeypatch, dtype):
    monkeypatch.setattr(linear, "has_native", lambda: False)
    x, weight, bias = tensors(5, 40, 20, dtype)
    layer = make_linear(weight, bias)
    assert layer.kernel == "torch"
    assert torch.equal(layer(x.to(dtype)), F.linear(x.to(dtype), weight, bias))
    assert layer(x).dtype == torch.float32
    with pytest.raises(ConfigError, match="llvmlite"):
        make_linear(weight, bias, "int4")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_leading_dimensions_and_no_rows(dtype):
    x, weight, bias = tensors(6, 40, 20, dtype)
    layer = make_linear(weight, bias)
    assert torch.equal(layer(x.view(2, 3, 40)), layer(x).view(2, 3, 20))
    assert layer(x[:0]).shape == (0, 20)
    assert torch.equal(layer(x[::2]), layer(x)[::2])
    assert layer(x.bfloat16()).dtype == torch.bfloat16
