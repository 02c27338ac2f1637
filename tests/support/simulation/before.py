"""What has to be remembered from in front of an event, and what the event itself says must follow."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmos.codes import FinishReason


@dataclass
class Before:
    """`causes`: what the event must end, and why. `stepped`: models of which it brought a result. `failed`: rids whose rows failed."""

    pages: dict[tuple[str, str], tuple[int, int]]
    covered: dict[str, bool]
    causes: dict[int, FinishReason] = field(default_factory=dict)
    cut: dict[int, int] = field(default_factory=dict)  # rid -> output tokens that count
    stepped: set[str] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    in_flight: set[int] = field(default_factory=set)  # when the executor died
    limits_changed: bool = False
    ended_badly: set[int] = field(default_factory=set)
