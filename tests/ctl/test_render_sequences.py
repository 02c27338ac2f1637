"""How sequences look: `ps` complete at 80 columns, everything about one, and where its time went."""

from __future__ import annotations

import io
from typing import Any

import pytest
from msgspec import structs
from rich.console import Console

from llmos.client.types import Explained, JobRow, SeqRow, Stats, Usage
from llmos.codes import FinishReason, SeqState
from llmos.ctl import render
from llmos.ctl.render_sequences import print_explained, print_stats, ps_table

ROW = SeqRow(12345, "alice", "demo", 2, 1234, 567, 1000, 113, 0, 0, 83_000.0, 41.27, job=12345)
LONG = SeqRow(
    99_999_999, "somebody-with-a-long-name", "Qwen/Qwen3-235B-A22B-Instruct-2507", 5, 131072, 65536, 1, 8192, 0, 9,
    3.6e8, 1234.5, -20, job=99_999_999,
)  # fmt: skip
EXPLAINED = Explained(
    1, 7, SeqState.SWAPPED, 10_000.0, queue_ms=2000.0, prefill_ms=500.0, decode_ms=1000.0, preempted_ms=750.0,
    suspended_ms=3000.0, client_ms=1000.0, preemptions=2, suspensions=1, cached_tokens=32, nice=-3, quota_ms=500.0,
    swapped_ms=250.0, blocked_ms=1000.0, swaps=3,
)  # fmt: skip


def lines_of(thing: Any, width: int = 80) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    thing(console) if callable(thing) else console.print(thing)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_ps_fits_80_columns_and_shows_everything() -> None:
    lines = lines_of(ps_table([ROW, LONG]))
    assert lines[0].split() == ["RID", "OWNER", "MODEL", "STATE", "NI", "IN", "OUT", "PAGES", "TOK/S", "AGE"]
    assert lines[2].split() == ["12345", "alice", "demo", "running", "0", "1234", "567", "113", "41.3", "1m23s"]
    assert lines[3].split() == [
        "99999999", "somebod…", "Qwen/Qwen3-235B-A2…", "suspended", "-20", "131k", "65536", "8192", "1234", "4d04h",
    ]  # fmt: skip
    assert [len(line) <= 80 for line in lines] == [True] * 4


def test_a_job_gets_its_column_only_if_there_is_one_to_tell() -> None:
    kid = structs.replace(LONG, rid=99_999_998)
    lines = lines_of(ps_table([ROW, LONG, kid]))
    assert lines[0].split()[:3] == ["RID", "JOB", "OWNER"]
    assert [line.split()[1] for line in lines[2:]] == ["-", "-", "99999999"]
    assert lines[4].split() == [
        "99999998", "99999999", "somebod…", "Qwen/Qwen…", "suspended", "-20", "131k", "65536", "8192", "1234", "4d04h",
    ]  # fmt: skip
    assert [len(line) <= 80 for line in lines] == [True] * 5


def test_a_wide_terminal_shows_the_whole_model() -> None:
    assert LONG.model in lines_of(ps_table([LONG]), width=120)[2].split()


@pytest.mark.parametrize("state", list(SeqState))
def test_states_are_words(state: SeqState) -> None:
    assert lines_of(ps_table([structs.replace(ROW, state=state)]))[2].split()[3] == state.name.lower()
    assert len(state.name) <= 9, "as wide as the table allows"


def test_explained_adds_up() -> None:
    lines = lines_of(lambda console: print_explained(console, EXPLAINED))
    assert lines[0] == "sequence 7, swapped, nice -3, 10.0s old"
    assert [line.split()[:3] for line in lines[4:13]] == [
        ["queue", "2000.0", "20%"],
        ["quota", "500.0", "5%"],
        ["prefill", "500.0", "5%"],
        ["decode", "1000.0", "10%"],
        ["preempted", "750.0", "8%"],
        ["swapped", "250.0", "2%"],
        ["suspended", "3000.0", "30%"],
        ["blocked", "1000.0", "10%"],
        ["client", "1000.0", "10%"],
    ]
    assert lines[-1] == "32 tokens from the cache, preempted 2 times, swapped 3 times, suspended once"
    assert max(map(len, lines)) <= 80
    parts = [name for name in Explained.__struct_fields__ if name.endswith("_ms") and name != "age_ms"]
    assert sum(getattr(EXPLAINED, name) for name in parts) == EXPLAINED.age_ms
    assert {f"{line.split()[0]}_ms" for line in lines[4:13]} == set(parts), "every cause is shown"


def test_a_newborn_has_spent_nothing() -> None:
    newborn = Explained(1, 7, 1, *[0.0] * 7, preemptions=0, suspensions=0, cached_tokens=0, nice=0)
    lines = lines_of(lambda console: print_explained(console, newborn))
    assert lines[-1] == "0 tokens from the cache, preempted never, swapped never, suspended never"
    assert lines[4].split()[:3] == ["queue", "0.0", "-"]


def stats(**changes: Any) -> Stats:
    row = structs.replace(ROW, state=SeqState.BLOCKED, is_open=True, job=12000, host_pages=4, nice=2)
    job = JobRow(12000, 6, 3, 400, 123_456)
    made = Stats(1, row, job, 1801, 12001, (12002, 12003), 4, 2500.0, 0, Usage(1234, 0, 567, 0, 1.0, 2.0))
    return structs.replace(made, **changes)


def test_stats() -> None:
    assert lines_of(lambda console: print_stats(console, stats())) == [
        "sequence 12345, open, blocked, 1m23s old",
        "",
        "owner     alice",
        "model     demo",
        "nice      2",
        "tokens    1801: 1234 in, 567 out of 1000",
        "speed     41.3 tokens/s",
        "pages     113, on the host 4",
        "cached    0 tokens",
        "preempted never",
        "deadline  2.5s left",
        "after     12002 12003",
        "parent    12001",
        "children  4",
        "job       12000: 3 of 6 live, 400 pages, 123k tokens",
    ]


def test_stats_of_one_that_has_ended_and_has_nobody() -> None:
    row = structs.replace(ROW, state=SeqState.FINISHED, max_tokens=0, owner="\x1b[2J")
    alone = stats(row=row, parent=None, after=(), deadline_ms=None, reason=FinishReason.DEPENDENCY)
    lines = lines_of(lambda console: print_stats(console, alone))
    assert lines[0] == "sequence 12345, one-shot, finished (dependency), 1m23s old"
    for line in ("owner     �[2J", "tokens    1801: 1234 in, 567 out", "deadline  -", "after     -", "parent    -"):
        assert line in lines


def test_json_names_states_and_reasons() -> None:
    plain = render.to_plain(stats(reason=FinishReason.CLOSED))
    assert (plain["reason"], plain["row"]["state"], plain["job"]["live"]) == ("closed", "blocked", 3)
    assert render.to_plain(stats())["reason"] is None
    assert render.to_plain(stats(reason=99))["reason"] == "99"
    assert render.to_plain(EXPLAINED)["state"] == "swapped"
