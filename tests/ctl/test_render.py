"""How rows look: complete at 80 columns, harmless to a terminal, JSON with names."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from msgspec import structs
from rich.console import Console

from llmos.client.types import Chunk, LaneStatus, SeqRow, ServiceStatus, StatusReply, TenantRow, Tokenization, Usage
from llmos.ctl import render, render_sequences, render_tenants

ROW = SeqRow(12345, "alice", "demo", 2, 1234, 567, 1000, 113, 0, 0, 83_000.0, 41.27)


def draw(thing: Any, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(thing)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_tenants_fit_80_columns() -> None:
    most = 2**31 - 1
    free = TenantRow("alice", "demo", 1.0, most, 0, most, most, 0.0, 113, 3, 40, 98_765)
    full = TenantRow(
        "somebody-with-a-long-name", "Qwen/Qwen3-235B", 0.3333333, 99_999, 99_999, 256, 100_000, 123_456.0, 99_999, 256,
        100_000, 123_456_789_012,
    )  # fmt: skip
    lines = draw(render_tenants.tenants_table([free, full]))
    assert lines[0].split() == ["TENANT", "MODEL", "WEIGHT", "RUN", "WAIT", "PAGES", "KEEPS", "MAX", "T/S", "TOKENS"]
    assert lines[2].split() == ["alice", "demo", "1", "3", "40", "113", "0", "-", "98765"]
    assert lines[3].split() == [
        "somebody-…", "Qwen/Qwen…", "0.3333", "256/256", "100k/100k", "99999/99999", "99999", "123k", "123G",
    ]  # fmt: skip
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (99_999, "99999"),
        (100_000, "100k"),
        (999_499, "999k"),
        (999_500, "1M"),
        (4.56e6, "4.56M"),
        (2e12, "2T"),
    ],
)
def test_counts_stay_short(value: float, shown: str) -> None:
    assert render_tenants.short_count(value) == shown


def test_nothing_moves_the_cursor() -> None:
    assert render.printable("a\x1b[2Jb\x07c\r\x9bd\n\te漢") == "a�[2Jb�c��d\n\te漢"
    evil = SeqRow(1, "\x1b]0;x", "[red]m[/red]", 2, 1, 1, 1, 1, 0, 0, 1.0, 1.0)
    line = draw(render_sequences.ps_table([evil]))[2]
    assert "\x1b" not in line
    assert "[red]m[/red]" in line


@pytest.mark.parametrize(
    ("milliseconds", "shown"),
    [
        (0, "0.0s"),
        (12_340, "12.3s"),
        (83_000, "1m23s"),
        (3_600_000, "1h00m"),
        (187 * 60_000, "3h07m"),
        (1.9e8, "2d04h"),
    ],
)
def test_durations(milliseconds: float, shown: str) -> None:
    assert render.duration(milliseconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(999, "999 B"), (1500, "1.5 KB"), (15_300_000, "15.3 MB"), (2e12, "2.0 TB")]
)
def test_sizes(count: float, shown: str) -> None:
    assert render.size(count) == shown


def test_json_has_names(capsys: pytest.CaptureFixture[str]) -> None:
    render.write_json([ROW])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["rid"], row["state"], row["tokens_per_s"]) == (12345, "running", 41.27)
    status = StatusReply(1, "0.1.0", 5.0, (), (ServiceStatus("gateway", 4, 0, 2, 0.0, "x"),))
    assert render.to_plain(status)["services"][0]["state"] == "backoff"
    assert render.to_plain(ServiceStatus("x", 77, 0, 0, 0.0, ""))["state"] == "77"
    plain = {"text": "é", "token_ids": [1, 2], "offset": 0, "logprobs": None, "rid": 4}
    assert render.to_plain(Chunk("é", (1, 2), 0, rid=4)) == plain
    assert render.to_plain({"usage": 1}) == {"usage": 1}
    assert render.to_plain(Usage(1, 2, 3, 4, 5.0, 6.0))["cached_tokens"] == 2


def test_status_and_tokens() -> None:
    lane = LaneStatus("demo", 1, True, 16, 64, 60, 2, 1, 3, 9, 27, 0, 8, 16, 0, "float32", "cpu", 512)
    out = io.StringIO()
    console = Console(file=out, width=80)
    services = (ServiceStatus("executor.demo", 3, 42, 1, 61_000.0, "weights in 0.2 s"),)
    render.print_status(console, StatusReply(1, "0.1.0", 61_000.0, (lane,), services))
    text = out.getvalue()
    assert text.startswith("llmosd 0.1.0, up 1m01s\n")
    assert ["demo", "cpu", "float32", "512", "3", "1", "4/64", "27", "50%"] in [
        line.split() for line in text.splitlines()
    ]
    assert "weights in 0.2 s" in text
    assert "demo:" not in text, "nothing unusual to tell"
    out.seek(0)
    render.print_tokens(console, Tokenization("demo", (5, 66), ("a", " \n")))
    assert ["66", '"', '\\n"'] in [line.split() for line in out.getvalue().splitlines()]


def test_status_tells_what_is_not_zero() -> None:
    plain = LaneStatus("demo", 1, True, 16, 64, 60, 2, 1, 3, 9, 27, 0, 8, 16, 0, "float32", "cpu", 512)
    full = structs.replace(
        plain, model="other", host_pages_total=64, host_pages_free=60, blocked=12, suspended=3, swaps_out=8, swaps_in=7,
        pages_copied=2, deadline_misses=1, preemptions=5,
    )  # fmt: skip
    quiet = structs.replace(plain, model="third", host_pages_total=10, host_pages_free=10)
    out = io.StringIO()
    render.print_status(Console(file=out, width=80), StatusReply(1, "0.1.0", 5.0, (plain, full, quiet), ()))
    assert out.getvalue().splitlines()[-2:] == [
        "other: host pages 4/64, blocked 12, suspended 3, preempted 5, swapped out 8, swapped in 7, pages copied 2, "
        "deadlines missed 1",
        "third: host pages 0/10",
    ]
