"""What clients ask for: prompts and options, each with the address of its right answer. Seeded; knows nothing of connections.

A *place* is where an open sequence is: for the fake model its length in tokens, for a recorded one (talk, turn).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Protocol

from chaos.answers import VOCAB, FakeAnswers, RecordedAnswers, word

COMMON_PREFIX = list(range(1, 65))  # some prompts share it, so that pages are shared
LEAST_TOKENS, MOST_TOKENS = 20, 120
TURNS = 3


@dataclass(frozen=True)
class Wanted:
    """One output: the options to ask for it, the address of its answer, how many tokens it has, and where it leaves the sequence."""

    options: dict[str, Any]
    answer: dict[str, Any]
    count: int
    place: Any


class Material(Protocol):
    def begin(self, chance: random.Random) -> tuple[Any, Any]:
        """A prompt, and the place after it."""
        ...

    def output(self, chance: random.Random, place: Any, *, stops: bool = False) -> Wanted: ...

    def more(self, chance: random.Random, place: Any) -> tuple[Any, Any, int | None]:
        """What to append, the place after it, and the sequence's length then, if that is known."""
        ...


class FakeMaterial:
    def begin(self, chance: random.Random) -> tuple[Any, Any]:
        ids = [chance.randrange(VOCAB) for _ in range(chance.randint(1, 100))]
        if chance.random() < 0.3:
            ids = COMMON_PREFIX + ids
        return _ids_or_text(chance, ids), len(ids)

    def output(self, chance: random.Random, place: int, *, stops: bool = False) -> Wanted:
        seed, count = chance.randrange(2**63), chance.randint(LEAST_TOKENS, MOST_TOKENS)
        options: dict[str, Any] = {"seed": seed, "max_tokens": count, "ignore_eos": True}
        answer: dict[str, Any] = {"seed": seed, "position": place, "count": count, "stop": None}
        if stops:
            ids = FakeAnswers().find(answer).ids
            at = ids.index(chance.choice(ids))  # where it comes first
            options["stop"] = word(ids[at])
            answer["stop"] = at
            count = at + 1
        return Wanted(options, answer, count, place + count)

    def more(self, chance: random.Random, place: int) -> tuple[Any, Any, int | None]:
        ids = [chance.randrange(VOCAB) for _ in range(chance.randint(1, 40))]
        return _ids_or_text(chance, ids), place + len(ids), place + len(ids)


def _ids_or_text(chance: random.Random, ids: list[int]) -> list[int] | str:
    return ids if chance.random() < 0.5 else "".join(map(word, ids))


class RecordedMaterial:
    """Greedy turns of a real model, as recording.py recorded them."""

    def __init__(self, answers: RecordedAnswers) -> None:
        self._talks = answers.talks

    def begin(self, chance: random.Random) -> tuple[Any, Any]:
        name = chance.choice(sorted(self._talks))
        return self._talks[name][0]["append"], (name, 0)

    def output(self, chance: random.Random, place: tuple[str, int], *, stops: bool = False) -> Wanted:
        name, turn = place
        recorded = self._talks[name][turn]
        options = {"temperature": 0.0, "max_tokens": recorded["max_tokens"], "ignore_eos": True}
        return Wanted(options, {"recorded": name, "turn": turn}, len(recorded["ids"]), place)

    def more(self, chance: random.Random, place: tuple[str, int]) -> tuple[Any, Any, int | None]:
        name, turn = place
        following = self._talks[name][turn + 1]
        return following["append"], (name, turn + 1), following["length"]
