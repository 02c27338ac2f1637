"""The configuration file: defaults, every kind of mistake with its line, and the shipped commented file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llmos.config import (
    Config,
    DaemonConfig,
    ModelConfig,
    StorageConfig,
    load_config,
    model_path,
    render_config,
    state_dir,
)
from llmos.errors import ConfigError
from llmos.tcp_address import parse_address

ROOT = Path(__file__).parents[1]


def load(tmp_path, text):
    path = tmp_path / "llmosd.toml"
    path.write_text(text)
    return load_config(path)


def complaints(tmp_path, text):
    """The problems found, without the file name."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    lines = caught.value.message.splitlines()
    assert all(line.startswith(f"{tmp_path}/llmosd.toml:") for line in lines)
    return [line.removeprefix(f"{tmp_path}/llmosd.toml:") for line in lines]


def test_defaults_are_those_of_the_design():
    config = load_config(None)
    assert config == Config()
    assert config.models == (ModelConfig("demo"),)
    assert (config.daemon.start_timeout_s, config.daemon.stop_timeout_s) == (120.0, 10.0)
    assert (config.microkernel.max_rows, config.microkernel.max_step_tokens) == (256, 2048)
    assert (config.models[0].page_size, config.models[0].kv_cache_gib) == (0, 0.0)
    assert model_path(config.models[0]) == ROOT / "llmos" / "assets" / "demo-model"


def test_the_shipped_file_is_the_printed_one_and_says_the_defaults(tmp_path):
    assert (ROOT / "llmosd.toml").read_text() == render_config(), "run: llmosd --print-config > llmosd.toml"
    assert load_config(ROOT / "llmosd.toml") == Config()


def test_the_shipped_file_names_every_key_with_its_unit():
    text = render_config()
    for table in dataclasses.fields(Config):
        cls = type(getattr(Config(), table.name)) if table.name != "models" else ModelConfig
        for field in dataclasses.fields(cls):
            assert f"\n{field.name} = " in text
            assert field.metadata["doc"] in text
            if field.name.endswith("_s"):
                assert field.metadata["unit"] == "seconds"


def test_values_replace_defaults(tmp_path):
    config = load(
        tmp_path,
        "[daemon]\nstop_timeout_s = 3\n[microkernel]\nprefix_cache = false\n"
        '[[models]]\nname = "a"\npath = "/models/a"\n[[models]]\nname = "org/b:v1"\npath = "b"\nbackend = "fake"\n',
    )
    assert config.daemon == DaemonConfig(stop_timeout_s=3.0)
    assert isinstance(config.daemon.stop_timeout_s, float)
    assert config.microkernel.prefix_cache is False
    assert config.models == (
        ModelConfig("a", path="/models/a"),
        ModelConfig("org/b:v1", path=str(tmp_path / "b"), backend="fake"),
    )


def test_paths_are_relative_to_the_file(tmp_path):
    config = load(tmp_path, '[daemon]\nrun_dir = "run"\n[storage]\nstate_dir = "~/state"\n')
    assert config.daemon.run_dir == str(tmp_path / "run")
    assert config.storage.state_dir == str(Path.home() / "state")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[microkernel]\nmax_row = 1\n", "2: unknown key 'max_row' in [microkernel]; did you mean 'max_rows'?"),
        ("\n[microkernal]\nmax_rows = 1\n", "2: unknown table [microkernal]; did you mean 'microkernel'?"),
        (
            "max_rows = 1\n",
            "1: unknown table [max_rows]; valid: daemon, microkernel, tokenizer, storage, gateway, http, models",
        ),
        ("[tokenizer]\nx = 1\n", "2: unknown key 'x' in [tokenizer]; valid: memory_mib"),
        ("[microkernel]\nmax_rows = 0\n", "2: microkernel.max_rows: 0 is outside 1 to 4096"),
        ("[microkernel]\nmax_rows = 4097\n", "2: microkernel.max_rows: 4097 is outside 1 to 4096"),
        ('[microkernel]\nmax_rows = "8"\n', "2: microkernel.max_rows: needs a whole number, not '8'"),
        ("[microkernel]\nmax_rows = 8.0\n", "2: microkernel.max_rows: needs a whole number, not 8.0"),
        ("[microkernel]\nmax_rows = true\n", "2: microkernel.max_rows: needs a whole number, not True"),
        ("[microkernel]\nprefix_cache = 1\n", "2: microkernel.prefix_cache: needs true or false, not 1"),
        ("[daemon]\nstop_timeout_s = nan\n", "2: daemon.stop_timeout_s: nan is outside 0 to 3600"),
        ("[daemon]\nstop_timeout_s = inf\n", "2: daemon.stop_timeout_s: inf is outside 0 to 3600"),
        ("[daemon]\nrun_dir = 3\n", "2: daemon.run_dir: needs a string, not 3"),
        (
            '[daemon]\nlog_level = "inf"\n',
            "2: daemon.log_level: 'inf' is not one of debug, info, warning, error; did you mean 'info'?",
        ),
        ("daemon = 3\n", "1: [daemon] must be a table"),
        ("[models]\nname = 'demo'\n", "1: models must be one or more [[models]] tables, in double brackets"),
        ("models = []\n", "1: models must be one or more [[models]] tables, in double brackets"),
        ("models = [3]\n", "1: [models] must be a table"),
        ("[[models]]\npath = '/m'\n", "1: [models] needs the key 'name'"),
        ("[[models]]\nname = 'x'\n", "1: models.path: model 'x' needs a path; only 'demo' is embedded"),
        (
            "[[models]]\nname = ' x'\npath = '/m'\n",
            "2: models.name: ' x' needs 1 to 128 letters, digits or ._:/+-",
        ),
        (
            "[[models]]\nname = 'demo'\n\n[[models]]\n\nname = 'demo'\n",
            "6: models.name: 'demo' is already the name of the model at line 2",
        ),
        (
            "[[models]]\nname = 'demo'\n[[models]]\nname = 'b'\npth = '/m'\npath = '/m'\n",
            "5: unknown key 'pth' in [models]; did you mean 'path'?",
        ),
        ("daemon.log_levl = 'info'\n", "1: unknown key 'log_levl' in [daemon]; did you mean 'log_level'?"),
        (
            "# [daemon]\n'daemon' = {log_levl = 'info'}\n",
            "2: unknown key 'log_levl' in [daemon]; did you mean 'log_level'?",
        ),
        (
            '[daemon]\nrun_dir = """\n[gateway]\n"""\n[gateway]\nmax_client = 1\n',
            "6: unknown key 'max_client' in [gateway]; did you mean 'max_clients'?",
        ),
    ],
)
def test_one_mistake(tmp_path, text, expected):
    assert complaints(tmp_path, text)[0] == expected


def test_all_mistakes_are_told_at_once_in_file_order(tmp_path):
    text = "[gateway]\nmax_clients = -1\nmax_client = 1\n[daemon]\nlog_level = 3\n[[models]]\nname = 'a'\n"
    assert complaints(tmp_path, text) == [
        "2: gateway.max_clients: -1 is outside 1 to 65_536",
        "3: unknown key 'max_client' in [gateway]; did you mean 'max_clients'?",
        "5: daemon.log_level: needs a string, not 3",
        "6: models.path: model 'a' needs a path; only 'demo' is embedded",
    ]


def test_the_error_names_the_first_key(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "[gateway]\nmax_clients = -1\n")
    assert caught.value.field == "gateway.max_clients"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[daemon\n", r"not TOML: .*line 1"),
        (b"[daemon]\nrun_dir = 'a'\nrun_dir = 'b'\n", r"not TOML: .*line 3"),
        (b"[daemon]\n# \xff\n", "not UTF-8"),
    ],
)
def test_files_that_are_not_toml(tmp_path, content, expected):
    path = tmp_path / "llmosd.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        load_config(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


def test_where_state_lives(monkeypatch):
    assert state_dir(StorageConfig("/chosen")) == Path("/chosen")
    monkeypatch.setenv("LLMOS_STATE_DIR", "/from/env")
    assert state_dir(StorageConfig("/chosen")) == Path("/chosen")
    assert state_dir(StorageConfig()) == Path("/from/env")
    monkeypatch.delenv("LLMOS_STATE_DIR")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert state_dir(StorageConfig()) == Path("/var/lib/llmos")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert state_dir(StorageConfig()) == Path("/xdg/llmos")
    monkeypatch.delenv("XDG_STATE_HOME")
    assert state_dir(StorageConfig()) == Path.home() / ".local" / "state" / "llmos"


@pytest.mark.parametrize("text", ["127.0.0.1:5820", "[::1]:1", "0.0.0.0:65534"])
def test_network_addresses(tmp_path, text):
    path = tmp_path / "a.toml"
    path.write_text(f'[gateway]\ntcp = "{text}"\n')
    address = parse_address(load_config(path).gateway.tcp)
    assert address is not None
    assert f"{address.shown}:{address.port}" == text


@pytest.mark.parametrize(
    "text",
    [
        "5820",
        "localhost:5820",
        "*:5820",
        "1.2.3.4",
        "1.2.3.4:",
        "1.2.3.4:0",
        "1.2.3.4:65535",
        "::1:5",
        "[1.2.3.4]:5",
        "1.2.3.4:-5",
        "1.2.3.4:٥",
    ],
)
def test_wrong_network_addresses(tmp_path, text):
    path = tmp_path / "a.toml"
    path.write_text(f'[gateway]\ntcp = "{text}"\n')
    with pytest.raises(ConfigError, match=r"a\.toml:2: gateway\.tcp: "):
        load_config(path)
