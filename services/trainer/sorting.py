"""Sorting three to six numbers below one hundred, smallest first.

Invariants: the key is the sorted list, so no ordering of a held-out list is in the training text.
"""

from __future__ import annotations

import random

from llmos.services.trainer.items import Item

TASK = "sorting"
PROMPTS = (
    "Sort these numbers: {list}",
    "Sort: {list}",
    "Sort the list {list}.",
    "Put these numbers in order: {list}",
    "Please sort {list}.",
    "Order these numbers from smallest to largest: {list}",
    "Can you sort {list}?",
)


def draw(rng: random.Random) -> Item:
    count = rng.choices((3, 4, 5, 6), (3, 3, 3, 2))[0]
    numbers = [rng.randrange(100) for _ in range(count)]
    if rng.random() < 0.1:
        numbers[0] = numbers[-1]  # repeated numbers are kept, and must be seen to be learnt
    answer = ", ".join(map(str, sorted(numbers)))
    prompt = rng.choice(PROMPTS).format(list=", ".join(map(str, numbers)))
    return Item(TASK, answer, prompt, answer)
