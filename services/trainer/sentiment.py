"""Labelling a short review as positive, negative or neutral.

Reviews are one or two clauses about a place, a thing or a person; two clauses always agree in mood, and a negated
adjective turns the mood round. Invariants: the key is the review, so held-out reviews are unseen combinations.
"""

from __future__ import annotations

import random

from llmos.services.trainer.items import Item

TASK = "sentiment"
SUBJECTS = (
    "the food",
    "the film",
    "the book",
    "the room",
    "the service",
    "the music",
    "the phone",
    "the coffee",
    "the hotel",
    "the game",
    "the staff",
    "the soup",
    "the story",
    "the trip",
    "the bread",
    "the price",
    "the lamp",
    "the chair",
    "the battery",
    "the screen",
)
ADJECTIVES = {
    "positive": (
        "great",
        "wonderful",
        "excellent",
        "lovely",
        "perfect",
        "amazing",
        "good",
        "fantastic",
        "delightful",
        "brilliant",
        "very good",
        "really nice",
    ),
    "negative": (
        "terrible",
        "awful",
        "bad",
        "horrible",
        "boring",
        "poor",
        "disappointing",
        "dreadful",
        "useless",
        "very bad",
        "really ugly",
        "broken",
    ),
    "neutral": (
        "okay",
        "average",
        "ordinary",
        "as expected",
        "neither good nor bad",
        "standard",
        "fair",
        "so-so",
        "nothing special",
        "acceptable",
    ),
}
CLOSINGS = {
    "positive": (
        "I loved it.",
        "I will come back.",
        "Highly recommended!",
        "I am very happy.",
        "We enjoyed every minute.",
        "Five stars!",
        "Thank you!",
    ),
    "negative": (
        "I hated it.",
        "Never again.",
        "I want my money back.",
        "I am very unhappy.",
        "A waste of time.",
        "One star.",
        "Stay away!",
    ),
    "neutral": (
        "It does its job.",
        "I have no strong feelings.",
        "Three stars.",
        "It was fine, no more.",
        "I may or may not return.",
        "It is what it is.",
    ),
}
PROMPTS = (
    "Is this review positive, negative or neutral? {review}",
    "What is the sentiment of this review? {review}",
    "Label the sentiment: {review}",
    "Sentiment of: {review}",
    "Classify this review as positive, negative or neutral: {review}",
    "How does the writer feel? {review}",
)
NEGATED = {"positive": "negative", "negative": "positive"}
LABELS = tuple(ADJECTIVES)


def draw(rng: random.Random) -> Item:
    label = rng.choice(LABELS)
    first, second = rng.sample(SUBJECTS, 2)
    shape = rng.randrange(4)
    review = f"{first.capitalize()} was {_quality(rng, label)}"
    if shape == 1:
        review += f" and {second} was {_quality(rng, label)}"
    review += "."
    if shape == 2:
        review += f" {second.capitalize()} was {_quality(rng, label)}."
    if shape == 3:
        review += f" {rng.choice(CLOSINGS[label])}"
    prompt = rng.choice(PROMPTS).format(review=review)
    return Item(TASK, review.lower(), prompt, f"The review is {label}.")


def _quality(rng: random.Random, label: str) -> str:
    if label in NEGATED and rng.random() < 0.2:
        plain = [word for word in ADJECTIVES[NEGATED[label]] if " " not in word]
        return f"not {rng.choice(plain)}"
    return rng.choice(ADJECTIVES[label])
