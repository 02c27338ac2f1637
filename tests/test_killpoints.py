"""Kill points: which trap springs when, and that every named point is in the code, guarded."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmos.killpoints import ARMED, POINTS, VARIABLE, Traps

ROOT = Path(__file__).parents[1]
FOLDERS = ("llmos", "services", "kernels")


def test_nothing_is_armed_without_the_variable():
    assert ARMED is False


def test_the_nth_time_and_once():
    traps = Traps("microkernel.beat:3,executor.result.sent")
    assert [traps.springs("microkernel.beat") for _ in range(5)] == [False, False, True, False, False]
    assert traps.springs("executor.result.sent")
    assert not traps.springs("gateway.text.handled")


def test_only_with_its_file_which_then_tells_who(tmp_path: Path):
    file = tmp_path / "trap"
    traps = Traps(f"microkernel.beat:2@{file}")
    assert [traps.springs("microkernel.beat") for _ in range(3)] == [False, False, False]
    file.touch()
    assert traps.springs("microkernel.beat")
    assert [found.name for found in tmp_path.iterdir()] == [f"trap.{os.getpid()}"]
    assert not traps.springs("microkernel.beat")


def test_an_unknown_point_is_refused():
    with pytest.raises(ValueError, match="no point 'microkernel\\.lunch'"):
        Traps("microkernel.lunch")


def test_it_kills_after_a_last_act():
    code = (
        "from llmos.killpoints import reach; reach('microkernel.journal.torn', lambda: print('last words', flush=True))"
    )
    environment = os.environ | {VARIABLE: "microkernel.journal.torn"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "last words\n")


def test_every_point_is_in_the_code_once_behind_the_guard():
    found: list[str] = []
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.name != "killpoints.py"):
        tree = ast.parse(path.read_text())
        guarded = {
            id(node)
            for guard in ast.walk(tree)
            if isinstance(guard, ast.If)
            and "ARMED" in {name.id for name in ast.walk(guard.test) if isinstance(name, ast.Name)}
            for node in ast.walk(guard)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "reach":
                assert id(node) in guarded, f"{path}:{node.lineno}"
                assert isinstance(node.args[0], ast.Constant)
                found.append(node.args[0].value)
    assert sorted(found) == sorted(POINTS)
    assert len(POINTS) >= 40
