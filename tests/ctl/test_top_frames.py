"""Frames of `llmosctl top`, to the character, and that no frame is ever larger than its terminal.

The expected frames are in `test_top_frames/`, one file each, without the spaces at the ends of lines. After a change that is meant,
look at what `python tests/ctl/test_top_frames.py` writes there.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, Group

sys.path.append(str(Path(__file__).parents[1] / "support"))  # for running this file as a program

from top_world import BUSY_TENANTS, FakeClient, busy_rows, explained, lane, seq_row, service, services, status, tenant

from llmos.codes import SeqState, ServiceState
from llmos.ctl.top.control import press
from llmos.ctl.top.look import ASCII, PC, UNICODE, Look, look_for
from llmos.ctl.top.state import Explanation, Polled, State, View
from llmos.ctl.top.view import frame
from llmos.errors import DaemonNotRunning, Unavailable
from llmos.protocol import messages as m

FOLDER = Path(__file__).parent / "test_top_frames"
NOW = 100.0


def watched(client: FakeClient, *pressed: str, polls: int = 12) -> State:
    """After some polls, a second each, the last one two seconds ago; then the keys."""
    state = State()
    for poll in range(polls):
        client.advance(1.0, 20 + poll * 7 % 20)
        state.take(Polled(NOW - 1 - polls + poll, client.status(), client.ps(), client.tenants()))
    for key in pressed:
        press(state, key, NOW)
    return state


def busy(*pressed: str, count: int = 40, **changes: Any) -> State:
    client = FakeClient()
    client.rows = busy_rows(count)
    client.state = status(**changes)
    return watched(client, *pressed)


def empty() -> State:
    client = FakeClient()
    client.rows, client.tenant_rows = (), ()
    client.state = status(
        lane(waiting=0, running=0, blocked=0, suspended=0, pages_free=1000, pages_cached=0, preemptions=0)
    )
    return watched(client)


def explaining() -> State:
    state = busy("j", "j", "e")
    state.explanation = Explanation(1007, explained(1007))
    return state


def lost() -> State:
    state = busy()
    state.lose(DaemonNotRunning("llmosd is not running on /run/llmos; start it with: llmosd"))
    return state


def never_there() -> State:
    state = State()
    state.lose(DaemonNotRunning("llmosd is not running on /run/llmos; start it with: llmosd"))
    return state


def refused() -> State:
    state = busy()
    state.say("nice below 0 is for administrators", NOW, is_error=True)
    return state


def three_models() -> State:
    client = FakeClient()
    client.rows = (
        *busy_rows(6),
        seq_row(2000, model="Qwen3-4B-Instruct", owner="dora", is_open=True, max_tokens=0, output_tokens=0),
    )
    client.state = status(
        lane(host_pages_total=500, host_pages_free=420),
        lane("Qwen3-4B-Instruct", pages_total=200_000, pages_free=150_000, pages_cached=20_000, deadline_misses=4, dtype="float8"),
        lane("tiny", ready=False),
        services=(
            *services()[:2],
            service("executor.demo", restarts=2), service("executor.tiny", ServiceState.BACKOFF, restarts=7, detail="died"),
            service("gateway", ServiceState.STARTING),
        ),
    )  # fmt: skip
    return watched(client)


FRAMES: dict[str, tuple[Callable[[], State], int, int]] = {
    "empty": (empty, 80, 24),
    "busy": (busy, 80, 24),
    "filter": (lambda: busy("/", *"bob run"), 80, 24),
    "kill": (lambda: busy("G", "K"), 80, 24),
    "refused": (refused, 80, 24),
    "explain": (explaining, 80, 24),
    "tenants": (lambda: busy("t"), 80, 24),
    "help": (lambda: busy("h"), 80, 24),
    "lost": (lost, 80, 24),
    "never-there": (never_there, 80, 24),
    "models": (three_models, 80, 24),
    "small": (explaining, 60, 15),
    "small-help": (lambda: busy("h", "j", "j"), 60, 15),
    "narrow": (lambda: busy("t"), 40, 8),
    "large": (explaining, 200, 60),
    "large-models": (three_models, 200, 60),
    "large-tenants": (lambda: busy("t"), 160, 30),
}


def shown(state: State, width: int, height: int, look: Look | None = None, **options: Any) -> list[str]:
    """What a terminal of that size shows, by way of rich."""
    console = Console(file=io.StringIO(), width=width, height=height, record=True, highlight=False, **options)
    console.print(Group(*frame(state, width, height, look or Look(), NOW)))
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize("name", FRAMES)
def test_frame(name: str) -> None:
    make, width, height = FRAMES[name]
    expected = (FOLDER / f"{name}.txt").read_text().splitlines()
    assert shown(make(), width, height) == expected
    assert len(expected) == height


def test_the_whole_of_a_frame_without_colours() -> None:
    """NO_COLOR: the words are the same, and not one colour is sent; the selection and the titles are attributes."""
    out = io.StringIO()
    console = Console(
        file=out, width=80, height=24, force_terminal=True, no_color=True, color_system="standard", highlight=False
    )
    look = look_for(console, "xterm", live=True)
    assert (look.glyphs, look.colours) == (UNICODE, False)
    state = explaining()
    state.view = View.SEQUENCES
    console.print(Group(*frame(state, 80, 24, look, NOW)))
    codes = {code for found in re.findall(r"\x1b\[([\d;]*)m", out.getvalue()) for code in found.split(";")}
    assert codes <= {"", "0", "1", "2", "4", "7", "39", "49"}
    assert "7" in codes
    assert re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).split() == (FOLDER / "explain.txt").read_text().split()


def test_only_the_sixteen_colours_are_used() -> None:
    for make, width, height in FRAMES.values():
        for line in frame(make(), width, height, Look(), NOW):
            styles = " ".join(str(span.style) for span in line.spans)
            assert set(styles.split()) <= {
                "bold", "dim", "reverse", "on", "black", "red", "green", "yellow", "magenta", "cyan", "white", "bright_blue",
            }  # fmt: skip


@pytest.mark.parametrize(
    ("encoding", "term", "glyphs"), [("utf-8", "xterm", UNICODE), ("utf-8", "linux", PC), ("ascii", "xterm", ASCII)]
)
def test_glyphs_suit_the_terminal(encoding: str, term: str, glyphs: Any) -> None:
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert look_for(console, term, live=False).glyphs is glyphs


def test_ascii_frames_are_ascii() -> None:
    look = Look(ASCII)
    for make, width, height in FRAMES.values():
        state = make()
        state.sequences.columns = State(glyphs=ASCII).sequences.columns
        state.tenants.columns = State(glyphs=ASCII).tenants.columns
        assert all(line.plain.isascii() for line in frame(state, width, height, look, NOW))


def test_text_from_outside_is_shown_and_not_obeyed() -> None:
    client = FakeClient()
    evil = "[red]x[/red]\x1b[2J\n\u202e"
    client.rows = (seq_row(1, owner=evil, model=evil),)
    client.tenant_rows = (tenant(evil, pages=500),)
    client.state = status(lane(evil), services=(service(evil, ServiceState.FATAL, detail=evil),), version=evil)
    state = watched(client, "j")
    for look in (Look(), Look(live=False)):
        text = "\n".join(shown(state, 200, 20, look))
        assert "[red]x[/red]�[2J��" in text
        assert not set(text) & set("\x1b\u202e")
    state.lose(Unavailable(evil))
    assert shown(state, 80, 20)[0].startswith(" [red]x[/red]�[2J��, trying again")


def test_on_paper_there_is_every_row_and_nothing_to_press() -> None:
    lines = [line.plain.rstrip() for line in frame(busy(), 80, 1_000_000, Look(live=False), NOW)]
    assert len(lines) == 1 + 2 + 5 + 1 + 40
    assert lines[0] == "llmosd  0.1.0  up 3h07m  40 sequences                                  444 tok/s"
    assert lines[8].split() == ["RID", "OWNER", "STATE▲", "NICE", "PAGES", "OUT/MAX", "DONE", "TOK/S", "AGE", "JOB"]
    assert [line.split()[0] for line in lines[9:12]] == ["1000", "1002", "1007"]
    assert not any(line.startswith("▸") for line in lines)


def test_a_terminal_that_is_too_small_says_so() -> None:
    assert [line.plain for line in frame(busy(), 19, 24, Look(), NOW)] == ["too small"]
    assert [line.plain for line in frame(busy(), 80, 3, Look(), NOW)] == ["too small"]
    assert [line.plain for line in frame(busy(), 3, 1, Look(), NOW)] == ["to…"]
    assert frame(busy(), 0, 0, Look(), NOW) == []


NAMES = st.one_of(st.sampled_from(["alice", "bob", "漢字の名前", "[b]x[/b]", "", "a" * 64]), st.text(max_size=20))
COUNTS = st.one_of(st.integers(0, 300), st.integers(0, 2**31 - 1))
ROWS = st.builds(
    seq_row, st.integers(1, 10**9), owner=NAMES, model=NAMES, state=st.integers(0, 9), nice=st.integers(-20, 19), pages=COUNTS,
    output_tokens=COUNTS, max_tokens=COUNTS, prompt_tokens=COUNTS, preemptions=COUNTS, age_ms=st.floats(0, 1e12), job=COUNTS,
)  # fmt: skip
LANES = st.builds(
    lane, NAMES, ready=st.booleans(), waiting=COUNTS, running=COUNTS, blocked=COUNTS, pages_total=COUNTS, pages_free=COUNTS,
    pages_cached=COUNTS, host_pages_total=st.sampled_from([0, 500]), host_pages_free=st.integers(0, 500),
)  # fmt: skip
SERVICES = st.builds(service, NAMES, st.integers(0, 8), restarts=COUNTS, detail=NAMES)
TENANTS = st.builds(
    tenant, NAMES, pages=COUNTS, max_pages=COUNTS, running=COUNTS, waiting=COUNTS, weight=st.floats(0.001, 1000), tokens=COUNTS,
    tokens_per_s=st.floats(0, 1e9),
)  # fmt: skip
KEYS = st.sampled_from(["j", "G", "page-down", "s", "r", "e", "t", "h", "p", "K", "/", "b", "+", "escape", "enter"])


@given(
    rows=st.lists(ROWS, max_size=60, unique_by=lambda row: row.rid),
    lanes=st.lists(LANES, max_size=6),
    processes=st.lists(SERVICES, max_size=12),
    holders=st.lists(TENANTS, max_size=9, unique_by=lambda row: row.tenant),
    pressed=st.lists(KEYS, max_size=6),
    message=NAMES,
    trouble=st.booleans(),
    size=st.tuples(st.integers(40, 250), st.integers(8, 80)),
    look=st.sampled_from([Look(), Look(ASCII), Look(PC, colours=False), Look(live=False)]),
)
@settings(max_examples=100, deadline=None)
def test_no_frame_is_larger_than_its_terminal(
    rows: list[m.SeqRow], lanes: list[m.LaneStatus], processes: list[m.ServiceStatus], holders: list[m.TenantRow],
    pressed: list[str], message: str, trouble: bool, size: tuple[int, int], look: Look,
) -> None:  # fmt: skip
    state = State(glyphs=look.glyphs)
    found = status(*lanes, services=tuple(processes))
    for at in (0.0, 1.0):
        state.take(Polled(at, found, tuple(rows), tuple(holders)))
    if message:
        state.say(message, NOW, is_error=trouble)
    if trouble:
        state.lose(Unavailable(message))
    width, height = size
    for key in ("", *pressed):
        press(state, key, NOW)
        if state.to_explain is not None:
            state.explanation = Explanation(state.to_explain, explained(state.to_explain))
        lines = frame(state, width, height, look, NOW)
        assert max(line.cell_len for line in lines) <= width
        assert len(lines) == height if look.live else len(lines) <= height
        assert all(line.plain.isprintable() for line in lines)
    assert len(shown(state, width, height, look)) == len(lines)


@pytest.mark.parametrize("make", [make for make, _, _ in FRAMES.values()], ids=list(FRAMES))
def test_every_size(make: Callable[[], State]) -> None:
    state = make()
    for width in (40, 41, 59, 80, 81, 100, 127, 250):
        for height in (8, 9, 10, 13, 24, 80):
            lines = frame(state, width, height, Look(), NOW)
            assert len(lines) == height
            assert max(line.cell_len for line in lines) <= width


def test_the_selected_row_is_always_on_the_screen() -> None:
    for height in range(8, 50):
        state = busy("G", "e")
        state.explanation = Explanation(1035, explained(1035))
        assert any(line.startswith("▸ 1035") for line in shown(state, 80, height)), height


def test_states_are_words() -> None:
    text = "\n".join(shown(busy(), 80, 60))
    for value in SeqState:
        assert (value.name.lower() in text) == (value != SeqState.FINISHED)
    assert sum(row.pages for row in BUSY_TENANTS) == 500


def write() -> None:
    """The frames as they are now."""
    FOLDER.mkdir(exist_ok=True)
    for name, (make, width, height) in FRAMES.items():
        (FOLDER / f"{name}.txt").write_text("\n".join(shown(make(), width, height)) + "\n")


if __name__ == "__main__":
    write()
