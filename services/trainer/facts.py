"""The fact base: relations, the ways to ask for them, and their (subject, answer) pairs.

Invariants: a relation has at least six phrasings; a subject occurs once per relation. `{s}` is the subject, `{a}` the answer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    name: str
    phrasings: tuple[str, ...]
    statement: str
    pairs: tuple[tuple[str, str], ...]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """`France=Paris; Italy=Rome` as pairs."""
    pairs = tuple((left.strip(), right.strip()) for left, right in (entry.split("=") for entry in text.split(";")))
    assert len(dict(pairs)) == len(pairs), "a subject is listed twice"
    return pairs


RELATIONS = (
    Relation(
        "capital",
        (
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "What is {s}'s capital?",
            "Name the capital of {s}.",
            "Tell me the capital of {s}.",
            "What is the capital city of {s}?",
            "Do you know the capital of {s}?",
            "Which capital does {s} have?",
        ),
        "The capital of {s} is {a}.",
        _pairs(
            "France=Paris; Italy=Rome; Spain=Madrid; Germany=Berlin; Japan=Tokyo; China=Beijing; Russia=Moscow; "
            "Egypt=Cairo; Greece=Athens; Portugal=Lisbon; England=London; Ireland=Dublin; Norway=Oslo; "
            "Sweden=Stockholm; Finland=Helsinki; Denmark=Copenhagen; Poland=Warsaw; Austria=Vienna; "
            "Hungary=Budapest; Turkey=Ankara; India=New Delhi; Thailand=Bangkok; Vietnam=Hanoi; Cuba=Havana; "
            "Peru=Lima; Canada=Ottawa; Australia=Canberra; Kenya=Nairobi; Chile=Santiago; Iran=Tehran"
        ),
    ),
    Relation(
        "continent",
        (
            "On which continent is {s}?",
            "What continent is {s} in?",
            "Where in the world is {s}?",
            "Which continent does {s} belong to?",
            "Name the continent of {s}.",
            "In which continent does {s} lie?",
            "Tell me the continent of {s}.",
        ),
        "{s} is in {a}.",
        _pairs(
            "France=Europe; Italy=Europe; Spain=Europe; Germany=Europe; Japan=Asia; China=Asia; India=Asia; "
            "Thailand=Asia; Vietnam=Asia; Egypt=Africa; Kenya=Africa; Nigeria=Africa; Morocco=Africa; "
            "Brazil=South America; Peru=South America; Chile=South America; Canada=North America; "
            "Mexico=North America; Cuba=North America; Norway=Europe"
        ),
    ),
    Relation(
        "colour",
        (
            "What color is {s}?",
            "What is the color of {s}?",
            "Which color does {s} have?",
            "Tell me the color of {s}.",
            "Name the color of {s}.",
            "Do you know the color of {s}?",
            "What color does {s} have?",
        ),
        "The color of {s} is {a}.",
        _pairs(
            "the sky=blue; grass=green; snow=white; coal=black; blood=red; a banana=yellow; a carrot=orange; "
            "milk=white; the sun=yellow; a leaf=green; a strawberry=red; a lemon=yellow; chocolate=brown; "
            "the sea=blue; a crow=black; a frog=green; a flamingo=pink; an elephant=gray; a tomato=red; "
            "a pumpkin=orange"
        ),
    ),
    Relation(
        "opposite",
        (
            "What is the opposite of {s}?",
            "Give me the opposite of {s}.",
            "Which word is the opposite of {s}?",
            "Name the opposite of {s}.",
            "Tell me the opposite of {s}.",
            "What is the contrary of {s}?",
            "Opposite of {s}?",
        ),
        "The opposite of {s} is {a}.",
        _pairs(
            "hot=cold; big=small; fast=slow; high=low; old=new; happy=sad; day=night; rich=poor; hard=soft; "
            "light=dark; full=empty; wet=dry; open=closed; strong=weak; early=late; long=short; loud=quiet; "
            "near=far; clean=dirty; left=right; up=down; inside=outside; always=never; good=bad; true=false"
        ),
    ),
    Relation(
        "young",
        (
            "What is a young {s} called?",
            "What do you call a young {s}?",
            "What is a baby {s} called?",
            "Name the young of a {s}.",
            "What is the young of a {s}?",
            "How do we call a baby {s}?",
            "Tell me the word for a young {s}.",
        ),
        "A young {s} is called a {a}.",
        _pairs(
            "dog=puppy; cat=kitten; cow=calf; horse=foal; sheep=lamb; pig=piglet; hen=chick; duck=duckling; "
            "goat=kid; lion=cub; frog=tadpole; deer=fawn; swan=cygnet; goose=gosling; kangaroo=joey"
        ),
    ),
    Relation(
        "legs",
        (
            "How many legs does {s} have?",
            "What is the number of legs of {s}?",
            "Tell me how many legs {s} has.",
            "Count the legs of {s}.",
            "On how many legs does {s} stand?",
            "Do you know how many legs {s} has?",
        ),
        "{s} has {a} legs.",
        _pairs(
            "a dog=four; a cat=four; a spider=eight; an ant=six; a bee=six; a bird=two; a horse=four; a human=two; "
            "a snake=no; a fish=no; a crab=ten; a beetle=six; a hen=two; a cow=four; a butterfly=six"
        ),
    ),
    Relation(
        "next",
        (
            "What comes after {s}?",
            "What follows {s}?",
            "Which one comes after {s}?",
            "Name what comes after {s}.",
            "Tell me what follows {s}.",
            "What is next after {s}?",
        ),
        "After {s} comes {a}.",
        _pairs(
            "Monday=Tuesday; Tuesday=Wednesday; Wednesday=Thursday; Thursday=Friday; Friday=Saturday; "
            "Saturday=Sunday; Sunday=Monday; January=February; February=March; March=April; April=May; May=June; "
            "June=July; July=August; August=September; September=October; October=November; November=December; "
            "December=January; spring=summer; summer=autumn; autumn=winter; winter=spring"
        ),
    ),
    Relation(
        "symbol",
        (
            "What is the chemical symbol of {s}?",
            "Which symbol does {s} have?",
            "What is the symbol for {s}?",
            "Name the chemical symbol of {s}.",
            "Tell me the symbol of {s}.",
            "How is {s} written in chemistry?",
        ),
        "The chemical symbol of {s} is {a}.",
        _pairs(
            "hydrogen=H; oxygen=O; carbon=C; nitrogen=N; gold=Au; silver=Ag; iron=Fe; copper=Cu; sodium=Na; "
            "helium=He; lead=Pb; tin=Sn; calcium=Ca; sulfur=S; zinc=Zn"
        ),
    ),
    Relation(
        "author",
        (
            "Who wrote {s}?",
            "Who is the author of {s}?",
            "Which author wrote {s}?",
            "Name the author of {s}.",
            "Tell me who wrote {s}.",
            "By whom is {s}?",
        ),
        "{s} was written by {a}.",
        _pairs(
            "Hamlet=William Shakespeare; Don Quixote=Miguel de Cervantes; War and Peace=Leo Tolstoy; "
            "Faust=Goethe; Frankenstein=Mary Shelley; Emma=Jane Austen; Oliver Twist=Charles Dickens; "
            "Moby Dick=Herman Melville; Dracula=Bram Stoker; The Odyssey=Homer"
        ),
    ),
)
