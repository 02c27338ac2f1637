"""llmosctl on live sequences and tenants: what is sent, what is shown, what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ctl import ctl, json_of, shown
from gateway_world import GatewayWorld, wait_until
from typer.testing import CliRunner
from wiretap import Wiretap

from llmos import Client
from llmos.codes import FinishReason, PageFate, SeqState
from llmos.ctl.main import app
from llmos.protocol import messages as m


@pytest.fixture
def world() -> Iterator[GatewayWorld]:
    with GatewayWorld() as running:
        running.kernel.paused = True
        yield running


@pytest.fixture
def rid(world: GatewayWorld) -> Iterator[int]:
    """A sequence that waits."""
    with Client(world.path) as client, client.generate("abc", stream=True):
        wait_until(lambda: world.kernel.sequences)
        yield next(iter(world.kernel.sequences))


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch) -> Wiretap:
    return Wiretap(monkeypatch)


@pytest.mark.parametrize("value", [["5"], ["-5"], ["--", "-5"], ["-15"], ["-20"], ["19"]])
def test_nice_takes_negative_values(world: GatewayWorld, rid: int, value: list[str]) -> None:
    result = ctl(world, "nice", rid, *value)
    assert (result.exit_code, result.stdout) == (0, f"sequence {rid}: nice {value[-1]}\n")
    assert world.kernel.sequences[rid].nice == int(value[-1])
    assert json_of(world, "nice", "--json", rid, *value[-1:]) == {"rid": rid, "nice": int(value[-1])}


def test_suspend_and_resume(world: GatewayWorld, rid: int) -> None:
    assert shown(world, "suspend", rid) == f"suspended {rid}\n"
    line = shown(world, "ps").splitlines()[2].split()
    assert (line[0], line[3], line[4]) == (str(rid), "suspended", "0")
    assert json_of(world, "ps")[0]["state"] == "suspended"
    for word in ("keep", "swap", "drop"):
        assert json_of(world, "suspend", rid, "--pages", word) == {"rid": rid, "suspended": True, "pages": word}
    assert shown(world, "resume", rid) == f"resumed {rid}\n"
    assert json_of(world, "resume", rid) == {"rid": rid, "suspended": False}
    suspends = [message.pages for message in world.kernel.controls if isinstance(message, m.Suspend)]
    assert suspends == [PageFate.KEEP, PageFate.KEEP, PageFate.SWAP, PageFate.DROP]


def test_deadline(world: GatewayWorld, rid: int, tap: Wiretap) -> None:
    assert shown(world, "deadline", rid, "2.5") == f"sequence {rid}: 2.5 s from now\n"
    assert shown(world, "stat", rid).splitlines()[10] == "deadline  2.5s left"
    assert shown(world, "deadline", rid, "none") == f"sequence {rid}: no deadline\n"
    assert json_of(world, "deadline", rid, 3) == {"rid": rid, "deadline_s": 3.0}
    assert json_of(world, "deadline", rid, "none") == {"rid": rid, "deadline_s": None}
    assert [message.deadline_ms for message in tap.of(m.Deadline)] == [2500.0, None, 3000.0, None]


def test_after(world: GatewayWorld, rid: int, tap: Wiretap) -> None:
    with Client(world.path) as client:
        seq, other = client.spawn("abc").rid, client.spawn("x").rid
    assert shown(world, "after", seq, rid, other) == f"sequence {seq}: after {rid} {other}\n"
    assert shown(world, "after", seq) == f"sequence {seq}: after nothing\n"
    assert json_of(world, "after", seq, rid) == {"rid": seq, "after": [rid]}
    assert [message.after for message in tap.of(m.After)] == [(rid, other), (), (rid,)]


def test_explain_and_stat(world: GatewayWorld, rid: int) -> None:
    lines = shown(world, "explain", rid).splitlines()
    assert lines[0] == f"sequence {rid}, running, nice 0, 10.0s old"
    assert [line.split()[0] for line in lines[4:13]] == [
        "queue", "quota", "prefill", "decode", "preempted", "swapped", "suspended", "blocked", "client",
    ]  # fmt: skip
    found = json_of(world, "explain", rid)
    assert (found["rid"], found["state"], found["suspended_ms"], found["swaps"]) == (rid, "running", 4000.0, 0)
    assert shown(world, "stat", rid).splitlines()[0] == f"sequence {rid}, one-shot, running, 1.5s old"
    stats = json_of(world, "stat", rid)
    assert (stats["row"]["rid"], stats["row"]["state"], stats["job"]["job"]) == (rid, "running", rid)
    assert (stats["reason"], stats["num_tokens"], stats["after"]) == (None, 3, [])


def test_ps_filters(world: GatewayWorld) -> None:
    with Client(world.path) as client:
        root, other = client.spawn("abc"), client.spawn("x")
        kids = root.fork(2)
        kids[1].suspend()
    owner = world.kernel.sequences[root.rid].owner
    job = [root.rid, kids[0].rid, kids[1].rid]

    def rids(*options: object) -> list[int]:
        return [row["rid"] for row in json_of(world, "ps", *options)]

    assert rids() == [root.rid, other.rid, kids[0].rid, kids[1].rid]
    assert rids("--job", root.rid) == rids("--job", kids[0].rid) == job
    assert rids("--job", 4711) == []
    assert rids("--state", "blocked") == [root.rid, other.rid, kids[0].rid]
    assert rids("--state", "SUSPENDED", "--job", root.rid) == [kids[1].rid]
    assert rids("--tenant", owner) == rids()
    assert rids("--tenant", "nobody-else") == []
    lines = shown(world, "ps", "--job", root.rid).splitlines()
    assert lines[0].split()[:3] == ["RID", "JOB", "OWNER"]
    assert [line.split()[1] for line in lines[2:]] == ["-", str(root.rid), str(root.rid)]
    assert shown(world, "ps", "--state", "swapped").splitlines()[0].split()[:2] == ["RID", "OWNER"]


def test_kill_by_selector(world: GatewayWorld, tap: Wiretap) -> None:
    with Client(world.path) as client:
        root, other = client.spawn("abc"), client.spawn("x")
        (kid,) = root.fork()
    assert shown(world, "kill", "--job", kid.rid) == f"killed {root.rid} {kid.rid}\n"
    assert json_of(world, "kill", "--model", "echo", "--tenant", "nobody-else") == {"killed": [], "failed": []}
    assert shown(world, "kill", "-m", "echo") == f"killed {other.rid}\n"
    assert shown(world, "kill", "--model", "echo") == "nothing to kill\n"
    selectors = [(message.rid, message.tenant, message.job, message.model) for message in tap.of(m.Kill)]
    assert selectors == [
        (None, None, kid.rid, None),
        (None, "nobody-else", None, "echo"),
        (None, None, None, "echo"),
        (None, None, None, "echo"),
    ]
    assert ctl(world, "kill", "--job", 4711).exit_code == 4


def test_kill_spares_nobody_for_the_failure_of_another(world: GatewayWorld) -> None:
    with Client(world.path) as client:
        one, two = client.spawn("abc"), client.spawn("x")
        two.kill()
        result = ctl(world, "kill", two.rid, 4711, one.rid)
    assert (result.exit_code, result.stdout) == (1, f"killed {one.rid}\n")
    assert result.stderr == f"llmosctl: sequence {two.rid} has ended (killed)\nllmosctl: no sequence 4711\n"
    assert world.kernel.ended[one.rid].reason == FinishReason.KILLED


def test_close(world: GatewayWorld, rid: int) -> None:
    with Client(world.path) as client:
        one, two = client.spawn("abc"), client.spawn("x")
    assert shown(world, "close", one.rid) == f"closed {one.rid}\n"
    assert json_of(world, "close", two.rid) == {"rid": two.rid, "closed": True}
    again = ctl(world, "close", one.rid)
    assert (again.exit_code, again.stderr) == (1, f"llmosctl: sequence {one.rid} has ended (closed)\n")
    assert ctl(world, "close", rid).stderr == f"llmosctl: sequence {rid} is not open\n"


def test_wait(world: GatewayWorld, tap: Wiretap) -> None:
    with Client(world.path) as client:
        closed, failed, live = client.spawn("abc"), client.spawn("x"), client.spawn("y")
        closed.close()
    world.thread.do(world.kernel._finish, world.kernel.sequences[failed.rid], FinishReason.DEPENDENCY, True)
    assert shown(world, "wait", closed.rid) == f"sequence {closed.rid}: closed, 0 tokens\n"
    result = ctl(world, "wait", 4711, failed.rid, closed.rid)
    assert result.exit_code == 4
    assert result.stdout == f"sequence {failed.rid}: dependency, 0 tokens\nsequence {closed.rid}: closed, 0 tokens\n"
    assert result.stderr == "llmosctl: no sequence 4711\n"
    assert ctl(world, "wait", failed.rid).exit_code == 1
    (ending,) = json_of(world, "wait", closed.rid)
    assert (ending["rid"], ending["reason"], ending["usage"]["prompt_tokens"]) == (closed.rid, "closed", 3)
    tap.sent.clear()
    late = ctl(world, "wait", live.rid, closed.rid, "--timeout", "0.05")
    assert (late.exit_code, late.stdout) == (1, f"sequence {closed.rid}: closed, 0 tokens\n")
    assert late.stderr == f"llmosctl: sequence {live.rid} did not end within 0.05 s\n"
    assert [type(message) for message in tap.sent][:4] == [m.Wait, m.Cancel, m.Stat, m.Wait]


def test_tenants(world: GatewayWorld) -> None:
    assert [line.split()[0] for line in shown(world, "tenant", "list").splitlines()[2:]] == ["alice", "bob"]
    options = "--weight 3 --max-pages 100 --guaranteed-pages 10 --max-running 4 --max-waiting 50 --tokens-per-s 0.5"
    (row,) = json_of(world, "tenant", "set", "alice", *options.split())
    limits = ("weight", "max_pages", "guaranteed_pages", "max_running", "max_waiting", "tokens_per_s")
    assert [row[name] for name in limits] == [3.0, 100, 10, 4, 50, 0.5]
    table = shown(world, "tenant", "set", "alice", "--max-pages", "unlimited")
    assert table.splitlines()[2].split() == ["alice", "echo", "3", "0/4", "0/50", "0", "10", "0.5", "0"]
    assert json_of(world, "--json", "tenant", "list")[0]["max_pages"] == 2**31 - 1
    assert [row["tenant"] for row in json_of(world, "tenant", "list")] == ["alice", "bob"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("nice 4711 5", 4, "no sequence 4711"),
        ("suspend 4711", 4, "no sequence 4711"),
        ("resume 4711", 4, "no sequence 4711"),
        ("explain 4711", 4, "no sequence 4711"),
        ("stat 4711", 4, "no sequence 4711"),
        ("close 4711", 4, "no sequence 4711"),
        ("wait 4711", 4, "no sequence 4711"),
        ("deadline 4711 5", 4, "no sequence 4711"),
        ("after 4711 5", 4, "no sequence 4711"),
        ("fork 4711", 4, "no sequence 4711"),
        ("append 4711 x", 4, "no sequence 4711"),
        ("generate 4711", 4, "no sequence 4711"),
        ("attach 4711", 4, "no sequence 4711"),
        ("nice 1 20", 2, "nice: 20 is outside [-20, 19]"),
        ("nice 1 -21", 2, "nice: -21 is outside"),
        ("nice 1 -x", 2, "Invalid value for 'VALUE'"),
        ("nice 1 5 --jsno", 2, "unexpected extra argument"),
        ("nice 1", 2, "Missing argument 'VALUE'"),
        ("suspend -1", 2, "No such option"),
        ("suspend 1 --pages all", 2, "'all' is not one of 'keep', 'swap', 'drop'"),
        ("suspend 1 --drop-pages", 2, "No such option"),
        ("resume 0", 2, "rid: 0 is not a sequence number"),
        ("explain abc", 2, "Invalid value for 'RID'"),
        ("deadline 1 soon", 2, "'soon' is neither a number of seconds nor 'none'"),
        ("deadline 1 -5", 2, "deadline_s: -5.0 is outside (0, 604800]"),
        ("deadline 1 nan", 2, "deadline_s: nan"),
        ("deadline 1", 2, "Missing argument 'SECONDS|none'"),
        ("after 1 0", 2, "after: 0 is not a sequence number"),
        ("wait", 2, "Missing argument"),
        ("wait 1 --timeout 0", 2, "timeout_s: 0.0 is not a positive number"),
        ("kill 1 --job 2", 2, "give either sequence numbers, or one or more of --tenant, --job, --model"),
        ("kill --job 0", 2, "job: 0 is not a sequence number"),
        ("ps --state dead", 2, "'dead' is none of waiting, running, preempted, finished, suspended, blocked, swapped"),
        ("tenant set alice", 2, "nothing to change"),
        ("tenant set alice --weight 0", 2, "weight: 0.0 is outside (0, 1000]"),
        ("tenant set alice --weight nan", 2, "weight: nan is outside"),
        ("tenant set alice --max-pages -1", 2, "max_pages: -1 is outside"),
        ("tenant set alice --max-running many", 2, "neither a number nor 'unlimited'"),
        ("tenant set alice --tokens-per-s inf", 2, "tokens_per_s: inf is outside"),
        ("tenant nonsense", 2, "No such command"),
        ("run x --nice 20", 2, "nice: 20 is outside"),
        ("run x --deadline 0", 2, "deadline_s: 0.0 is outside (0, 604800]"),
        ("run x --deadline nan", 2, "deadline_s: nan"),
    ],
)
def test_mistakes(world: GatewayWorld, arguments: str, code: int, words: str) -> None:
    result = ctl(world, *arguments.split())
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stdout == ""


def test_without_the_right_it_is_a_failed_request(world: GatewayWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmos.services.gateway.owners.is_administrator", lambda _: False)
    for arguments in ("nice 1 -1", "tenant set alice --weight 2", "run x --nice -1", "spawn x --nice -1"):
        result = ctl(world, *arguments.split())
        assert result.exit_code == 1
        words = "TenantSet is for the role admin" if "tenant" in arguments else "administrators only"
        assert words in result.stderr
        assert result.stdout == ""


COMMANDS = (
    "nice 1 -5", "suspend 1", "resume 1", "explain 1", "stat 1", "close 1", "wait 1", "deadline 1 5", "after 1 2", "kill 1",
    "kill --model x", "ps --job 1", "spawn", "append 1 x", "generate 1", "fork 1", "attach 1", "run x -n 2", "tenant list",
    "tenant set a --weight 1",
)  # fmt: skip


@pytest.mark.parametrize("arguments", COMMANDS)
def test_without_a_daemon(arguments: str) -> None:
    result = CliRunner().invoke(app, [*arguments.split(), "--run-dir", "/nowhere/at/all"])
    assert result.exit_code == 3
    assert result.stderr == (
        "llmosctl: llmosd is not running on /nowhere/at/all; start it with: llmosd (or: make run)\n"
    )


@pytest.mark.parametrize("arguments", ["tenant", *sorted({" ".join(c.split()[:1]) for c in COMMANDS}), "tenant set"])
def test_help_documents_the_exit_codes(arguments: str) -> None:
    text = " ".join(CliRunner().invoke(app, [*arguments.split(), "-h"]).stdout.split())
    assert "3 llmosd not running" in text


def test_every_state_can_be_asked_for(world: GatewayWorld) -> None:
    for state in SeqState:
        assert json_of(world, "ps", "--state", state.name.lower()) == []
