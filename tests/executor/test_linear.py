"""PackedLinear against float64 products of the same weights; its promise that a row never depends on its neighbours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmos.services.executor import linear
from llmos.services.executor.linear import make_linear

SHAPES = [(1, 1), (16, 16), (64, 33), (200, 77), (512, 1000), (1100, 24)]  # (in, out)
needs_fbgemm = pytest.mark.skipif(
    not linear.has_fbgemm_fp16(), reason="this torch build or CPU has no FBGEMM fp16 product"
)
needs_onednn = pytest.mark.skipif(not linear.has_onednn_fp32(), reason="this torch build has no packed oneDNN product")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors(rows, size_in, size_out, dtype, scale=0.05):
    generator = torch.Generator().manual_seed(rows * 7919 + size_in * 31 + size_out)
    weight = (torch.randn(size_out, size_in, generator=generator) * scale).to(dtype)
    bias = torch.randn(size_out, generator=generator).to(dtype)
    return torch.randn(rows, size_in, generator=generator), weight, bias


def exact(x, weight, bias=None):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


def largest_sum(x, weight):
    """What float32 rounding errors are relative to: the sum of the absolute products."""
    return float((x.double().abs() @ weight.double().abs().T).max())


@needs_fbgemm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size_in", "size_out"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 32, 130])
def test_half_weights_give_float32_accuracy_for_float32_input(rows, size_in, size_out, dtype):
    x, weight, bias = tensors(rows, size_in, size_out, dtype)
    layer = make_linear(weight, bias)
    y = layer(x)
    assert layer.kernel == "fbgemm-fp16"
    assert y.dtype == torch.float32
    assert y.shape == (rows, size_out)
    assert (y - exact(x, weight, bias)).abs().max() <= 1e-6 * (largest_sum(x, weight) + 3)


@needs_fbgemm
def test_bfloat16_input_gives_the_rounded_exact_result():
    x, weight, bias = tensors(9, 300, 70, torch.bfloat16)
    x = x.bfloat16()
    y = make_linear(weight, bias)(x)
    reference = exact(x, weight, bias)
    assert y.dtype == torch.bfloat16
    # Half a unit in the last of bfloat16's 8 bits, and the float32 sum's own error for results near zero.
    assert bool(((y.double() - reference).abs() <= reference.abs() * 2.0**-8 + 1e-5).all())


@needs_onednn
@pytest.mark.parametrize(("size_in", "size_out"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 32])
def test_float32_weights_stay_float32(rows, size_in, size_out):
    x, weight, bias = tensors(rows, size_in, size_out, torch.float32)
    layer = make_linear(weight, bias)
    assert layer.kernel == "onednn-fp32"
    assert (layer(x) - exact(x, weight, bias)).abs().max() <= 1e-6 * (largest_sum(x, weight) + 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_its_neighbours(dtype, threads):
    _, weight, bias = tensors(1, 700, 96, dtype)
    layer = make_linear(weight, bias)
    if layer.kernel == "torch":
        pytest.skip("no packed kernel on this box")
    torch.set_num_threads(threads)
    x = torch.randn(260, 700, generator=torch.Generator().manual_seed(1))
    together = layer(x)
    for rows in [*range(1, 34), 119, 120, 121, 122, 127, 134, 241]:
        assert torch.equal(layer(x[:rows]), together[:rows]), f"{rows} rows from the start"
        assert torch.equal(layer(x[260 - rows :]), together[260 - rows :]), f"{rows} rows from the end"


@needs_fbgemm
def test_the_row_test_can_fail_without_padding(monkeypatch):
    x, weight, _ = tensors(60, 700, 96, torch.bfloat16)
    layer = make_linear(weight)
    together = layer(x)
    padded = [rows for rows in range(1, 60) if linear._padded_rows(rows) != rows]
    if not padded:
        pytest.skip("FBGEMM sums all row counts alike on this CPU")
    monkeypatch.setattr(linear, "_padded_rows", lambda rows: rows)
    assert any(not torch.equal(layer(x[:rows]), together[:rows]) for rows in padded)


@needs_fbgemm
def test_padding_table_is_monotone_and_small():
    table = linear._padding_table()
    assert table[0] == 0
    assert all(rows <= table[rows] <= rows + 4 for rows in range(len(table)))
    assert [linear._padded_rows(240 + rows) for rows in range(120)] == [240 + padded for padded in table[:120]]


@needs_fbgemm
@pytest.mark.parametrize("size", [1e-9, 1e-5, 1e5, 1e30])
def test_bfloat16_weights_outside_the_range_of_float16_are_scaled_exactly(size):
    x, weight, _ = tensors(4, 100, 40, torch.bfloat16, scale=size)
    y = make_linear(weight)(x)
    assert (y - exact(x, weight)).abs().max() <= 1e-6 * largest_sum(x, weight)


@needs_fbgemm
def test_one_large_weight_leaves_the_small_ones_intact():
    weight = torch.full((2, 8), 3e-5, dtype=torch.bfloat16)
    weight[0, 0] = 7e4
    y = make_linear(weight)(torch.eye(8))
    assert torch.equal(y.T, weight.float())


def test_infinite_weights_are_left_to_torch():
    weight = torch.ones(2, 3, dtype=torch.bfloat16)
    weight[1, 2] = float("inf")
    layer = make_linear(weight)
    assert layer.kernel == "torch"
    assert torch.equal(layer(torch.ones(1, 3)), torch.tensor([[3.0, float("inf")]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_packed_kernels_torch_multiplies(monkeypatch, dtype):
    monkeypatch.setattr(linear, "has_fbgemm_fp16", lambda: False)
    monkeypatch.setattr(linear, "has_onednn_fp32", lambda: False)
    x, weight, bias = tensors(5, 40, 20, dtype)
    layer = make_linear(weight, bias)
    assert layer.kernel == "torch"
    assert torch.equal(layer(x.to(dtype)), F.linear(x.to(dtype), weight, bias))
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_leading_dimensions_and_no_rows(dtype):
    x, weight, bias = tensors(6, 40, 20, dtype)
    layer = make_linear(weight, bias)
    assert torch.equal(layer(x.view(2, 3, 40)), layer(x).view(2, 3, 20))
    assert layer(x[:0]).shape == (0, 20)
    assert torch.equal(layer(x[::2]), layer(x)[::2])


def test_an_op_that_is_missing_raises_or_lies_is_not_used():
    def missing():
        return torch.ops.llmos_no_such_namespace.linear(torch.ones(1))

    assert linear._works(missing) is False
    assert linear._works(lambda: torch.zeros(16, 16)) is False
    assert linear._works(lambda: torch.full((16, 16), 16.0)) is True
