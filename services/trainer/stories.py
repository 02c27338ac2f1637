"""Short stories about a requested character and theme.

Invariants: the key is (character, theme): a held-out story is a pair that no training story has. A story has no single
right text, so `is_sound` says what must hold for one instead of comparing it.
"""

from __future__ import annotations

import random
import re
from functools import cache

from llmos.services.trainer.items import Item, is_held_out
from llmos.services.trainer.story_parts import CHARACTERS, ENDINGS, MEETINGS, NAMES, OPENINGS, OTHERS, PLACES, PLOTS

TASK = "stories"
PROMPTS = (
    "Tell me a story about a {character} and {theme}.",
    "Write a short story about a {character}. The theme is {theme}.",
    "Write a story about {theme} with a {character}.",
    "Tell me a short story about {theme}. The hero is a {character}.",
    "I want a story about a {character} who learns about {theme}.",
    "Please tell a story about a {character} and {theme}.",
)
MIN_WORDS, MAX_WORDS = 30, 110


def draw(rng: random.Random) -> Item:
    character, theme = rng.choice(CHARACTERS), rng.choice(tuple(PLOTS))
    prompt = rng.choice(PROMPTS).format(character=character, theme=theme)
    return Item(TASK, f"{character}|{theme}", prompt, tell(rng, character, theme))


def tell(rng: random.Random, character: str, theme: str) -> str:
    parts = [
        rng.choice(OPENINGS),
        rng.choice(MEETINGS),
        *(rng.choice(step) for step in PLOTS[theme]),
        rng.choice(ENDINGS),
    ]
    return " ".join(parts).format(
        character=character, theme=theme, name=rng.choice(NAMES), other=rng.choice(OTHERS), place=rng.choice(PLACES)
    )


def plain(rng: random.Random) -> str:
    """A training story without a request before it."""
    while True:
        character, theme = rng.choice(CHARACTERS), rng.choice(tuple(PLOTS))
        if not is_held_out(TASK, f"{character}|{theme}"):
            return tell(rng, character, theme)


@cache
def vocabulary() -> frozenset[str]:
    """Every word a story can have, to tell a broken word from a real one."""
    steps = [sentence for plot in PLOTS.values() for step in plot for sentence in step]
    parts = (*CHARACTERS, *NAMES, *OTHERS, *PLACES, *PLOTS, *OPENINGS, *MEETINGS, *ENDINGS, *steps)
    return frozenset(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", "", " ".join(parts)).lower()))


def is_sound(item: Item, text: str) -> bool:
    """Right character and theme, one hero throughout, known words only, a proper length and a proper end."""
    character, theme = item.key.split("|")
    words = re.findall(r"[a-z]+", text.lower())
    heroes = {name for name in NAMES if re.search(rf"\b{name}\b", text)}
    return (
        character in words
        and theme in words
        and len(heroes) == 1
        and MIN_WORDS <= len(words) <= MAX_WORDS
        and vocabulary().issuperset(words)
        and text.endswith(" The end.")
    )
