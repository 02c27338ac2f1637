"""The product of deterministic mode: right, and each row the same bits whatever other rows there are."""

from __future__ import annotations

import pytest
import torch

from llmos.kernels.checks import KernelShapeError
from llmos.kernels.fixed_matmul import fixed_matmul, fixed_matmul_reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 65, 130), (33, 40, 64)])
def test_equals_the_reference(dtype, tolerance, rows, columns, inner):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(size, inner, generator=generator).to(dtype) for size in (rows, columns))
    bias = torch.randn(columns, generator=generator).to(dtype)
    out = torch.full((rows, columns), float("nan"), dtype=dtype)
    for given in (None, bias):
        fixed_matmul(x, weight, given, out=out)
        expected = fixed_matmul_reference(x, weight, given)
        torch.testing.assert_close(out.double(), expected, atol=tolerance * inner**0.5, rtol=tolerance)


def test_a_row_does_not_depend_on_the_others():
    """Rows that lie at the start of a tile both times: the interpreter multiplies with BLAS, whose bits depend on a row's place in the
    tile, which those of the hardware do not."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 96, generator=generator), torch.randn(32, 96, generator=generator)
    whole = fixed_matmul(x, weight, out=torch.empty(40, 32))
    for first, last in ((0, 1), (16, 18), (32, 40)):
        part = fixed_matmul(x[first:last], weight, out=torch.empty(last - first, 32))
        assert torch.equal(part, whole[first:last])


def test_wrong_shapes_are_named():
    with pytest.raises(KernelShapeError, match="weight"):
        fixed_matmul(torch.zeros(2, 8), torch.zeros(4, 9), out=torch.zeros(2, 4))
