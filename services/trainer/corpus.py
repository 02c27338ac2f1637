"""Endless training documents: chats of one to four exchanges that mix the tasks, and some plain text.

Invariants: a pure function of the seed; only items outside the held-out split are used.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from llmos.services.trainer import questions, stories
from llmos.services.trainer.chat import BEGIN, END, Turn, render
from llmos.services.trainer.families import FAMILIES
from llmos.services.trainer.items import Item, draw_split

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are the llmos demo model.",
    "You are a friendly assistant. Answer the user.",
)
PLAIN_SHARE, SYSTEM_SHARE, CASUAL_SHARE = 0.06, 0.15, 0.12
EXCHANGES = ((1, 2, 3, 4, 6), (0.5, 0.2, 0.15, 0.1, 0.05))
FOCUS = 2.5
CASUAL_TASKS = ("questions", "stories", "sums", "sorting")


def documents(seed: int, focus: tuple[str, ...] = ()) -> Iterator[str]:
    """Families named in `focus` come FOCUS times as often as they otherwise would."""
    rng = random.Random(f"train-{seed}")
    weights = [family.weight * (FOCUS if family.task in focus else 1) for family in FAMILIES]
    while True:
        yield _plain(rng) if rng.random() < PLAIN_SHARE else _chat(rng, weights)


def held_out(seed: int, per_task: int) -> dict[str, list[Item]]:
    """Up to `per_task` distinct held-out items of each evaluated family (small families have fewer)."""
    rng = random.Random(f"test-{seed}")
    tests: dict[str, list[Item]] = {}
    for family in FAMILIES:
        if not family.evaluated:
            continue
        found: dict[str, Item] = {}
        for _ in range(per_task * 20):
            item = draw_split(family.draw, rng, held_out=True)
            found.setdefault(item.prompt, item)
            if len(found) == per_task:
                break
        tests[family.task] = list(found.values())
    return tests


def training_item(rng: random.Random, weights: list[float]) -> Item:
    family = rng.choices(FAMILIES, weights)[0]
    return draw_split(family.draw, rng, held_out=False)


def _chat(rng: random.Random, weights: list[float]) -> str:
    turns = [Turn("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < SYSTEM_SHARE else []
    for _ in range(rng.choices(*EXCHANGES)[0]):
        item = training_item(rng, weights)
        turns += [Turn("user", _casual(rng, item)), Turn("assistant", item.answer)]
    return render(turns)


def _casual(rng: random.Random, item: Item) -> str:
    """People leave out capitals and full stops; where case carries no meaning, so does the training text."""
    prompt = item.prompt
    if item.task in CASUAL_TASKS and rng.random() < CASUAL_SHARE:
        prompt = prompt.lower() if rng.random() < 0.5 else prompt.rstrip(".?:")
    return prompt


def _plain(rng: random.Random) -> str:
    text = questions.paragraph(rng) if rng.random() < 0.5 else stories.plain(rng)
    return f"{BEGIN}{text}{END}"
