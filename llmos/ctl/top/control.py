"""A key changes the state, or is a wish that the loop has to see to."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto

from llmos.codes import SeqState
from llmos.ctl.top import keys
from llmos.ctl.top.look import clean
from llmos.ctl.top.state import Asking, State, Verb, View
from llmos.protocol import limits

MAX_FILTER_CHARS = 64


class Wish(Enum):
    QUIT = auto()
    POLL = auto()
    REDRAW = auto()  # all of the screen: something else wrote on it


Outcome = Wish | Verb | None


def press(state: State, key: str, now: float) -> Outcome:
    """What a key does."""
    if key == keys.INTERRUPT:
        return Wish.QUIT
    if key == keys.REDRAW:
        return Wish.REDRAW
    if state.asking is not None:
        return _answer(state, state.asking, key)
    if _moves(state, key):
        return None
    if key in _KEYS:
        return _KEYS[key](state)
    if key in _VERBS:
        if state.view is not View.SEQUENCES:
            state.say("that is for sequences; t or Esc leads back to them", now, is_error=True)
            return None
        state.sequences.held = True  # what was acted on stays selected
        return _VERBS[key](state, now)
    return None


def _answer(state: State, asking: Asking, key: str) -> Outcome:
    """The bottom line asked."""
    if asking.verb is not None:
        state.asking = None
        return asking.verb if key in "yY" else None
    listing = state.listing
    if key == keys.ESC:
        listing.narrow("")
        state.asking = None
    elif key == keys.ENTER:
        state.asking = None
    elif key == keys.BACKSPACE:
        listing.narrow(listing.filter[:-1])
    elif key == keys.ERASE:
        listing.narrow("")
    elif len(key) == 1 and len(listing.filter) < MAX_FILTER_CHARS:
        listing.narrow(listing.filter + key)
    else:
        _moves(state, key)
    return None


def _moves(state: State, key: str) -> bool:
    """Keys that move the selection, or the help text."""
    letters = state.asking is None
    if state.view is View.HELP:
        page = 10
        steps = {keys.UP: -1, "k": -1, keys.DOWN: 1, "j": 1, keys.PAGE_UP: -page, keys.PAGE_DOWN: page, " ": page}
        if key == keys.HOME:
            state.help_first = 0
        elif key in steps:
            state.help_first = max(0, state.help_first + steps[key])
        return key in steps or key == keys.HOME
    listing = state.listing
    if key == keys.UP or (letters and key == "k"):
        listing.move(-1)
    elif key == keys.DOWN or (letters and key == "j"):
        listing.move(1)
    elif key == keys.PAGE_UP:
        listing.move(-listing.height)
    elif key == keys.PAGE_DOWN or (letters and key == " "):
        listing.move(listing.height)
    elif key == keys.HOME or (letters and key == "g"):
        listing.move_to_top()
    elif key == keys.END or (letters and key == "G"):
        listing.move_to_end()
    else:
        return False
    return True


def _quit(_: State) -> Outcome:
    return Wish.QUIT


def _sort(state: State) -> Outcome:
    if state.view is not View.HELP:
        state.listing.next_sort(state.shown_columns)
    return None


def _reverse(state: State) -> Outcome:
    state.listing.order(state.listing.sort, backwards=not state.listing.backwards)
    return None


def _filter(state: State) -> Outcome:
    if state.view is not View.HELP:
        state.asking = Asking()
    return None


def _pause(state: State) -> Outcome:
    state.paused = not state.paused
    return None if state.paused else Wish.POLL


def _tenants(state: State) -> Outcome:
    state.view = View.SEQUENCES if state.view is View.TENANTS else View.TENANTS
    return None


def _help(state: State) -> Outcome:
    state.view = View.SEQUENCES if state.view is View.HELP else View.HELP
    state.help_first = 0
    return None


def _explain(state: State) -> Outcome:
    if state.view is View.HELP:
        return _help(state)
    if state.view is View.SEQUENCES:
        state.explaining = not state.explaining
        state.sequences.held = True
    return None


def _escape(state: State) -> Outcome:
    """One step back, the newest first."""
    if state.view is View.HELP:
        return _help(state)
    if state.explaining and state.view is View.SEQUENCES:
        state.explaining = False
    elif state.listing.filter:
        state.listing.narrow("")
    else:
        state.view = View.SEQUENCES
    return None


def _kill(state: State, _: float) -> Outcome:
    if row := state.selected:
        state.asking = Asking(Verb("kill", row.rid), clean(row.owner))
    return None


def _nicer(by: int) -> Callable[[State, float], Outcome]:
    def wish(state: State, now: float) -> Outcome:
        row = state.selected
        if row is None:
            return None
        value = state.asked_nice.get(row.rid, row.nice) + by
        if not limits.MIN_NICE <= value <= limits.MAX_NICE:
            state.say(f"nice ends at {value - by}", now, is_error=True)
            return None
        state.asked_nice[row.rid] = value
        return Verb("nice", row.rid, value)

    return wish


def _suspend(state: State, _: float) -> Outcome:
    row = state.selected
    if row is None:
        return None
    return Verb("resume" if row.state == SeqState.SUSPENDED else "suspend", row.rid)


_KEYS: dict[str, Callable[[State], Outcome]] = {
    "q": _quit,
    "s": _sort,
    "S": _reverse,
    "r": _reverse,
    "/": _filter,
    "p": _pause,
    "t": _tenants,
    "h": _help,
    "?": _help,
    "e": _explain,
    keys.ENTER: _explain,
    keys.ESC: _escape,
}
_VERBS: dict[str, Callable[[State, float], Outcome]] = {
    "K": _kill,
    "+": _nicer(1),
    "=": _nicer(1),
    "-": _nicer(-1),
    "z": _suspend,
}
