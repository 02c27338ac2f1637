"""What the driver says of NVIDIA GPUs, through NVML. Nothing where there is no GPU, driver or `nvidia-ml-py`.

NVML reads counters of the driver and makes no CUDA context. It is opened at the first question; if that fails, it is not tried again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric

log = logging.getLogger(__name__)


@cache
def _nvml() -> Any:
    """The module, ready to use, or None."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.info("no GPU metrics: %s", error)
        return None
    return pynvml


def families() -> Iterator[Metric]:
    """One series per GPU, by its index."""
    nvml = _nvml()
    if nvml is None:
        return
    memory = GaugeMetricFamily("llmos_gpu_memory_bytes", "Memory of a GPU by state.", labels=("gpu", "state"))
    busy = GaugeMetricFamily("llmos_gpu_busy_ratio", "Share of the time in which a kernel ran.", labels=("gpu",))
    watts = GaugeMetricFamily("llmos_gpu_power_watts", "Power drawn now.", labels=("gpu",))
    for index in range(nvml.nvmlDeviceGetCount()):
        gpu = str(index)
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            found = nvml.nvmlDeviceGetMemoryInfo(handle)
            memory.add_metric((gpu, "used"), found.used)
            memory.add_metric((gpu, "free"), found.free)
            busy.add_metric((gpu,), nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            watts.add_metric((gpu,), nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
        except nvml.NVMLError as error:  # one value that a GPU does not tell must not hide the others
            log.debug("GPU %s: %s", gpu, error)
    yield from (memory, busy, watts)
