"""llmosctl makes and feeds sequences: spawn, append, generate, fork, attach, and the samples of run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from ctl import ctl, json_of, shown
from gateway_world import DEADLINE_S, GatewayWorld, wait_until
from wiretap import Wiretap

from llmos import Client, SamplingParams
from llmos.codes import SeqState
from llmos.protocol import messages as m


@pytest.fixture
def world() -> Iterator[GatewayWorld]:
    with GatewayWorld() as running:
        yield running


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch) -> Wiretap:
    return Wiretap(monkeypatch)


def spawned(world: GatewayWorld, text: str = "abc") -> int:
    return int(shown(world, "spawn", text))


def start(world: GatewayWorld, *arguments: object) -> subprocess.Popen[str]:
    """llmosctl as a process without a terminal."""
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-P", "-m", "llmos.ctl.main", *map(str, arguments), "--run-dir", str(world.path)]
    return subprocess.Popen(
        command, text=True, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_conversation_over_several_commands(world: GatewayWorld, tap: Wiretap) -> None:
    rid = int(shown(world, "spawn", "abc", "--nice", "3", "--model", "echo"))
    assert shown(world, "append", rid, "de") == f"sequence {rid}: 5 tokens\n"
    result = ctl(world, "generate", rid, "--max-tokens", 7, "-t", 0, "--stop", "zz", "--deadline", 60, "--timeout", 20)
    assert (result.exit_code, result.stdout) == (0, "abcdeab\n")
    assert result.stderr.startswith("7 tokens")
    assert "ended by: length" in result.stderr
    assert json_of(world, "append", rid, "f") == {"rid": rid, "num_tokens": 13}
    assert ctl(world, "append", rid, "-", stdin="g\n").stdout == f"sequence {rid}: 14 tokens\n"
    assert json_of(world, "generate", rid, "--max-tokens", 3)["text"] == "abc"
    assert shown(world, "attach", rid, "--from", 1) == "bc\n"
    assert shown(world, "close", rid) == f"closed {rid}\n"
    params = SamplingParams(max_tokens=7, temperature=0.0, stop=("zz",))
    assert tap.of(m.Spawn) == [m.Spawn(1, "echo", "abc", nice=3)]
    assert tap.of(m.Continue)[0] == m.Continue(1, rid, "echo", params, 60_000.0)
    assert [message.text for message in tap.of(m.Append)] == ["de", "f", "g"]


def test_spawn(world: GatewayWorld, tap: Wiretap) -> None:
    root, other = int(shown(world, "spawn")), spawned(world)
    assert world.kernel.sequences[root].tokens == []
    kid = json_of(world, "spawn", "x", "--parent", root, "--after", root, "--after", other)
    assert kid == {"rid": other + 1}
    assert int(ctl(world, "spawn", "-", stdin="from stdin\n").stdout) == other + 2
    assert bytes(world.kernel.sequences[other + 2].tokens) == b"from stdin"
    first, _, third, _ = tap.of(m.Spawn)
    assert first == m.Spawn(1, None)
    assert third == m.Spawn(1, None, "x", parent=root, after=(root, other))


def test_generate_as_json_lines(world: GatewayWorld) -> None:
    rid = spawned(world)
    lines = shown(world, "generate", rid, "--max-tokens", 4, "--json", "--stream").splitlines()
    pieces = [json.loads(line) for line in lines]
    assert [piece["type"] for piece in pieces] == ["chunk", "chunk", "finished"]
    assert (pieces[-1]["text"], pieces[-1]["rid"], pieces[-1]["finish_reason"]) == ("abca", rid, "length")


def test_fork(world: GatewayWorld, tap: Wiretap) -> None:
    rid = spawned(world)
    assert shown(world, "fork", rid) == f"{rid + 1}\n"
    assert shown(world, "fork", rid, "-n", 3) == f"{rid + 2}\n{rid + 3}\n{rid + 4}\n"
    assert json_of(world, "fork", rid, "--count", 2) == {"rid": rid, "children": [rid + 5, rid + 6]}
    assert [message.count for message in tap.of(m.Fork)] == [1, 3, 2]
    assert shown(world, "generate", rid + 4, "--max-tokens", 2) == "ab\n"


def test_attach_as_json(world: GatewayWorld) -> None:
    rid = spawned(world)
    shown(world, "generate", rid, "--max-tokens", 5)
    found = json_of(world, "attach", rid, "--from", 2)
    assert (found["text"], found["token_ids"], found["rid"]) == ("cab", [99, 97, 98], rid)
    lines = shown(world, "attach", rid, "--json", "--stream").splitlines()
    assert json.loads(lines[0])["offset"] == 0
    assert json.loads(lines[-1])["text"] == "abcab"


def interrupted(world: GatewayWorld, rid: int, *arguments: object) -> subprocess.Popen[str]:
    """A command that shows six tokens, then waits, then gets Ctrl-C."""
    running = start(world, *arguments)
    assert running.stdout is not None
    assert running.stdout.read(6) == "abcabc"
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=DEADLINE_S)
    assert (running.returncode, errors) == (130, "\nllmosctl: interrupted\n")
    return running


def test_ctrl_c_leaves_what_is_attached_to_go_on(world: GatewayWorld) -> None:
    world.kernel.window = 6
    with Client(world.path) as client:
        seq = client.spawn("abc")
        stream = seq.generate(stream=True, max_tokens=500)
        wait_until(lambda: world.kernel.sequences[seq.rid].sent == 6)
        interrupted(world, seq.rid, "attach", seq.rid)
        wait_until(lambda: seq.stat().row.state == SeqState.BLOCKED)
        assert seq.stat().row.output_tokens == 500
        stream.close()


def test_ctrl_c_ends_an_output_but_not_its_sequence(world: GatewayWorld) -> None:
    world.kernel.window = 6
    rid = spawned(world)
    interrupted(world, rid, "generate", rid, "--max-tokens", 500)
    wait_until(lambda: not world.kernel.sequences[rid].generating)
    assert shown(world, "append", rid, "d") == f"sequence {rid}: 10 tokens\n"


def test_ctrl_c_closes_all_samples(world: GatewayWorld) -> None:
    world.kernel.paused = True
    running = start(world, "run", "--raw", "abc", "-n", 3)
    wait_until(lambda: sum(seq.generating for seq in world.kernel.sequences.values()) == 3)
    running.send_signal(signal.SIGINT)
    output, errors = running.communicate(timeout=DEADLINE_S)
    assert (running.returncode, output, errors) == (130, "", "\nllmosctl: interrupted\n")
    wait_until(lambda: not world.kernel.sequences)


def test_run_makes_samples(world: GatewayWorld, tap: Wiretap) -> None:
    result = ctl(world, "run", "--raw", "ab\n", "-n", 3, "--max-tokens", 3, "--seed", 5, "--nice", 2)
    assert (result.exit_code, result.stdout) == (0, "[1]\nab\n[2]\nab\n[3]\nab\n")
    assert result.stderr.startswith("3 answers, 9 tokens, ")
    assert [message.params.seed for message in tap.of(m.Continue)] == [5, 6, 7]
    assert tap.of(m.Spawn)[0].nice == 2
    answers = json_of(world, "run", "hi", "--samples", 2, "--max-tokens", 4, "--system", "be")
    assert [answer["text"] for answer in answers] == ["syst", "syst"]
    assert world.kernel.sequences == {}


def test_run_takes_its_place_in_a_job(world: GatewayWorld, tap: Wiretap) -> None:
    root = spawned(world)
    first = ctl(world, "run", "--raw", "abc", "--max-tokens", 4, "--parent", root, "--nice", -5, "--deadline", 60)
    assert (first.exit_code, first.stdout) == (0, "abca\n")
    done = tap.of(m.Generate)[0]
    assert (done.parent, done.after, done.nice, done.deadline_ms) == (root, (), -5, 60_000.0)
    ended = root + 1
    assert shown(world, "run", "--raw", "xy", "--max-tokens", 2, "--after", ended) == "xy\n"
    assert tap.of(m.Generate)[1].after == (ended,)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("run x -n 0", 2, "n: 0 is outside [1, 256]"),
        ("run x -n 2 --stream --json", 2, "--stream shows one answer; leave out -n"),
        ("run x --raw --system s", 2, "--system needs a chat; leave out --raw"),
        ("run x --after 0", 2, "after: 0 is not a sequence number"),
        ("run x --parent -3", 2, "parent: -3 is not a sequence number"),
        ("run x --parent 4711", 4, "no sequence 4711"),
        ("spawn x --nice 20", 2, "nice: 20 is outside"),
        ("spawn x --model nope", 4, "served are: echo"),
        ("spawn x --temperature 1", 2, "No such option"),
        ("append 101", 2, "Missing argument 'text'"),
        ("generate 101 --top-p 2", 2, "top_p: 2.0 is outside"),
        ("generate 101 --model x", 2, "No such option"),
        ("fork 101 -n 257", 2, "n: 257 is outside [1, 256]"),
        ("attach 101 --from -1", 2, "offset: -1 is outside"),
        ("attach 101", 1, "has no output yet"),
    ],
)
def test_mistakes(world: GatewayWorld, arguments: str, code: int, words: str) -> None:
    assert spawned(world) == 101
    result: Any = ctl(world, *arguments.split())
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stdout == ""


def test_empty_input_is_refused(world: GatewayWorld) -> None:
    rid = spawned(world)
    assert ctl(world, "append", rid, "").stderr == "llmosctl: text is empty\n"
    assert ctl(world, "spawn", "-", stdin="").stderr == "llmosctl: prompt is empty\n"
