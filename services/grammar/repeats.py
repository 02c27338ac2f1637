"""How often the innermost part of a regular expression may be repeated, counted repetitions multiplied: `(a{10}b){20}` is 200.

Automata grow with that number, and no limit inside the compiler stops them in time. Nothing is matched here: one pass over the text.
"""

from __future__ import annotations

import re

_COUNTED = re.compile(r"\{(\d*)(?:,(\d*))?\}")


def most_repeats(pattern: str) -> int:
    """An upper bound."""
    groups = [1]  # for each open group the most of a part of it
    last = 1  # of the part that a quantifier would repeat
    at = 0
    while at < len(pattern):
        char = pattern[at]
        counted = _COUNTED.match(pattern, at) if char == "{" else None
        if counted:
            last *= max(1, *(int(number[:9]) for number in counted.groups() if number))
            groups[-1] = max(groups[-1], last)
            at = counted.end()
            continue
        if char == "(":
            groups.append(1)
        elif char == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] = max(groups[-1], last)
        elif char == "[":
            at = _class_end(pattern, at)
            last = 1
        elif char not in "*+?":
            at += char == "\\"
            last = 1
        at += 1
    return max(groups)


def _class_end(pattern: str, at: int) -> int:
    """Where the `]` of a class is that begins at `at`; classes may be nested."""
    depth, at = 1, at + 1
    at += pattern[at : at + 1] == "^"
    at += pattern[at : at + 1] == "]"  # first it stands for itself
    while at < len(pattern) and depth:
        char = pattern[at]
        depth += (char == "[") - (char == "]")
        at += 1 + (char == "\\")
    return at - 1
