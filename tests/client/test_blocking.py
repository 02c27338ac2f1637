"""The adapter between the two shells: signatures, docstrings and errors pass through unchanged."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine
from typing import Any

import pytest

from llmos import AsyncClient, AsyncSequence, Client, Sequence
from llmos.client.blocking import blocking


class Awaits:
    async def twice(self, value: int, *, add: int = 0) -> int:
        """Two times."""
        await asyncio.sleep(0)
        return value * 2 + add


class Blocks:
    def __init__(self) -> None:
        self._inner = Awaits()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(coroutine)

    twice = blocking(Awaits.twice)


def test_same_call_same_docstring() -> None:
    assert Blocks().twice(3) == 6
    assert Blocks().twice(value=3, add=1) == 7
    assert Blocks.twice(Blocks(), 4) == 8
    assert Blocks.twice.__doc__ == "Two times."
    assert inspect.signature(Blocks.twice) == inspect.signature(Awaits.twice)
    with pytest.raises(TypeError):
        Blocks().twice(3, 4)  # type: ignore[call-arg]


@pytest.mark.parametrize(("blocks", "awaits"), [(Client, AsyncClient), (Sequence, AsyncSequence)])
def test_both_shells_take_the_same_arguments(blocks: type, awaits: type) -> None:
    for name in (name for name in vars(awaits) if not name.startswith("_")):
        mine, other = (inspect.signature(getattr(kind, name)).parameters for kind in (blocks, awaits))
        assert [*mine.items()] == [*other.items()], name
        assert getattr(blocks, name).__doc__, name
