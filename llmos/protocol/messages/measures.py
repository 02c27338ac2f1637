"""How long things take: histograms for monitoring."""

from __future__ import annotations

from llmos.protocol.messages.base import Message, Part


class HistogramRow(Part, frozen=True):
    """`bounds`: upper bounds in seconds, ascending; `counts`: values per bucket, one more than bounds; `sum` of all values, in seconds."""

    name: str
    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


class EndedRow(Part, frozen=True):
    """How many turns ended with this reason."""

    reason: int
    count: int


class LaneMeasures(Part, frozen=True):
    """Of one model, since the microkernel started. Histograms: queue, first_token, between_tokens, step."""

    model: str
    histograms: tuple[HistogramRow, ...]
    ended: tuple[EndedRow, ...]


class MeasuresGet(Message, tag=180, frozen=True):
    """Client -> gateway -> microkernel."""

    req: int


class MeasuresReply(Message, tag=181, frozen=True):
    req: int
    lanes: tuple[LaneMeasures, ...]
