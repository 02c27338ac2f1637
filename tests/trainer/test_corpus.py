"""The generated text: the same for the same seed, sound, and free of held-out items."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import islice

import pytest

from llmos.services.trainer import chat, lexicon, questions, sorting, stories, sums
from llmos.services.trainer.corpus import documents, held_out, training_item
from llmos.services.trainer.facts import RELATIONS
from llmos.services.trainer.families import FAMILIES, is_right
from llmos.services.trainer.items import Item, draw_split, is_held_out

EVALUATED = [family for family in FAMILIES if family.evaluated]


def exchanges(document: str) -> list[tuple[str, str]]:
    """The (prompt, answer) pairs of a training document."""
    return re.findall(r"<\|user\|>(.*?)<\|end\|><\|assistant\|>(.*?)<\|end\|>", document)


def test_the_corpus_is_a_function_of_the_seed() -> None:
    first, second, other = (list(islice(documents(seed), 200)) for seed in (5, 5, 6))
    assert first == second
    assert first != other
    assert held_out(5, 20) == held_out(5, 20)


def test_focus_brings_more_of_a_task() -> None:
    usual, focused = (
        sum(text.count("Sort") for text in islice(documents(0, focus), 500)) for focus in ((), (sorting.TASK,))
    )
    assert focused > 1.4 * usual


def test_no_held_out_item_is_in_the_training_text() -> None:
    tests = {(item.prompt.lower(), item.answer) for items in held_out(0, 200).values() for item in items}
    assert len(tests) > 800
    texts = list(islice(documents(0), 5000))
    trained = {(prompt.lower(), answer) for text in texts for prompt, answer in exchanges(text)}
    assert len(trained) > 5000
    assert not tests & trained


def test_training_and_held_out_keys_are_disjoint() -> None:
    rng = random.Random(1)
    weights = [family.weight for family in FAMILIES]
    trained = {(item.task, item.key) for item in (training_item(rng, weights) for _ in range(20_000))}
    tested = {(item.task, item.key) for items in held_out(0, 200).values() for item in items}
    assert not trained & tested
    assert all(is_held_out(*key) for key in tested)


@pytest.mark.parametrize("family", EVALUATED, ids=lambda family: family.task)
def test_both_splits_have_items_and_reference_answers_are_right(family) -> None:
    rng = random.Random(2)
    for held in (False, True):
        item = draw_split(family.draw, rng, held_out=held)
        assert is_right(item, item.answer)
        assert not is_right(item, item.answer + " cat")


def test_every_fact_keeps_phrasings_in_training() -> None:
    for relation, subject, answer in questions.FACTS:
        items = [questions.question(relation, subject, answer, phrasing) for phrasing in relation.phrasings]
        assert sum(not is_held_out(item.task, item.key) for item in items) >= 2, (relation.name, subject)
    assert all(len(relation.phrasings) >= 6 for relation in RELATIONS)


def test_the_split_ignores_order() -> None:
    assert sums._key(12, 30) == sums._key(30, 12)
    rng = random.Random(3)
    assert all(item.key == item.answer for item in (sorting.draw(rng) for _ in range(50)))


def test_single_digit_sums_are_training_text_for_they_are_steps_of_others() -> None:
    assert not any(is_held_out(sums.TASK, sums._key(a, b)) for a in range(10) for b in range(10))


@pytest.mark.parametrize(
    ("a", "b", "answer"),
    [
        (4, 5, "4 + 5 = 9."),
        (0, 0, "0 + 0 = 0."),
        (7, 8, "7 + 8 = 15."),
        (47, 85, "7+5=12, 4+8+1=13, so 47 + 85 = 132."),
        (347, 85, "7+5=12, 4+8+1=13, 3+0+1=4, so 347 + 85 = 432."),
    ],
)
def test_worked_sums(a: int, b: int, answer: str) -> None:
    assert sums.worked_answer(a, b) == answer


def test_words_have_one_translation_each() -> None:
    for pairs in (lexicon.ADJECTIVES, lexicon.SUBJECTS, lexicon.PLACES, lexicon.TIMES, lexicon.NUMBERS, lexicon.FIXED):
        for side in (0, 1):
            assert max(Counter(pair[side] for pair in pairs).values()) == 1
    assert len({noun.chinese for noun in lexicon.NOUNS}) == len(lexicon.NOUNS)


def test_a_story_with_a_fault_is_not_sound() -> None:
    rng = random.Random(4)
    item = Item(stories.TASK, "fox|sharing", "", "")
    text = stories.tell(rng, "fox", "sharing")
    hero = next(name for name in stories.NAMES if re.search(rf"\b{name}\b", text))
    assert stories.is_sound(item, text)
    assert not stories.is_sound(item, text.replace("fox", "wolf"))
    assert not stories.is_sound(item, text.removesuffix(" The end."))
    assert not stories.is_sound(item, text.replace("One", "Onne").replace("there", "thre").replace("lived", "livved"))
    assert not stories.is_sound(item, text.replace(hero, "Zed"))


def test_documents_are_well_formed() -> None:
    for text in islice(documents(0), 500):
        assert text.startswith(chat.BEGIN)
        assert text.endswith(chat.END)
        assert "{" not in text
        assert "\n" not in text
