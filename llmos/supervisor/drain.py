"""How long a daemon that was asked to stop waits for what runs, pure. States: unknown -> draining -> over (all ended, or time is up)."""

from __future__ import annotations

from llmos.protocol.messages import Draining

_QUIET_MS = 300.0  # after its end an output has still to pass tokenizer and gateway
_WORD_EVERY_S = 1.0


class Drain:
    """`limit_s` from `now` on at most. Told what the microkernel says by `heard`, None when it died."""

    def __init__(self, limit_s: float, now: float) -> None:
        self._ends = now + limit_s
        self._next_word = now
        self._newest: Draining | None = None

    @property
    def running(self) -> int:
        """Sequences that generate, as far as is known."""
        return self._newest.generating if self._newest is not None else 0

    def heard(self, message: Draining | None) -> None:
        self._newest = message

    def time_left(self, now: float) -> float:
        """0 if there is nothing to wait for any more."""
        newest = self._newest
        if newest is not None and not newest.generating and newest.quiet_ms >= _QUIET_MS:
            return 0.0
        return max(0.0, self._ends - now)

    def word(self, now: float) -> str | None:
        """What to tell people, if it is time."""
        if not self.running or now < self._next_word:
            return None
        self._next_word = now + _WORD_EVERY_S
        return f"{self.running} {'sequence runs' if self.running == 1 else 'sequences run'}"
