"""llmosctl as its users meet it: in process with typer's runner, and as a process for exit codes and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_world import DEADLINE_S, GatewayWorld, model_info, wait_until
from typer.testing import CliRunner

from llmos.client.types import Chunk
from llmos.codes import ErrorCode
from llmos.ctl.errors import exit_code
from llmos.ctl.generate import Speed
from llmos.ctl.main import app
from llmos.errors import InvalidRequest, from_code


@pytest.fixture
def world() -> Iterator[GatewayWorld]:
    with GatewayWorld() as running:
        yield running


@pytest.fixture
def nowhere() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="llmos-no-") as path:
        yield path


def ctl(world: GatewayWorld, *arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, ["--run-dir", str(world.path), *arguments], input=stdin)


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """llmosctl as a process without a terminal."""
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-P", "-m", "llmos.ctl.main", *arguments]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment, **(pipes | options))


def test_run_answers_as_a_chat_and_reports_speed_on_stderr(world: GatewayWorld) -> None:
    result = ctl(world, "run", "hi", "--max-tokens", "8", "--system", "be")
    assert result.exit_code == 0
    assert result.stdout == "system:b\n"
    assert result.stderr.startswith("8 tokens, ")
    assert "first token after" in result.stderr
    assert "ended by: length" in result.stderr


def test_run_raw_and_stdin(world: GatewayWorld) -> None:
    assert ctl(world, "run", "--raw", "abc", "--max-tokens", "4").stdout == "abca\n"
    assert ctl(world, "run", "--raw", "-", "--max-tokens", "4", stdin="xyz\n").stdout == "xyzx\n"
    assert ctl(world, "run", "--raw", "one two", "--stop", " tw", "--stop", "zz").stdout == "one\n"
    assert ctl(world, "run", "--raw", "--system", "s", "x").exit_code == 2


def test_run_without_a_chat_template_falls_back_to_text() -> None:
    with GatewayWorld(model_info(has_chat_template=False)) as world:
        assert ctl(world, "run", "abc", "--max-tokens", "4").stdout == "abca\n"
        refused = ctl(world, "run", "abc", "--system", "be")
        assert refused.exit_code == 2
        assert refused.stderr == "llmosctl: echo has no chat template; send plain text or token ids\n"


def test_run_json(world: GatewayWorld) -> None:
    found = json.loads(ctl(world, "run", "--raw", "abc", "--max-tokens", "4", "--json").stdout)
    assert (found["text"], found["finish_reason"], found["token_ids"]) == ("abca", "length", [97, 98, 99, 97])
    assert found["usage"]["output_tokens"] == 4
    assert found["first_token_ms"] > 0
    lines = [
        json.loads(line)
        for line in ctl(world, "--json", "run", "--raw", "abc", "--max-tokens", "4", "--stream").stdout.splitlines()
    ]
    assert [line["type"] for line in lines] == ["chunk", "chunk", "finished"]
    assert "".join(line["text"] for line in lines[:-1]) == lines[-1]["text"] == "abca"


def test_sampling_options_reach_the_microkernel(world: GatewayWorld) -> None:
    options = "--max-tokens 3 -t 0 --top-k 4 --top-p 0.5 --min-p 0.1 --seed 0 --ignore-eos --presence-penalty 1 --frequency-penalty 2"
    assert ctl(world, "run", "--raw", "a", *options.split(), "--repetition-penalty", "1.5").exit_code == 0
    params = world.kernel.seen[0].params
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p, params.min_p) == (3, 0.0, 4, 0.5, 0.1)
    assert (params.seed, params.stop_token_ids, params.repetition_penalty) == (0, (), 1.5)
    assert (params.presence_penalty, params.frequency_penalty) == (1.0, 2.0)


def test_chat_remembers_and_survives_errors(world: GatewayWorld) -> None:
    result = ctl(world, "chat", "--max-tokens", "6", stdin="hi\n\n" + "x" * 600 + "\nyo\n/reset\nnew\n")
    assert result.exit_code == 0
    assert result.stdout == "user:h\nuser:h\nuser:n\n"
    encoded = [message.messages for message in world.tokenizer.seen if hasattr(message, "messages")]
    said = [[(part.role, part.content) for part in messages] for messages in encoded]
    assert said[2] == [("user", "hi"), ("assistant", "user:h"), ("user", "yo")]
    assert said[3] == [("user", "new")]
    assert "context of 512" in result.stderr


def test_ps_and_kill(world: GatewayWorld) -> None:
    world.kernel.paused = True
    running = start("run", "hi", "--run-dir", str(world.path))
    wait_until(lambda: world.kernel.sequences)
    (rid,) = world.kernel.sequences
    lines = ctl(world, "ps").stdout.splitlines()
    assert lines[0].split()[0] == "RID"
    assert lines[2].split()[0] == str(rid)
    (row,) = json.loads(ctl(world, "ps", "--json").stdout)
    assert (row["rid"], row["state"], row["model"]) == (rid, "running", "echo")
    killed = ctl(world, "kill", "99999", str(rid))
    assert killed.exit_code == 4
    assert killed.stdout == f"killed {rid}\n"
    assert killed.stderr == "llmosctl: no sequence 99999\n"
    _, errors = running.communicate(timeout=DEADLINE_S)
    assert running.returncode == 0
    assert "ended by: killed" in errors
    failed = ctl(world, "kill", "99999", "--json")
    assert json.loads(failed.stdout) == {"killed": [], "failed": [99999]}


def test_status_models_tokenize(world: GatewayWorld) -> None:
    assert "float32" in ctl(world, "status").stdout
    assert json.loads(ctl(world, "status", "--json").stdout)["lanes"][0]["model"] == "echo"
    assert "EchoForCausalLM" in ctl(world, "models").stdout
    assert json.loads(ctl(world, "models", "--json").stdout)[0]["bytes"] == 1_234_567
    assert "2 tokens, model echo" in ctl(world, "tokenize", "ab").stdout
    assert json.loads(ctl(world, "tokenize", "-", "--json", stdin="ab").stdout)["ids"] == [97, 98]


@pytest.mark.parametrize(
    "arguments", [["run", "x"], ["chat"], ["ps"], ["status"], ["models"], ["kill", "1"], ["tokenize", "x"]]
)
def test_without_a_daemon_every_command_says_how_to_start_it(nowhere: str, arguments: list[str]) -> None:
    result = CliRunner().invoke(app, [*arguments, "--run-dir", nowhere], input="hello\n")
    assert result.exit_code == 3
    assert result.stderr == f"llmosctl: llmosd is not running on {nowhere}; start it with: llmosd (or: make run)\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "x", "--top-p", "2"], 2, "top_p: 2.0 is outside"),
        (["run", "x", "-t", "nan"], 2, "temperature: nan is outside"),
        (["run", "x", "--max-tokens", "0"], 2, "max_tokens: 0 is outside"),
        (["run", "x", "--model", "nope"], 4, "served are: echo"),
        (["run", ""], 2, "prompt is empty"),
        (["run", "x" * 600], 2, "context of 512"),
        (["run", "x", "--no-such"], 2, "No such option"),
        (["kill"], 2, "llmosctl: give either sequence numbers, or one or more of --tenant, --job, --model\n"),
        (["kill", "abc"], 2, "Invalid value for 'RID'"),
        (["run", "x", "--timeout", "-1"], 2, "timeout_s"),
    ],
)
def test_mistakes(world: GatewayWorld, arguments: list[str], code: int, words: str) -> None:
    result = ctl(world, *arguments)
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (ErrorCode.SEQUENCE_FAILED, 1),
        (ErrorCode.TIMEOUT, 1),
        (ErrorCode.INTERNAL, 1),
        (ErrorCode.CONTEXT_TOO_LONG, 2),
        (ErrorCode.NOT_RUNNING, 3),
        (ErrorCode.NOT_FOUND, 4),
        (ErrorCode.OVERLOADED, 5),
        (ErrorCode.UNAVAILABLE, 5),
    ],
)
def test_exit_codes(wire: ErrorCode, code: int) -> None:
    assert exit_code(from_code(wire, "x")) == code


def test_help_documents_the_exit_codes() -> None:
    for arguments in (["--help"], ["run", "-h"], ["ps", "--help"]):
        shown = " ".join(CliRunner().invoke(app, arguments).stdout.split())
        assert "130 interrupted" in shown
        assert "3 llmosd not running" in shown
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("llmosctl 0.")


def test_speed_counts_only_tokens() -> None:
    speed = Speed(started=10.0)
    assert speed.line() == "0 tokens"
    speed.count(Chunk("held back", (), 5))
    assert speed.first_token_ms is None
    speed.count(Chunk("a", (1, 2), 0))
    speed.first, speed.last, speed.num_tokens = 10.25, 10.75, 12
    assert (speed.first_token_ms, speed.tokens_per_s) == (250.0, 20.0)
    assert speed.line() == "12 tokens, 20 tokens/s, first token after 250 ms"


def test_ctrl_c_cancels_the_sequence_and_exits_130(world: GatewayWorld) -> None:
    world.kernel.window = 6
    running = start("run", "--raw", "abcdef", "--run-dir", str(world.path), stdin=subprocess.DEVNULL)
    wait_until(lambda: any(sequence.sent == 6 for sequence in world.kernel.sequences.values()))
    assert running.stdout is not None
    assert running.stdout.read(6) == "abcdef"
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=DEADLINE_S)
    assert running.returncode == 130
    assert errors == "\nllmosctl: interrupted\n"
    wait_until(lambda: not world.kernel.sequences)


def test_invalid_utf8_is_refused_in_words(world: GatewayWorld) -> None:
    result = start("run", os.fsdecode(b"a\xffb"), "--run-dir", str(world.path))
    output, errors = result.communicate(timeout=DEADLINE_S)
    assert (result.returncode, output) == (2, "")
    assert errors == "llmosctl: prompt[0].content: not valid Unicode (lone surrogate at character 1)\n"
    piped = start("run", "-", "--run-dir", str(world.path), stdin=subprocess.PIPE)
    assert piped.stdin is not None
    piped.stdin.buffer.write(b"a\xffb")
    _, errors = piped.communicate(timeout=DEADLINE_S)
    assert (piped.returncode, errors) == (2, "llmosctl: stdin is not UTF-8 (byte 1)\n")


def test_a_reader_that_leaves_is_no_error(world: GatewayWorld) -> None:
    running = start("run", "--raw", "abc", "--max-tokens", "500", "--run-dir", str(world.path))
    assert running.stdout is not None
    running.stdout.close()
    assert running.wait(DEADLINE_S) == 0
    assert running.stderr is not None
    assert "Traceback" not in running.stderr.read()
    running.stderr.close()


def test_no_traceback_without_a_daemon(nowhere: str, tmp_path: Path) -> None:
    running = start("ps", "--run-dir", nowhere)
    output, errors = running.communicate(timeout=DEADLINE_S)
    assert (running.returncode, output) == (3, "")
    assert errors.count("\n") == 1


def test_refusals_keep_their_type() -> None:
    assert isinstance(from_code(ErrorCode.CONTEXT_TOO_LONG, "x"), InvalidRequest)
