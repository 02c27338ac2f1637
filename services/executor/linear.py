"""Matrix products of the CPU backend: y = x @ weight.T + bias, with weights packed at load; nothing else knows how they are kept.

Two kinds, chosen by what the box offers and never by timing, so that a restarted executor computes the same numbers:
- `NativeLinear` (`native/`): kernels that LLVM compiles at start. Weights stay in 4, 2, 1 or half a byte, products and sums are
  float32, and a row of a result is bitwise the same whatever other rows there are.
- `TorchLinear`: plain `F.linear`, where llvmlite or torch's OpenMP library is missing. Correct, slow with bfloat16, not quantised.

`python bench/linear.py` compares both on a box.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from llmos.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from llmos.services.executor.native.linear import NativeLinear

log = logging.getLogger(__name__)

AS_IS = "as_is"


class TorchLinear:
    """Keeps the weights as they are."""

    kernel = "torch"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = None if bias is None else bias.to(weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., in] of any float dtype -> [..., out] of the same dtype."""
        return F.linear(x.to(self._weight.dtype), self._weight, self._bias).to(x.dtype)


def make_linear(weight: Tensor, bias: Tensor | None = None, weights: str = AS_IS) -> NativeLinear | TorchLinear:
    """A layer for `weight` [out, in] and `bias` [out], kept `weights` = as_is, int8 or int4. Drop your reference to `weight` to free it."""
    assert weight.dim() == 2, "weight: [out, in]"
    assert weight.device.type == "cpu"
    assert bias is None or bias.shape == weight.shape[:1], "bias: [out]"
    weight = weight.detach()
    if not has_native():
        if weights != AS_IS:
            raise ConfigError(
                f"weights = {weights!r} needs the package llvmlite, which can not be used here", field="weights"
            )
        return TorchLinear(weight, bias)
    from llmos.services.executor.native.linear import NativeLinear

    if weights == AS_IS:
        return NativeLinear(weight, bias, str(weight.dtype).removeprefix("torch."))
    if not bool(weight.isfinite().all()):
        raise ModelError(f"weights that are not finite can not be kept as {weights}")
    return NativeLinear(weight, bias, weights)


def linear_factory(weights: str) -> Callable[[Tensor, Tensor | None], NativeLinear | TorchLinear]:
    return lambda weight, bias: make_linear(weight, bias, weights)


def has_native() -> bool:
    """Whether kernels can be compiled and run here."""
    try:
        from llmos.services.executor.native.linear import is_available
    except ImportError as error:
        log.warning("no llvmlite (%s): plain torch computes", error)
        return False
    return is_available()
