"""Tensor descriptors of pages: Hopper's and Blackwell's copy engine fetches a tile without the threads computing addresses.

Made on the host, once per launch, with the page as a coordinate: a descriptor per tile would stop the loop from being pipelined.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llmos.kernels.checks import KernelShapeError


def page_descriptor(field: str, pages: Tensor, tile: int) -> TensorDescriptor:
    """Of [num_pages, kv_heads, page_size, head_dim], in blocks of one head's `tile` slots."""
    gaps = [stride * pages.element_size() for stride in pages.stride()[:-1]]
    if pages.data_ptr() % 16 or any(gap % 16 for gap in gaps):
        raise KernelShapeError(
            field, f"must begin and step at multiples of 16 bytes for a descriptor, has steps of {gaps}"
        )
    block = [1, 1, tile, triton.next_power_of_2(pages.shape[3])]
    return TensorDescriptor(pages, list(pages.shape), list(pages.stride()), block)
