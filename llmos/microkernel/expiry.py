"""Things that end when nobody has touched them for a while; finding them costs O(1) each, however many there are."""

from __future__ import annotations

from collections import OrderedDict


class Expiry:
    """Keys by the time of their last touch, oldest first. Time never runs backwards."""

    def __init__(self) -> None:
        self._touched: OrderedDict[int, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._touched)

    def touch(self, key: int, now: float) -> None:
        self._touched[key] = now
        self._touched.move_to_end(key)

    def drop(self, key: int) -> None:
        self._touched.pop(key, None)

    def oldest(self) -> int | None:
        return next(iter(self._touched), None)

    def older_than(self, moment: float) -> int | None:
        """The oldest key, if it was not touched since `moment`."""
        key = self.oldest()
        return key if key is not None and self._touched[key] <= moment else None
