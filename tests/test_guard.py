"""The audit hook, in processes of its own: it can not be taken back."""

from __future__ import annotations

import subprocess
import sys

import pytest

PLANT = """
import importlib, io, sys
pickle = importlib.import_module("pick" + "le")  # what a library does, out of sight of the static ban
"""
ATTEMPTS = {
    "unpickling a function": PLANT + "pickle.loads(b'cos\\nsystem\\n(S\"true\"\\ntR.')",
    "unpickling by the Python code": PLANT + "pickle._loads(b'cos\\nsystem\\n(S\"true\"\\ntR.')",
    "a program": "import subprocess; subprocess.run(['true'])",
    "a shell": "import subprocess; subprocess.run('true', **{'sh' + 'ell': True})",
    "os.system": "import os; getattr(os, 'sys' + 'tem')('true')",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "posix_spawn": "import os; os.posix_spawn('/bin/true', ['true'], {})",
    "fork": "import os; os.fork()",
    "the network": "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
}
HARMLESS = {
    "plain data": PLANT + "assert pickle.loads(pickle.dumps({'a': [1, 2.0, 'x', None]})) == {'a': [1, 2.0, 'x', None]}",
    "a unix socket": "import socket; a, b = socket.socketpair(); a.sendall(b'x'); assert b.recv(1) == b'x'",
    "imports": "import asyncio, json, sqlite3, msgspec, zmq, numpy, psutil",
    "who am I": "import platform; platform.processor(); platform.platform()",
}


def run(role: str, code: str) -> subprocess.CompletedProcess[str]:
    program = f"from llmos.guard import forbid\nforbid({role!r})\n{code}\nprint('done')"
    return subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_what_raises(attempt: str) -> None:
    done = run("tokenizer", ATTEMPTS[attempt])
    assert done.stdout == ""
    assert "llmos.guard.Forbidden: " in done.stderr.splitlines()[-1]
    assert "forbidden" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("code", HARMLESS)
def test_what_does_not(code: str) -> None:
    done = run("tokenizer", HARMLESS[code])
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_the_executor_may_compile_kernels_and_nothing_else() -> None:
    gcc = "import subprocess as s, contextlib\nwith contextlib.suppress(FileNotFoundError): s.run(['gcc', '--version'], stdout=-3)"
    assert run("executor", gcc).stdout == "done\n"
    assert "Forbidden" in run("microkernel", gcc).stderr
    for program in ("['true']", "['sh', '-c', 'gcc']", "['/tmp/not-gcc']"):
        assert "Forbidden" in run("executor", f"import subprocess; subprocess.run({program})").stderr


def test_every_service_sets_it() -> None:
    """Before it reads its configuration; whether it can live with it, the tests of whole daemons show."""
    arguments = "['x', '--run-dir', '/tmp/x', '--no-supervisor']"
    code = f"import sys, subprocess\nfrom llmos.services import base\nsys.argv = {arguments}\nbase._start('storage')\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code + "subprocess.run(['true'])"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "subprocess.Popen is forbidden in this process of llmos: ('true', ['true'])" in done.stderr
