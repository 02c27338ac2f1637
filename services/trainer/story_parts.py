"""The pieces stories are put together from: who, where, and one small plot for each theme.

Invariants: `{name}` is the hero, `{other}` the second character, `{place}` where it happens. A plot is a list of steps;
a story takes one sentence of each step, in order, and ends with what the hero learnt.
"""

from __future__ import annotations

CHARACTERS = (
    "rabbit",
    "fox",
    "bear",
    "mouse",
    "cat",
    "dog",
    "owl",
    "frog",
    "robot",
    "girl",
    "boy",
    "king",
    "dragon",
    "turtle",
    "bird",
    "wolf",
)
NAMES = ("Pip", "Mina", "Tom", "Lily", "Max", "Rosa", "Ben", "Luna", "Oscar", "Nina", "Leo", "Ada", "Hugo", "Ruby")
OTHERS = (
    "a hungry squirrel",
    "a lost duckling",
    "an old goat",
    "a shy hedgehog",
    "a tired donkey",
    "a young deer",
    "a little lamb",
    "a sad goose",
)
PLACES = (
    "near a quiet river",
    "in a green forest",
    "in a small village",
    "on a high hill",
    "by the blue sea",
    "behind an old mill",
    "in a sunny valley",
    "at the edge of a lake",
)
OPENINGS = (
    "Once upon a time there was a {character} named {name}. {name} lived {place}.",
    "Long ago, a {character} named {name} lived {place}.",
    "There once was a little {character} called {name} who lived {place}.",
    "Far away, {place}, lived a {character} named {name}.",
)
MEETINGS = (
    "One day {name} met {other}.",
    "One morning, {other} came to the door.",
    "On a rainy day {name} saw {other} on the road.",
    "One evening {name} heard the voice of {other}.",
)
ENDINGS = (
    "From that day on, {name} always remembered the lesson of {theme}. The end.",
    "That is how {name} learned about {theme}. The end.",
    "And so {name} learned what {theme} means. The end.",
    "Everyone was happy, and {name} never forgot the value of {theme}. The end.",
)
PLOTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sharing": (
        ("{name} had a basket of sweet apples.", "{name} had a big warm loaf of bread.", "{name} had a pot of honey."),
        ("The visitor had nothing to eat.", "The visitor asked for a small bite."),
        ("At first {name} wanted to keep it all.", "{name} thought about it for a long time."),
        ("Then {name} gave half of it away, and it tasted better than ever.", "Then they ate together and laughed."),
    ),
    "courage": (
        ("A strong storm was coming.", "The bridge was broken.", "A deep dark cave lay ahead."),
        ("The visitor was stuck and called for help.", "The visitor was too afraid to move."),
        ("{name} was afraid too.", "{name} felt a cold shiver."),
        ("But {name} took a deep breath and went to help.", "But {name} walked on, step by step, and saved the day."),
    ),
    "friendship": (
        ("{name} had no one to play with.", "{name} often felt alone."),
        ("The visitor looked lonely as well.", "The visitor smiled and waved."),
        (
            "They played in the grass until sunset.",
            "They built a little house of leaves.",
            "They told each other jokes.",
        ),
        ("Now they meet every day.", "Since then they have been best friends."),
    ),
    "honesty": (
        ("{name} broke a blue vase.", "{name} lost a borrowed book.", "{name} found a bag of gold coins."),
        ("The visitor asked what had happened.", "The visitor looked worried."),
        ("It would have been easy to lie.", "{name} wanted to hide."),
        ("But {name} told the truth, and nobody was angry.", "But {name} told the truth and felt light again."),
    ),
    "patience": (
        ("{name} planted a tiny seed.", "{name} wanted to bake a cake.", "{name} wanted to learn to paint."),
        ("The visitor said that good things take time.", "The visitor told {name} to wait."),
        ("{name} waited one day, and then another day.", "{name} tried again and again."),
        ("At last it was finished, and it was beautiful.", "In the end the waiting was worth it."),
    ),
    "kindness": (
        ("It was a very cold winter.", "The wind was blowing hard."),
        ("The visitor had no coat.", "The visitor had hurt a foot.", "The visitor had lost the way."),
        ("{name} made a cup of hot tea.", "{name} lit a warm fire.", "{name} brought a soft blanket."),
        ("The visitor smiled for the first time that day.", "Soon the visitor felt much better."),
    ),
    "teamwork": (
        ("A heavy stone blocked the path.", "The roof of the barn had a hole.", "A cart was stuck in the mud."),
        ("{name} pushed alone, but nothing moved.", "{name} tried alone and failed."),
        ("The visitor offered to help.", "The visitor had a clever plan."),
        ("Together they did it in no time.", "Together they were strong enough."),
    ),
    "curiosity": (
        ("{name} found a small golden key.", "{name} saw a strange light.", "{name} found an old map."),
        ("The visitor did not know what it was.", "The visitor asked many questions."),
        ("They followed the path over the hill.", "They looked behind every tree."),
        ("At last they found a secret garden.", "At last they found a box full of books."),
    ),
}
