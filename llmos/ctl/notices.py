"""What the terminal hears of an outage: nothing if it is short, else one line when it has lasted for a while and one when it is over.

On stderr, and on lines of their own: an answer that appears piece by piece may stand in the middle of one.
"""

from __future__ import annotations

import sys
import threading
import time

from llmos.ctl.render import printable

AFTER_S = 2.0


class OutageNotices:
    """Called with the reason when an outage begins, and with None when it is over (`Client(on_outage=...)`)."""

    def __init__(self, after_s: float = AFTER_S) -> None:
        self._after_s = after_s
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._began = 0.0
        self._is_told = False

    def __call__(self, reason: str | None) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if reason is not None:
                self._began = time.monotonic()
                self._timer = threading.Timer(self._after_s, self._tell, (reason,))
                self._timer.daemon = True
                self._timer.start()
            elif self._is_told:
                self._is_told = False
                _say(f"the wait is over after {time.monotonic() - self._began:.1f} s")

    def _tell(self, reason: str) -> None:
        with self._lock:
            if self._timer is not None:
                self._is_told = True
                _say(f"{reason}; waiting for it")


def _say(text: str) -> None:
    start = "\n" if sys.stdout.isatty() and sys.stderr.isatty() else ""
    sys.stderr.write(f"{start}llmosctl: {printable(text)}\n")
    sys.stderr.flush()
