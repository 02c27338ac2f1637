"""Phrases translated between English and Chinese.

Invariants: the key is the phrase in its English form, so a phrase held out in one direction is held out in the other;
the few fixed phrases (greetings) can not be recombined and therefore are always training text.
"""

from __future__ import annotations

import random

from llmos.services.trainer import lexicon
from llmos.services.trainer.items import Item, training_key

TASK = "translation"
TO_CHINESE = (
    "Translate to Chinese: {phrase}",
    "Translate into Chinese: {phrase}",
    "How do you say this in Chinese? {phrase}",
    "English to Chinese: {phrase}",
    "把这句话翻译成中文：{phrase}",
)
TO_ENGLISH = (
    "Translate to English: {phrase}",
    "Translate into English: {phrase}",
    "What does this mean in English? {phrase}",
    "Chinese to English: {phrase}",
    "把这句话翻译成英文：{phrase}",
)


def draw(rng: random.Random) -> Item:
    english, chinese = rng.choices(_SHAPES, _WEIGHTS)[0](rng)
    if rng.random() < 0.5:
        prompt, answer = rng.choice(TO_CHINESE).format(phrase=english), chinese
    else:
        prompt, answer = rng.choice(TO_ENGLISH).format(phrase=chinese), english
    return Item(TASK, _key(english), prompt, answer)


def _key(english: str) -> str:
    return training_key(TASK, english) if english in dict(lexicon.FIXED) else english


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _described(rng: random.Random) -> tuple[str, str]:
    """A noun phrase: a red book, two dogs."""
    noun = rng.choice(lexicon.NOUNS)
    kind = rng.randrange(3)
    if kind == 0:
        number, hanzi = rng.choice(lexicon.NUMBERS)
        return f"{number} {noun.plural}", f"{hanzi}{noun.measure}{noun.chinese}"
    if kind == 1:
        return f"{_article(noun.english)} {noun.english}", f"一{noun.measure}{noun.chinese}"
    adjective, hanzi = rng.choice(lexicon.ADJECTIVES)
    return f"{_article(adjective)} {adjective} {noun.english}", f"一{noun.measure}{hanzi}{noun.chinese}"


def _verb_phrase(rng: random.Random) -> tuple[str, str]:
    subject, subject_hanzi = rng.choice(lexicon.SUBJECTS)
    verb, third, verb_hanzi = rng.choice(lexicon.VERBS)
    thing, thing_hanzi = _described(rng)
    verb = third if subject in lexicon.THIRD_PERSON else verb
    return f"{subject} {verb} {thing}.", f"{subject_hanzi}{verb_hanzi}{thing_hanzi}。"


def _quality(rng: random.Random) -> tuple[str, str]:
    noun = rng.choice(lexicon.NOUNS)
    adjective, hanzi = rng.choice(lexicon.PREDICATES)
    pointer, pointer_hanzi = rng.choice((("This", "这"), ("That", "那")))
    return f"{pointer} {noun.english} is very {adjective}.", f"{pointer_hanzi}{noun.measure}{noun.chinese}很{hanzi}。"


def _where(rng: random.Random) -> tuple[str, str]:
    noun = rng.choice(lexicon.NOUNS)
    owner, owner_hanzi = rng.choice((("the", ""), ("my", "我的"), ("your", "你的"), ("her", "她的"), ("his", "他的")))
    return f"Where is {owner} {noun.english}?", f"{owner_hanzi}{noun.chinese}在哪里？"


def _action(rng: random.Random) -> tuple[str, str]:
    subject, subject_hanzi = rng.choice(lexicon.SUBJECTS)
    verb, third, verb_hanzi = rng.choice(lexicon.ACTIONS)
    place, place_hanzi = rng.choice(lexicon.PLACES)
    verb = third if subject in lexicon.THIRD_PERSON else verb
    if rng.random() < 0.5:
        return f"{subject} {verb} {place}.", f"{subject_hanzi}{place_hanzi}{verb_hanzi}。"
    time, time_hanzi = rng.choice(lexicon.TIMES)
    return f"{subject} {verb} {place} {time}.", f"{subject_hanzi}{time_hanzi}{place_hanzi}{verb_hanzi}。"


def _fixed(rng: random.Random) -> tuple[str, str]:
    return rng.choice(lexicon.FIXED)


_SHAPES = (_verb_phrase, _quality, _where, _action, _fixed)
_WEIGHTS = (8, 3, 2, 4, 1)
