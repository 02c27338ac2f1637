"""Decode steps as CUDA graphs: one for each batch bucket and kind of sampling, captured when it is first needed.

A bucket is the batch size that a graph is made for; a smaller batch fills it up with empty entries. Kinds: whether any row has its logits
changed before sampling, and whether any wants log-probabilities; a plain batch does not pay for either. Before a graph is captured its
work runs once over empty entries, which compiles kernels and changes nothing.
"""

from __future__ import annotations

import bisect
import logging

from torch import Tensor

from llmos.services.executor.cuda.device import Device, Work
from llmos.services.executor.cuda.model import DeviceModel

log = logging.getLogger(__name__)

_SMALL = (1, 2, 4, 8)
_STEP = 8


def buckets(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24, 32, ... up to `max_rows`."""
    sizes = [size for size in _SMALL if size < max_rows]
    return (*sizes, *range(2 * _STEP, max_rows, _STEP), max_rows)


class DecodeGraphs:
    """`decode_rows`: the device's list of rows that decode."""

    def __init__(self, device: Device, model: DeviceModel, decode_rows: Tensor) -> None:
        self._device, self._model, self._decode_rows = device, model, decode_rows
        self._buckets = buckets(len(decode_rows))
        self._graphs: dict[tuple[int, bool, bool], Work] = {}
        self._kept = decode_rows.clone()

    @property
    def num_captured(self) -> int:
        return len(self._graphs)

    def bucket(self, num_decodes: int) -> int:
        return self._buckets[bisect.bisect_left(self._buckets, num_decodes)]

    def run(self, num_decodes: int, *, adjust: bool, report: bool) -> None:
        """Device work: a decode step."""
        key = (self.bucket(num_decodes), adjust, report)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._capture(*key)
        graph()

    def _capture(self, batch: int, adjust: bool, report: bool) -> Work:
        def work() -> None:
            self._model.decode(batch, adjust=adjust, report=report)

        if self._device.is_cuda:
            self._kept.copy_(self._decode_rows)
            self._decode_rows.fill_(-1)
            work()
            self._decode_rows.copy_(self._kept)
            log.info("capturing the decode step of %d rows", batch)
        return self._device.capture(work)
