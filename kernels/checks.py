"""What every kernel wrapper checks before a launch: shapes, strides, types and devices.

A kernel works on bare pointers, so a wrong argument would be a wrong answer or a fault somewhere else. `Arguments` binds the names of
dimensions to sizes as it meets them: the second tensor that says "batch" must agree with the first. Nothing here looks at values, which
may be on a device; what values must satisfy is in each wrapper's docstring.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INT32 = (torch.int32,)


class KernelShapeError(ValueError):
    """A tensor, or a number, does not fit. `field` names the argument."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


class KernelTypeError(TypeError):
    """A tensor's element type or device does not fit. `field` names the argument."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


class Arguments:
    """The tensors of one call: the first sets the device, each names its dimensions."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = dict(sizes)
        self._device: torch.device | None = None

    def __getitem__(self, dimension: str) -> int:
        return self.sizes[dimension]

    def tensor(
        self, field: str, value: Tensor, shape: str, dtypes: tuple[torch.dtype, ...], *, contiguous: int = 1
    ) -> None:
        """`shape`: names or numbers of the dimensions, separated by spaces. `contiguous`: so many last dimensions have no gaps."""
        if not isinstance(value, Tensor):
            raise KernelTypeError(field, f"must be a tensor, is {type(value).__name__}")
        if value.dtype not in dtypes:
            raise KernelTypeError(field, f"must be {_names(dtypes)}, is {_names((value.dtype,))}")
        self._check_device(field, value.device)
        self._check_shape(field, tuple(value.shape), shape.split())
        expected = 1
        for size, stride in list(zip(value.shape, value.stride()))[: -contiguous - 1 : -1]:
            if size > 1 and stride != expected:
                raise KernelShapeError(
                    field, f"must have no gaps in its last {contiguous} dimensions, has strides {value.stride()}"
                )
            expected *= size

    def _check_device(self, field: str, device: torch.device) -> None:
        if self._device is None:
            self._device = device
        elif device != self._device:
            raise KernelTypeError(field, f"must be on {self._device} as the other tensors, is on {device}")

    def _check_shape(self, field: str, actual: tuple[int, ...], names: list[str]) -> None:
        wanted = [int(name) if name.isdigit() else self.sizes.get(name) for name in names]
        fits = len(actual) == len(wanted) and all(want in (None, size) for want, size in zip(wanted, actual))
        if not fits:
            shown = [name if want is None or name.isdigit() else f"{name}={want}" for name, want in zip(names, wanted)]
            raise KernelShapeError(field, f"must have shape [{', '.join(shown)}], has {list(actual)}")
        self.sizes.update((name, size) for name, size in zip(names, actual) if not name.isdigit())


def check_one_of(field: str, value: int, allowed: tuple[int, ...]) -> None:
    if value not in allowed:
        raise KernelShapeError(field, f"must be one of {', '.join(map(str, allowed))}, is {value}")


def check_range(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise KernelShapeError(field, f"must be from {low} to {high}, is {value}")


def check_scale(scale: float) -> None:
    """Of attention: the running maximum is taken before scaling, so the factor must not turn the order round."""
    check_range("scale", scale, 1e-6, 1e6)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
