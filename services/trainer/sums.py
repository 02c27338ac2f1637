"""Sums of two numbers of up to three digits, answered column by column.

The answer shows its columns because a small model adds far more reliably when each carry is on the page.
Invariants: the key is the unordered pair, so 12 + 30 is held out exactly when 30 + 12 is;
sums of two digits are steps of the longer ones and therefore always training text.
"""

from __future__ import annotations

import random

from llmos.services.trainer.items import Item, training_key

TASK = "sums"
PROMPTS = (
    "What is {a} + {b}?",
    "{a} + {b} =",
    "{a} + {b}",
    "Add {a} and {b}.",
    "Calculate {a} + {b}.",
    "How much is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    "What is {a} plus {b}?",
)


def worked_answer(a: int, b: int) -> str:
    """`47 + 85` gives `7+5=12, 4+8+1=13, so 47 + 85 = 132.`"""
    columns: list[str] = []
    carry, rest_a, rest_b = 0, a, b
    while rest_a or rest_b or not columns:
        total = rest_a % 10 + rest_b % 10 + carry
        columns.append(f"{rest_a % 10}+{rest_b % 10}{'+1' if carry else ''}={total}")
        carry, rest_a, rest_b = total // 10, rest_a // 10, rest_b // 10
    if len(columns) == 1:
        return f"{a} + {b} = {a + b}."
    return f"{', '.join(columns)}, so {a} + {b} = {a + b}."


def draw(rng: random.Random) -> Item:
    digits_a, digits_b = rng.choices(((1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 3), (3, 3)), (1, 2, 2, 6, 2, 2, 5))[0]
    a, b = _number(rng, digits_a), _number(rng, digits_b)
    prompt = rng.choice(PROMPTS).format(a=a, b=b)
    return Item(TASK, _key(a, b), prompt, worked_answer(a, b))


def _key(a: int, b: int) -> str:
    key = f"{min(a, b)}+{max(a, b)}"
    return training_key(TASK, key) if max(a, b) < 10 else key


def _number(rng: random.Random, num_digits: int) -> int:
    return rng.randrange(10 ** (num_digits - 1) if num_digits > 1 else 0, 10**num_digits)
