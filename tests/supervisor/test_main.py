"""llmosd's options, its refusals, and what its process does not load."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import llmos
from llmos.config import render_config
from llmos.keys.keyfile import KeyFile
from llmos.keys.roles import Role
from llmos.keys.server_key import make_server_key
from llmos.ports.endpoint import RunDir
from llmos.supervisor.lock import AlreadyRunning, RunLock
from llmos.supervisor.main import main


def make_model(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return path


def make_config(tmp_path, text):
    path = tmp_path / "llmosd.toml"
    path.write_text(text)
    return str(path)


def test_version_and_default_configuration(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"llmosd {llmos.__version__}\n"
    assert main(["--print-config"]) == 0
    assert capsys.readouterr().out == render_config()


def test_check_accepts_a_good_configuration(tmp_path, capsys):
    path = make_model(tmp_path / "mine")
    config = make_config(tmp_path, '[[models]]\nname = "mine"\npath = "mine"\n')
    assert main(["--config", config, "--check"]) == 0
    assert capsys.readouterr().out == f"{config}: valid\nmodel mine: {path}\nHTTP on 127.0.0.1:5822, for this machine\n"


def test_check_reports_every_problem_of_the_file(tmp_path, capsys):
    config = make_config(tmp_path, "[daemon]\nlog_levle = 'info'\n[gateway]\nmax_clients = 0\n")
    assert main(["--config", config, "--check"]) == 72
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"llmosd: {config}:2: unknown key 'log_levle' in [daemon]; did you mean 'log_level'?\n"
        f"llmosd: {config}:4: gateway.max_clients: 0 is outside 1 to 65_536\n"
    )


def test_a_network_port_needs_a_key(tmp_path, capsys):
    """Neither a check nor a start passes without; a wildcard address is no exception."""
    state, run_dir = tmp_path / "state", tmp_path / "run"
    config = make_config(
        tmp_path,
        f'[[models]]\nname = "demo"\nbackend = "fake"\n[gateway]\ntcp = "0.0.0.0:5820"\n[storage]\nstate_dir = "{state}"\n',
    )
    ways = (["--check"], ["--run-dir", str(run_dir)])

    def refused(words):
        for way in ways:
            assert main(["--config", config, *way]) == 72
            captured = capsys.readouterr()
            assert captured.out == ""
            assert words in captured.err
        assert not run_dir.exists()

    refused(f"llmosd: gateway.tcp is set, but {state}/keys.json has no live key; make one: llmosctl keys add")
    key, _ = KeyFile(state).add("a", "alice", Role.SUBMIT)
    refused("has no server.key; make it: llmosctl keys server")
    make_server_key(state)
    assert main(["--config", config, "--check"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "network port 0.0.0.0:5820: 1 live keys", "HTTP on 127.0.0.1:5822, for this machine",
    ]  # fmt: skip
    KeyFile(state).revoke(key.id)
    refused("has no live key")
    (state / "keys.json").write_text("{")
    refused(f"llmosd: {state}/keys.json: ")


def test_check_reports_every_bad_model_directory(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    make_model(tmp_path / "weightless").joinpath("model.safetensors").unlink()
    names = ["gone", "empty", "weightless"]
    config = make_config(tmp_path, "".join(f'[[models]]\nname = "{name}"\npath = "{name}"\n' for name in names))
    assert main(["--config", config, "--check"]) == 72
    assert capsys.readouterr().err.splitlines() == [
        f"llmosd: model gone: no directory {tmp_path}/gone",
        f"llmosd: model empty: {tmp_path}/empty has no config.json",
        f"llmosd: model weightless: {tmp_path}/weightless has no *.safetensors (other formats can carry code)",
    ]


def test_a_folder_that_is_used_for_something_else_is_not_taken_over(tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("")
    tmp_path.chmod(0o755)
    config = make_config(tmp_path, '[[models]]\nname = "demo"\nbackend = "fake"\n')
    assert main(["--config", config, "--run-dir", str(tmp_path)]) == 72
    assert "is used for something else" in capsys.readouterr().err
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert sorted(os.listdir(tmp_path)) == ["llmosd.toml", "precious.txt"]


def test_the_lock_excludes_and_is_removed(tmp_path):
    run_dir = RunDir(tmp_path)
    with RunLock(run_dir):
        assert run_dir.lock.read_text() == f"{os.getpid()}\n"
        with pytest.raises(AlreadyRunning) as refused, RunLock(run_dir):
            pass
        assert refused.value.pid == str(os.getpid())
    assert not run_dir.lock.exists()
    run_dir.lock.write_text("99999999\n")  # left by a holder that was killed
    with RunLock(run_dir):
        assert run_dir.lock.read_text() == f"{os.getpid()}\n"


HEAVY = "torch transformers tokenizers asyncio sqlite3 typer rich llmos.client"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("llmos.supervisor.main", f"{HEAVY} numpy llmos.services llmos.microkernel"),
        ("llmos.microkernel.main", f"{HEAVY} ssl"),  # its start is a pause for everybody
    ],
)
def test_who_must_start_fast_loads_nothing_heavy(module, heavy):
    code = f"import sys, {module}; print([name for name in {heavy.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
