"""Matrix products with weights [out, in], into tensors that are there already.

Usually torch's own (cuBLAS): it chooses another order of summation for another number of rows, so a row's last bits depend on its batch.
Deterministic products sum each element in one fixed order, whatever the batch is, at the price of a slower product for long prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmos.services.executor.cuda.device import Device


@dataclass(frozen=True, slots=True)
class DeviceLinear:
    """Weights of one linear layer; what `models.decoder` calls its `Linear` here only holds them. `weight`: [out, in]."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


Product = Callable[[Tensor, DeviceLinear, Tensor], object]


def choose_product(device: Device, *, deterministic: bool) -> Product:
    """`product(x, layer, out)`: out = x @ weight.T + bias."""
    if not deterministic:
        return plain_product
    if device.is_cuda:
        from llmos.kernels.fixed_matmul import fixed_matmul

        return lambda x, layer, out: fixed_matmul(x, layer.weight, layer.bias, out=out)
    return row_by_row


def plain_product(x: Tensor, layer: DeviceLinear, out: Tensor) -> None:
    if layer.bias is None:
        torch.mm(x, layer.weight.t(), out=out)
    else:
        torch.addmm(layer.bias, x, layer.weight.t(), out=out)


def row_by_row(x: Tensor, layer: DeviceLinear, out: Tensor) -> None:
    """On a CPU each row by itself is always the same."""
    for source, target in zip(x, out):
        torch.mv(layer.weight, source, out=target)
        if layer.bias is not None:
            target += layer.bias
