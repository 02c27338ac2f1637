"""`NativeLinear`: y = x @ weight.T + bias through `matmul.py`, alone or as one kernel of a model's program."""

from __future__ import annotations

import functools
import logging

import torch
from llvmlite import ir
from torch import Tensor

from llmos.services.executor.native.machine import Compiled, Program, add_runner
from llmos.services.executor.native.matmul import FORMATS, PANEL, add_matmul
from llmos.services.executor.native.packing import pack, panels_of

log = logging.getLogger(__name__)


class NativeLinear:
    """One packed weight [out, in] and its bias. `out_width` is what a row of results takes: whole panels."""

    def __init__(self, weight: Tensor, bias: Tensor | None, weights: str) -> None:
        self.format = weights
        self.out_features, self.in_features = weight.shape
        self.panels = panels_of(self.out_features)
        self.out_width = self.panels * PANEL
        self._packed, self._scales = pack(weight, weights)
        self._bias = torch.zeros(self.out_width)
        if bias is not None:
            self._bias[: self.out_features] = bias

    @property
    def kernel(self) -> str:
        return f"native-{self.format}"

    @property
    def address(self) -> int:
        return library(self.format).address(f"matmul_{self.format}")

    def arguments(self, x: Tensor, out: Tensor, *, add: bool = False) -> list[int]:
        """Of the kernel; see `matmul.ARGUMENTS`. x, out: float32 [rows, >= in], [rows, >= out_width]; columns next to each other."""
        assert x.dtype == out.dtype == torch.float32
        assert x.stride(1) == out.stride(1) == 1
        assert x.shape[1] >= self.in_features
        assert out.shape[1] >= self.out_width
        panel_bytes = self._packed[0].numel() * self._packed.element_size() if self.panels else 0
        scales = self._scales.data_ptr() if self._scales is not None else 0
        return [
            x.data_ptr(),
            x.stride(0) * 4,
            self._packed.data_ptr(),
            panel_bytes,
            self.in_features,
            out.data_ptr(),
            out.stride(0) * 4,
            self.panels,
            self._bias.data_ptr(),
            scales,
            int(add),
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """x: [..., in] of any float dtype -> [..., out] of the same."""
        x32 = x.float().reshape(-1, self.in_features).contiguous()
        rows = x32.shape[0]
        out = torch.empty(rows, self.out_width)
        if rows and self.panels:
            program = Program(library(self.format), [(self.address, self.arguments(x32, out))], torch.get_num_threads())
            program.run(rows)
        return out[:, : self.out_features].to(x.dtype).view(*x.shape[:-1], self.out_features)


@functools.cache
def library(weights: str) -> Compiled:
    """The product for one format, compiled once a process."""
    module = ir.Module(weights)
    add_runner(module)
    add_matmul(module, FORMATS[weights])
    return Compiled(module)


@functools.cache
def is_available() -> bool:
    """Whether code can be compiled and run here, on torch's threads: an empty program comes to its end."""
    try:
        module = ir.Module("empty")
        add_runner(module)
        Program(Compiled(module), [], torch.get_num_threads()).run(1)
    except (OSError, RuntimeError, AttributeError) as error:
        log.warning("kernels can not be compiled here (%s): plain torch computes", error)
        return False
    return True
