"""`llmosctl keys`: no daemon, only files."""

from __future__ import annotations

import json
import shlex

from typer.testing import CliRunner

from llmos.ctl.main import app
from llmos.keys.keyfile import KeyFile
from llmos.keys.secret import Secret
from llmos.keys.server_key import read_server_key


def keys(tmp_path, *arguments):
    return CliRunner().invoke(app, ["keys", *arguments, "--state-dir", str(tmp_path / "state")])


def test_add_prints_what_a_client_needs_and_nothing_else_on_stdout(tmp_path):
    config = tmp_path / "my.toml"
    config.write_text('[gateway]\ntcp = "127.0.0.1:5820"\n')
    done = keys(tmp_path, "add", "laptop", "--tenant", "alice", "--role", "inspect", "--config", str(config))
    assert done.exit_code == 0, done.stderr
    exports = dict(word.split("=", 1) for line in done.stdout.splitlines() for word in shlex.split(line)[1:])
    (key,) = KeyFile(tmp_path / "state").read()
    assert exports["LLMOS_URL"] == "tcp://127.0.0.1:5820"
    assert Secret.parse(exports["LLMOS_KEY"]).public_key == key.public_key
    assert exports["LLMOS_SERVER_KEY"] == read_server_key(tmp_path / "state").public
    assert (key.name, key.tenant, key.role) == ("laptop", "alice", "inspect")
    assert "gateway.tcp" not in done.stderr
    config.write_text('[gateway]\ntcp = "0.0.0.0:5820"\n')
    done = keys(tmp_path, "add", "desktop", "--tenant", "alice", "--config", str(config))
    assert "export LLMOS_URL=tcp://HOST:5820\n" in done.stdout
    assert "put this machine's address in the place of HOST" in done.stderr
    assert "set gateway.tcp" in keys(tmp_path, "add", "x", "--tenant", "bob").stderr


def test_list_and_revoke(tmp_path):
    made = json.loads(keys(tmp_path, "add", "laptop", "--tenant", "alice", "--json").stdout)
    assert made["role"] == "submit"
    listed = json.loads(keys(tmp_path, "list", "--json").stdout)
    assert [row["id"] for row in listed] == [made["id"]]
    assert "secret" not in listed[0]
    assert keys(tmp_path, "revoke", made["id"]).stdout == f"key {made['id']} (laptop) is revoked\n"
    assert json.loads(keys(tmp_path, "list", "--json").stdout)[0]["revoked"] is not None
    table = keys(tmp_path, "list").stdout
    assert made["id"] in table
    assert made["secret"] not in table


def test_the_server_key_stays_the_same(tmp_path):
    first = keys(tmp_path, "server").stdout
    assert first == keys(tmp_path, "server").stdout
    assert json.loads(keys(tmp_path, "server", "--json").stdout) == {"server_key": first.strip()}


def test_refusals_are_typed(tmp_path):
    assert keys(tmp_path, "revoke", "0123abcd").exit_code == 4
    assert keys(tmp_path, "add", "x", "--tenant", "t", "--role", "god").exit_code == 2
    assert keys(tmp_path, "add", "", "--tenant", "t").exit_code == 2
    (tmp_path / "state").mkdir(exist_ok=True)
    (tmp_path / "state" / "keys.json").touch(mode=0o600)
    damaged = keys(tmp_path, "list")
    assert (damaged.exit_code, damaged.stdout) == (1, "")
    assert "keys.json" in damaged.stderr
