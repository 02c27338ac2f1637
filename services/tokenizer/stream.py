"""One output stream: incremental decoding, then stop strings. A pure fold of (stop strings, tokens).

States: open -> closed (by `final` or by a stop string).
"""

from __future__ import annotations

from dataclasses import dataclass

from llmos.services.tokenizer.incremental import DecodePlan
from llmos.services.tokenizer.stop import StopFinder


@dataclass(frozen=True, slots=True)
class StreamText:
    """What one batch of tokens gave. `used`: tokens up to and with the one that completed the stop string, else all."""

    text: str
    used: int
    stop: str | None = None


class TextStream:
    """`plan` None: the model has no tokenizer, every text is empty."""

    def __init__(self, plan: DecodePlan | None, stops: tuple[str, ...]) -> None:
        self._decoder = plan.open() if plan else None
        self._finder = StopFinder(stops) if stops else None

    def step(self, ids: tuple[int, ...], final: bool) -> StreamText:
        """Decode the next tokens; after `final` or a stop string the stream must not be used again."""
        if self._decoder is None:
            return StreamText("", len(ids))
        if self._finder is None:
            text = self._decoder.push(ids)
            return StreamText(text + self._decoder.flush() if final else text, len(ids))
        parts = []
        for used, token_id in enumerate(ids, 1):
            if piece := self._decoder.push((token_id,)):
                parts.append(self._finder.push(piece))
                if self._finder.found is not None:
                    return StreamText("".join(parts), used, self._finder.found)
        if final:
            parts.append(self._finder.push(self._decoder.flush()))
            parts.append(self._finder.flush())
        return StreamText("".join(parts), len(ids), self._finder.found)
