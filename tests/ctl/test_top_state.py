"""What `llmosctl top` remembers of the daemon's answers, and what keys do to it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from top_world import busy_rows, explained, lane, polled, rids, selected, seq_row, state_of, tenant, type_keys

from llmos.codes import SeqState
from llmos.ctl.top import keys
from llmos.ctl.top.control import MAX_FILTER_CHARS, Wish
from llmos.ctl.top.state import MESSAGE_S, NOT_RUNNING, Explanation, State, Verb, View
from llmos.errors import DaemonNotRunning, NotFound, PermissionRefused, Unavailable

# The state


def test_rates_come_from_counters() -> None:
    state = State()
    tenants = (tenant("alice", tokens=1000), tenant("bob", tokens=0))
    state.take(polled(seq_row(1, output_tokens=10), seq_row(2), at=5.0, tenants=tenants))
    assert state.total_throughput is None
    later = (tenant("alice", tokens=1300), tenant("bob", tokens=100))
    rows = (seq_row(1, output_tokens=40), seq_row(2))
    state.take(polled(*rows, at=7.0, tenants=later, lanes=(lane(tokens_committed=50_500),)))
    assert (state.total_throughput, state.throughput("demo"), list(state.history)) == (250.0, 250.0, [250.0])
    assert [each.rate for each in state.sequences.rows] == [15.0, 0.0]
    assert [(each.rate, each.share) for each in state.tenants.rows] == [(150.0, 0.75), (50.0, 0.25)]
    state.take(polled(*rows, at=8.0, tenants=later, lanes=(lane(tokens_committed=0, generation=2),)))
    assert state.total_throughput is None  # the executor was replaced
    assert list(state.history) == [250.0]


def test_shares_are_of_a_tenants_own_model() -> None:
    state = State()
    for at, tokens in ((0.0, 0), (1.0, 100)):
        both = (tenant("a", tokens=tokens), tenant("a", model="other", tokens=tokens * 3), tenant("b", tokens=tokens))
        state.take(polled(at=at, tenants=both))
    assert [(each.row.model, each.share) for each in state.tenants.rows] == [
        ("demo", 0.5),
        ("other", 1.0),
        ("demo", 0.5),
    ]


def test_a_lost_daemon_leaves_what_was_known() -> None:
    state = state_of(seq_row(1))
    state.lose(DaemonNotRunning("llmosd is not running on /run/x; start it with: llmosd"))
    assert (state.trouble, rids(state)) == (NOT_RUNNING, [1])
    state.lose(Unavailable("the gateway \x1b[2J is starting"))
    assert state.trouble == "the gateway �[2J is starting, trying again"
    state.take(polled(seq_row(2)))
    assert (state.trouble, rids(state)) == ("", [2])


def test_messages_go_away() -> None:
    state = state_of(seq_row(1))
    state.refuse(Verb("kill", 1), NotFound("no sequence 1"), now=10.0)
    assert state.message is not None
    assert (state.message.text, state.message.is_error) == ("no sequence 1", True)
    assert not state.expire(10.0 + MESSAGE_S - 0.01)
    assert state.expire(10.0 + MESSAGE_S)
    assert state.message is None
    assert not state.expire(99.0)


@pytest.mark.parametrize(
    ("verb", "report", "after"),
    [
        (Verb("nice", 1, 7), "sequence 1: nice 7", {"nice": 7}),
        (Verb("suspend", 1), "suspended sequence 1", {"state": SeqState.SUSPENDED}),
        (Verb("resume", 1), "resumed sequence 1", {"state": SeqState.WAITING}),
    ],
)
def test_a_confirmed_change_is_shown_at_once(verb: Verb, report: str, after: dict[str, Any]) -> None:
    state = state_of(seq_row(1), seq_row(2))
    state.succeed(verb, now=0.0)
    assert state.message is not None
    assert (state.message.text, state.message.is_error) == (report, False)
    assert state.polled is not None
    assert state.polled.rows == (msgspec.structs.replace(seq_row(1), **after), seq_row(2))


def test_a_killed_sequence_is_gone_at_once() -> None:
    state = state_of(seq_row(1), seq_row(2))
    state.succeed(Verb("kill", 1), now=0.0)
    assert rids(state) == [2]


def test_owners_keep_their_colours() -> None:
    state = state_of(seq_row(1, owner="zoe"))
    before = dict(state.owner_styles)
    assert set(before) == {"alice", "bob", "carol", "zoe"}
    assert len(set(before.values())) == 4
    state.take(polled(seq_row(1, owner="aaron"), seq_row(2, owner="zoe")))
    assert {owner: state.owner_styles[owner] for owner in before} == before


# Keys


def test_kill_asks_first() -> None:
    state = state_of(seq_row(1), seq_row(2))
    for answer, outcome in (
        ("n", []),
        ("q", []),
        (keys.ENTER, []),
        (keys.ESC, []),
        ("Y", [Verb("kill", 1)]),
        ("y", [Verb("kill", 1)]),
    ):
        assert type_keys(state, "K") == []
        assert state.asking is not None
        assert type_keys(state, answer) == outcome
        assert state.asking is None


def test_kill_means_the_sequence_that_was_asked_about() -> None:
    state = state_of(seq_row(1), seq_row(2))
    type_keys(state, "K")
    state.take(polled(seq_row(2)))
    assert type_keys(state, "y") == [Verb("kill", 1)]


def test_nice_counts_from_what_was_asked_for() -> None:
    state = state_of(seq_row(1, nice=17))
    assert type_keys(state, "+", "=") == [Verb("nice", 1, 18), Verb("nice", 1, 19)]
    assert type_keys(state, "+") == []
    assert state.message is not None
    assert state.message.text == "nice ends at 19"
    state.succeed(Verb("nice", 1, 18), now=0.0)
    state.refuse(Verb("nice", 1, 19), PermissionRefused("no"), now=0.0)
    assert type_keys(state, "-") == [Verb("nice", 1, 17)]
    low = state_of(seq_row(1, nice=-20))
    assert type_keys(low, "-") == []


def test_z_suspends_and_resumes() -> None:
    state = state_of(seq_row(1))
    assert type_keys(state, "z") == [Verb("suspend", 1)]
    state.succeed(Verb("suspend", 1), now=0.0)
    assert type_keys(state, "z") == [Verb("resume", 1)]


def test_an_act_holds_the_selection() -> None:
    state = state_of(seq_row(5))
    type_keys(state, "+")
    state.take(polled(seq_row(1), seq_row(5)))
    assert selected(state) == 5


def test_without_sequences_verbs_do_nothing() -> None:
    state = state_of()
    assert type_keys(state, "K", "+", "-", "z", "e", keys.DOWN, keys.PAGE_UP) == []
    assert state.to_explain is None
    assert State().selected is None


def test_verbs_belong_to_sequences() -> None:
    state = state_of(seq_row(1))
    for view in ("t", "h"):
        type_keys(state, view)
        assert type_keys(state, "K", "+", "z") == []
        assert state.asking is None
        assert state.message is not None
        assert state.message.is_error
        type_keys(state, view)
    assert state.view is View.SEQUENCES


def test_filter_is_typed_live() -> None:
    state = state_of(seq_row(1, owner="alice"), seq_row(2, owner="bob"), seq_row(3, owner="bobby"))
    type_keys(state, "/", "b", "o", "b", "b")
    assert rids(state) == [3]
    assert type_keys(state, keys.BACKSPACE, keys.DOWN) == []
    assert rids(state) == [2, 3]
    assert selected(state) == 3
    type_keys(state, keys.ENTER)
    assert (state.asking, state.sequences.filter) == (None, "bob")
    type_keys(state, keys.ESC)
    assert (rids(state), state.sequences.filter) == ([1, 2, 3], "")
    type_keys(state, "/", "q", "K", "t", keys.ESC)
    assert (state.asking, state.sequences.filter, state.view) == (None, "", View.SEQUENCES)
    type_keys(state, "/", *("x" * 200))
    assert len(state.sequences.filter) == MAX_FILTER_CHARS
    type_keys(state, keys.ERASE)
    assert state.sequences.filter == ""


def test_views_and_escape() -> None:
    state = state_of(seq_row(1))
    type_keys(state, "e")
    assert state.to_explain == 1
    type_keys(state, "t")
    assert state.view is View.TENANTS
    type_keys(state, keys.ENTER)
    assert state.explaining
    type_keys(state, "?")
    assert state.view is View.HELP
    type_keys(state, keys.DOWN, keys.DOWN, "k")
    assert state.help_first == 1
    type_keys(state, keys.ESC)
    assert state.view is View.SEQUENCES
    type_keys(state, keys.ESC)
    assert state.to_explain is None
    type_keys(state, "t", keys.ESC)
    assert state.view is View.SEQUENCES
    type_keys(state, "h", keys.ENTER)
    assert state.view is View.SEQUENCES


def test_tenants_have_their_own_filter_and_order() -> None:
    state = state_of(*busy_rows(5))
    type_keys(state, "t", "/", "o", "l", keys.ENTER, "r")
    assert [each.row.tenant for each in state.tenants.rows] == ["carol"]
    assert (state.sequences.filter, state.sequences.backwards) == ("", False)


def test_pause_quit_redraw() -> None:
    state = state_of(seq_row(1))
    assert type_keys(state, "p") == []
    assert state.paused
    assert type_keys(state, "p") == [Wish.POLL]
    assert type_keys(state, "q") == [Wish.QUIT]
    assert type_keys(state, keys.REDRAW) == [Wish.REDRAW]
    type_keys(state, "/")
    assert type_keys(state, keys.INTERRUPT) == [Wish.QUIT]


def test_unknown_keys_do_nothing() -> None:
    state = state_of(seq_row(1))
    assert type_keys(state, "x", "é", keys.TAB, keys.LEFT, keys.RIGHT, keys.BACKSPACE) == []
    assert state.view is View.SEQUENCES


def test_an_explanation_belongs_to_one_sequence() -> None:
    state = state_of(seq_row(1), seq_row(2))
    type_keys(state, "e")
    state.explanation = Explanation(1, explained(1))
    type_keys(state, keys.DOWN)
    assert state.to_explain == 2
