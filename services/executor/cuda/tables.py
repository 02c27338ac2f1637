"""The two tables that are made once: rows, and the angles of all positions."""

from __future__ import annotations

import torch
from torch import Tensor

from llmos.kernels.row_table import DeviceRows
from llmos.protocol.limits import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from llmos.services.executor.cuda.device import Device
from llmos.services.executor.models.rope import Rope


def row_table_for(device: Device, max_rows: int, max_context: int, page_size: int) -> DeviceRows:
    """A row table with room for whatever a request may bring."""
    return DeviceRows(
        device.device, max_rows, max_context, page_size, max_stops=MAX_STOP_TOKEN_IDS, max_biases=MAX_LOGIT_BIAS
    )


def position_table(device: Device, rope: Rope, positions: int) -> Tensor:
    """float32[positions, head_dim]: cosines of the pairs, then their sines, as `kv_write` reads them."""
    frequencies = rope.frequencies.to(device.device)
    angle = torch.arange(positions, device=device.device, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angle.cos() * rope.scale, angle.sin() * rope.scale), -1)
