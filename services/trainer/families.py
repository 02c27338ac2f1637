"""The task families: how to draw an item of each, its share of the training text, and how an answer is judged."""

from __future__ import annotations

from dataclasses import dataclass

from llmos.services.trainer import questions, sentiment, smalltalk, sorting, stories, sums, translation
from llmos.services.trainer.items import Draw, Item


@dataclass(frozen=True, slots=True)
class Family:
    task: str
    draw: Draw
    weight: float  # share of exchanges, not of tokens: a story is five times as long as a question
    evaluated: bool = True


FAMILIES = (
    Family(questions.TASK, questions.draw, 0.18),
    Family(sentiment.TASK, sentiment.draw, 0.14),
    Family(sums.TASK, sums.draw, 0.20),
    Family(sorting.TASK, sorting.draw, 0.18),
    Family(translation.TASK, translation.draw, 0.18),
    Family(stories.TASK, stories.draw, 0.08),
    Family(smalltalk.TASK, smalltalk.draw, 0.04, evaluated=False),
)


def is_right(item: Item, output: str) -> bool:
    if item.task == stories.TASK:
        return stories.is_sound(item, output)
    return output == item.answer
