"""Times the packed products against `F.linear` on weights that are not in cache: `python bench/linear.py`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from llmos.services.executor.linear import make_linear

FORMATS = ((torch.bfloat16, "as_is"), (torch.float32, "as_is"), (torch.bfloat16, "int8"), (torch.bfloat16, "int4"))
CACHE_BYTES = 128 << 20  # weights are cycled over at least this much memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1024x5632", help="IN x OUT of the layer (default %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 128])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    size_in, size_out = (int(side) for side in arguments.shape.split("x"))
    print(f"{size_in} -> {size_out}, {arguments.threads} threads; milliseconds a call, lower third of all calls")
    with torch.inference_mode():
        for dtype, weights in FORMATS:
            report(dtype, weights, (size_in, size_out), arguments.rows, arguments.repeats)


def report(dtype: torch.dtype, packing: str, shape: tuple[int, int], row_counts: list[int], repeats: int) -> None:
    """One line per row count: both times, their ratio and the bandwidth at which `F.linear`'s weights would have been read."""
    size_in, size_out = shape
    size = size_in * size_out * dtype.itemsize
    weights = [torch.randn(size_out, size_in).mul_(0.02).to(dtype) for _ in range(max(2, CACHE_BYTES // size))]
    layers = [make_linear(weight, None, packing) for weight in weights]
    for rows in row_counts:
        x32 = torch.randn(rows, size_in)
        x = x32.to(dtype)
        plain: list[Callable[[], Tensor]] = [partial(F.linear, x, weight) for weight in weights]
        packed: list[Callable[[], Tensor]] = [partial(layer, x32) for layer in layers]
        plain_s, packed_s = interleaved(plain, packed, repeats)
        print(
            f"{dtype!s:15} rows {rows:4}  F.linear {plain_s * 1e3:8.2f}  {layers[0].kernel} {packed_s * 1e3:7.2f}"
            f"  {plain_s / packed_s:5.1f} x  {size / packed_s / 1e9:5.1f} GB/s of weights"
        )


def interleaved(
    plain: list[Callable[[], Tensor]], packed: list[Callable[[], Tensor]], repeats: int
) -> tuple[float, float]:
    """Seconds a call of either kind, alternating, so that a busy machine disturbs both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for calls, seconds in zip((plain, packed), times, strict=True):
            for call in calls:
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
    return statistics.quantiles(times[0], n=6)[1], statistics.quantiles(times[1], n=6)[1]


if __name__ == "__main__":
    main()
