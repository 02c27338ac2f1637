"""One exercise (prompt and answer) and the rule that says which exercises are held out.

Invariants: the split is a pure function of an item's `key`, so a held-out item cannot be in the training text,
however the items were drawn; two items with the same contents have the same key.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, slots=True)
class Item:
    task: str
    key: str  # canonical contents: operands, list, sentence, fact and phrasing, ...
    prompt: str
    answer: str


Draw = Callable[[random.Random], Item]


def is_held_out(task: str, key: str) -> bool:
    digest = hashlib.blake2b(f"{task}|{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def draw_split(draw: Draw, rng: random.Random, held_out: bool) -> Item:
    """Draws until an item of the wanted split comes; one in HELD_OUT_ONE_IN is held out, so this ends soon."""
    while True:
        item = draw(rng)
        if is_held_out(item.task, item.key) == held_out:
            return item


def training_key(task: str, text: str) -> str:
    """A key outside the held-out split, for what must always be training text."""
    salt = 0
    while is_held_out(task, f"{text}#{salt}"):
        salt += 1
    return f"{text}#{salt}"
