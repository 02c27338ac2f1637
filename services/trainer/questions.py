"""Questions about the fact base, answered with one sentence.

Invariants: the key is (relation, subject, phrasing): what is held out is a way of asking for a fact that training states
in its other phrasings. The test suite checks that every fact keeps at least two of them.
"""

from __future__ import annotations

import random

from llmos.services.trainer.facts import RELATIONS, Relation
from llmos.services.trainer.items import Item

TASK = "questions"
FACTS = tuple((relation, subject, answer) for relation in RELATIONS for subject, answer in relation.pairs)


def draw(rng: random.Random) -> Item:
    relation, subject, answer = rng.choice(FACTS)
    return question(relation, subject, answer, rng.choice(relation.phrasings))


def question(relation: Relation, subject: str, answer: str, phrasing: str) -> Item:
    key = f"{relation.name}|{subject}|{phrasing}"
    return Item(TASK, key, phrasing.format(s=subject), statement(relation, subject, answer))


def statement(relation: Relation, subject: str, answer: str) -> str:
    sentence = relation.statement.format(s=subject, a=answer)
    return sentence[0].upper() + sentence[1:]


def paragraph(rng: random.Random) -> str:
    """Plain text: a few facts in a row. States answers only, so it gives no held-out question away."""
    return " ".join(statement(*fact) for fact in rng.sample(FACTS, rng.randint(2, 5)))
