"""What can be wrong with the tokens of one stream. Pure: offsets and ids as they came, and the ids that are right.

Two questions: do the offsets go on without gap and overlap, and is each token the one that belongs to its place? A difference is
named by what happened (left out, repeated, replaced), for that is what tells whoever looks for the cause.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from chaos.answers import Answer

FAILED, LOST, DUPLICATED, CHANGED = "failed", "lost", "duplicated", "changed"
HARMS = (FAILED, LOST, DUPLICATED, CHANGED)
MOST_FINDINGS = 3  # from a first wrong token on, everything may differ
Finding = tuple[str, str, str]  # harm, what in few words, details
Pieces = Sequence[tuple[int, list[int]]]  # (offset, ids) as they came


def check_ids(start: int, pieces: Pieces, answer: Answer | None, *, whole: bool) -> list[Finding]:
    """What is wrong with the tokens of a reader that asked for them from `start` on. `whole`: none may be missing at the end."""
    found = _check_offsets(start, pieces)
    if answer is None:
        return found
    came = [token for _, ids in pieces for token in ids]
    right = list(answer.ids[start:])
    if came == (right if whole else right[: len(came)]):
        return [(CHANGED, "wrong offset", f"right tokens, but {detail}") for _, _, detail in found[:1]]
    if not found:
        return _align(right, came, start, whole=whole)
    return found if any(harm == CHANGED for harm, _, _ in found) else found + _check_places(start, pieces, right)


def _check_offsets(start: int, pieces: Pieces) -> list[Finding]:
    """Gaps and overlaps; an overlap with other tokens than before is a change."""
    found: list[Finding] = []
    by_place: dict[int, int] = {}
    following = start
    for offset, ids in pieces:
        if offset > following:
            found.append((LOST, "missing tokens", f"{following} to {offset - 1} never came"))
        elif offset < following:
            again = ids[: following - offset]
            before = [by_place.get(offset + i) for i in range(len(again))]
            if again == before:
                found.append((DUPLICATED, "tokens again", f"{len(again)} from offset {offset} on"))
            else:
                found.append((CHANGED, "changed tokens", f"at offset {offset}: {before[:4]}, then {again[:4]}"))
        by_place.update({offset + i: token for i, token in enumerate(ids)})
        following = max(following, offset + len(ids))
    return found


def _check_places(start: int, pieces: Pieces, right: list[int]) -> list[Finding]:
    """Beside gaps and overlaps: is each token the one that belongs to its place?"""
    for offset, ids in pieces:
        for place, token in enumerate(ids, offset - start):
            if not 0 <= place < len(right):
                return [(DUPLICATED, "extra tokens", f"at offset {start + place}")]
            if token != right[place]:
                return [(CHANGED, "changed tokens", f"offset {start + place}: {token}, not {right[place]}")]
    return []


def _align(right: list[int], came: list[int], start: int, *, whole: bool) -> list[Finding]:
    """The offsets are in order and the tokens are not."""
    found: list[Finding] = []
    for tag, low, high, came_low, came_high in difflib.SequenceMatcher(None, right, came, False).get_opcodes():
        missing, extra = right[low:high], came[came_low:came_high]
        place = f"offset {start + low}"
        if tag == "delete":
            if whole or high < len(right):
                found.append((LOST, "missing tokens", f"{len(missing)} at {place}"))
        elif tag == "insert" and extra in (right[low : low + len(extra)], right[max(0, low - len(extra)) : low]):
            found.append((DUPLICATED, "tokens again", f"{len(extra)} at {place}"))
        elif tag == "insert" and low == len(right):
            found.append((DUPLICATED, "extra tokens", f"{len(extra)} at {place}"))
        elif tag in ("insert", "replace"):
            found.append((CHANGED, "changed tokens", f"{place}: {extra[:4]}, not {missing[:4]}"))
    return found[:MOST_FINDINGS]
