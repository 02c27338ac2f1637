"""What the microkernel said last about its queues, for a moment, pure.

A crowd that comes at once is refused at once, by the gateway: each would wait for those before it to be checked, sent, refused and sent
back. `TRUSTED_S` after a refusal one is let through again, so a place that became free is found about as soon. Whoever may have been
accepted before (`again`) is always let through: only the microkernel knows.
"""

from __future__ import annotations

from llmos.errors import Overloaded

TRUSTED_S = 0.05


class Overload:
    """By model and tenant: a queue is the model's, but a tenant may have a limit of its own. "" is the model of who names none."""

    def __init__(self) -> None:
        self._refused: dict[tuple[str, str], tuple[float, Overloaded]] = {}

    def note(self, model: str, tenant: str, error: Overloaded, now: float) -> None:
        """The microkernel refused one."""
        if len(self._refused) >= 1000:  # tenants are many, moments short
            self._refused.clear()
        self._refused[model, tenant] = (now + TRUSTED_S, error)

    def check(self, model: str, tenant: str, now: float) -> None:
        """Raise what the microkernel would say."""
        until, error = self._refused.get((model, tenant), (0.0, None))
        if error is None:
            return
        if now < until:
            raise error
        del self._refused[model, tenant]
