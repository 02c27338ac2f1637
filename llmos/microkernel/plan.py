"""A step while it is being planned, and what the microkernel remembers of it until its result arrives."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmos.microkernel.sequence import Sequence
from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import RowAdd, StepPlan


@dataclass(slots=True)
class InFlightStep:
    """`work`: (sequence, its epoch, tokens stored once the step is done). `samples`: row -> (sequence, position of the new token)."""

    step: int
    issued_at: float
    work: list[tuple[Sequence, int, int]] = field(default_factory=list)
    samples: dict[int, tuple[Sequence, int]] = field(default_factory=dict)


@dataclass(slots=True)
class PlanBuilder:
    """Collects one step. Row frees may be noted before the step is known to have work; they stay until it has."""

    row_frees: list[int] = field(default_factory=list)
    row_adds: list[RowAdd] = field(default_factory=list)
    page_appends: list[int] = field(default_factory=list)
    prefill: list[int] = field(default_factory=list)
    decode: list[int] = field(default_factory=list)

    @property
    def has_work(self) -> bool:
        return bool(self.prefill or self.decode)

    def build(self, generation: int, step: int, last_decode: list[int] | None) -> StepPlan:
        """The wire form; an unchanged decode set is left out."""
        return StepPlan(
            generation=generation,
            step=step,
            row_frees=pack_i32(self.row_frees),
            row_adds=tuple(self.row_adds),
            page_appends=pack_i32(self.page_appends),
            prefill=pack_i32(self.prefill),
            decode=None if self.decode == last_decode else pack_i32(self.decode),
        )
