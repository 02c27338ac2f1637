"""The lower parts of a frame: where a sequence's time went, and the help."""

from __future__ import annotations

from rich.text import Text

from llmos.client.types import Explained
from llmos.ctl.render import duration, percent
from llmos.ctl.top.columns import gauge, state_of
from llmos.ctl.top.look import Look, Piece, arrange, clean, cut, line, pad
from llmos.ctl.top.state import State

_CAUSES = (
    ("queue", "waited for its turn", "yellow"),
    ("quota", "waited for its tenant's own limits", "yellow"),
    ("prefill", "read its prompt, or computed it again", "green"),
    ("decode", "made tokens", "green"),
    ("preempted", "gave way to others", "magenta"),
    ("swapped", "its pages were in host memory", "magenta"),
    ("suspended", "until resume", "bright_blue"),
    ("blocked", "waited for input or for others", "cyan"),
    ("client", "its client did not read", "red"),
)
FULL_EXPLANATION = len(_CAUSES) + 2
_HELP = (
    ("", "Keys"),
    ("↑ ↓  j k", "choose a row; PgUp PgDn jump; Home: the top, whatever comes there"),
    ("s  S r", "sort by the next column; turn the order around"),
    ("/", "only rows with these words: owner, state, model, rid, job; Esc: all"),
    ("K", "kill the sequence, after a question"),
    ("+  -", "nice up: it waits more; or down, below 0 for administrators"),
    ("z", "suspend the sequence, or resume it"),
    ("e  Enter", "explain: where the sequence's time went"),
    ("t", "tenants: weights, limits and use"),
    ("p", "pause; h or ? help; q or Ctrl-C quit"),
    ("", "Columns"),
    ("OUT/MAX", "tokens made and allowed"),
    ("TOK/S", "tokens made per second, just now; of tenants with prompt tokens"),
    ("JOB", "the sequence that began the job this one belongs to"),
    ("", "States"),
    ("running", "on the machine"),
    ("waiting", "for its turn"),
    ("preempted", "gave way to others, will be computed again"),
    ("swapped", "gave way to others, its pages are in host memory"),
    ("blocked", "waits for input or for other sequences"),
    ("suspended", "until somebody resumes it"),
)


def explanation(state: State, width: int, height: int, look: Look) -> list[Text]:
    """At most `height` lines about the selected sequence."""
    row = state.selected
    if row is None or height < 2:
        return []
    found = state.explanation if state.explanation and state.explanation.rid == row.rid else None
    heading = f"sequence {row.rid}, {clean(row.owner)}, {state_of(row)}, nice {row.nice}"
    if found is None or found.found is None:
        body = [line((cut(found.refusal if found else "asking", width, look.glyphs), "dim"))]
        return [_rule(heading, width, look), *body]
    explained = found.found
    made = [_rule(f"{heading}, {duration(explained.age_ms)} old", width, look)]
    counts = _counts(explained, width, look)
    room = height - 1
    lines = _bars(explained, width, room - 1 if room > 3 else room, look)
    return [*made, *lines, *([counts] if len(lines) < room else [])]


def _bars(explained: Explained, width: int, height: int, look: Look) -> list[Text]:
    """A line for each cause; where there is no room for all, for those that took most."""
    causes = [(name, float(getattr(explained, f"{name}_ms")), why, style) for name, why, style in _CAUSES]
    if height < len(causes):
        most = sorted((cause for cause in causes if cause[1] > 0), key=lambda cause: -cause[1])[:height]
        causes = [cause for cause in causes if cause in most]
    words = 37 if width >= 90 else 0
    room = min(60, max(5, width - 12 - 8 - 6 - (words + 2 if words else 0)))
    return [
        line(
            (pad(name, 12), style if spent else "dim"),
            (gauge(spent, explained.age_ms, room, look.glyphs).replace(look.glyphs.free, " "), style),
            (pad(duration(spent), 8, right=True), "" if spent else "dim"),
            (pad(percent(spent, explained.age_ms), 6, right=True), "" if spent else "dim"),
            (f"  {pad(why, words)}" if words else "", "dim"),
        )
        for name, spent, why, style in causes
    ]


def _counts(explained: Explained, width: int, look: Look) -> Text:
    shown = (
        (f"{explained.cached_tokens} tokens from the cache", 0),
        (f"preempted {_times(explained.preemptions)}", 1),
        (f"swapped {_times(explained.swaps)}", 2),
        (f"suspended {_times(explained.suspensions)}", 3),
    )
    return arrange([Piece(text, "", rank) for text, rank in shown], [], width, look, gap=3)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times" if count else "never"


def _rule(text: str, width: int, look: Look) -> Text:
    shown = cut(text, width - 6, look.glyphs)
    made = line((look.glyphs.rule * 2 + " ", "dim"), (shown, "bold"))
    return made.append(" " + look.glyphs.rule * (width - made.cell_len - 1), "dim")


def help_lines(state: State, width: int, height: int, look: Look) -> list[Text]:
    """The part of the help that is in the window; it says if there is more."""
    made: list[Text] = []
    for key, text in _HELP:
        if not key:
            made.append(line((cut(text, width, look.glyphs), "bold")))
            continue
        key = key.replace("↑ ↓", f"{look.glyphs.up} {look.glyphs.down}")
        made.append(line(("  " + pad(key, 10), "cyan"), (cut(text, width - 12, look.glyphs), "")))
    state.help_first = min(state.help_first, max(0, len(made) - height))
    if len(made) <= height:
        return made
    first = state.help_first
    more = len(made) - first - (height - 1)
    foot = f"{more} more lines, {look.glyphs.down} or j" if more else "the end"
    return [*made[first : first + height - 1], line((cut(foot, width, look.glyphs), "dim"))]
