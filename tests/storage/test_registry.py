"""The registry: rows, states, digests of files, modes, and what happens to a file that is not a registry."""

from __future__ import annotations

import logging
import sqlite3
import stat

import pytest

from llmos.errors import ConfigError
from llmos.protocol.messages import ModelRow
from llmos.services.storage.digest import FileId
from llmos.services.storage.registry import Registry


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_rows_survive_a_restart_and_come_by_name(tmp_path):
    registry = Registry(tmp_path / "state")
    registry.register("b", "/models/b", "LlamaForCausalLM", 7, "available")
    registry.register("a", "/models/a", "", 0, "failed")
    registry.set_digest("b", "d1")
    assert registry.set_state("b", "serving") is True
    registry.close()

    registry = Registry(tmp_path / "state")
    assert registry.rows() == (
        ModelRow("a", "/models/a", "", "", "failed", 0),
        ModelRow("b", "/models/b", "d1", "LlamaForCausalLM", "serving", 7),
    )
    registry.close()


def test_registering_again_keeps_the_digest_unless_path_or_size_differ(tmp_path):
    registry = Registry(tmp_path)
    registry.register("m", "/one", "A", 7, "available")
    registry.set_digest("m", "d1")
    registry.register("m", "/one", "B", 7, "available")
    assert registry.rows() == (ModelRow("m", "/one", "d1", "B", "available", 7),)
    registry.register("m", "/one", "B", 8, "available")
    assert registry.rows() == (ModelRow("m", "/one", "", "B", "available", 8),)
    registry.set_digest("m", "d2")
    registry.register("m", "/two", "B", 8, "available")
    assert registry.rows() == (ModelRow("m", "/two", "", "B", "available", 8),)
    registry.close()


def test_unknown_model_and_unknown_state(tmp_path):
    registry = Registry(tmp_path)
    assert registry.set_state("nobody", "serving") is False
    registry.register("m", "/m", "A", 1, "available")
    with pytest.raises(sqlite3.IntegrityError):
        registry.set_state("m", "asleep")
    registry.close()


def test_file_digests_are_known_by_path_size_and_time(tmp_path):
    registry = Registry(tmp_path)
    file = FileId("/m/model.safetensors", 10, 1000)
    assert registry.known_file(file) is None
    registry.learn_file(file, "d1")
    assert registry.known_file(file) == "d1"
    assert registry.known_file(FileId(file.path, 11, 1000)) is None
    assert registry.known_file(FileId(file.path, 10, 1001)) is None
    registry.learn_file(FileId(file.path, 11, 1001), "d2")
    assert registry.known_file(file) is None
    registry.close()


def test_only_the_owner_can_read_it(tmp_path):
    registry = Registry(tmp_path / "deep" / "state")
    registry.register("m", "/m", "A", 1, "available")  # makes the write-ahead log
    assert mode(tmp_path / "deep" / "state") == 0o700
    assert {found.name: mode(found) for found in (tmp_path / "deep" / "state").iterdir()} == {
        "registry.sqlite3": 0o600,
        "registry.sqlite3-wal": 0o600,
        "registry.sqlite3-shm": 0o600,
    }
    registry.close()


@pytest.mark.parametrize("damage", ["text", "header", "version", "columns"])
def test_a_file_that_is_no_registry_is_moved_aside(tmp_path, caplog, damage):
    path = tmp_path / "registry.sqlite3"
    registry = Registry(tmp_path)
    registry.register("m", "/m", "A", 1, "available")
    registry.close()
    if damage == "text":
        path.write_bytes(b"this is not a database\n" * 1000)
    elif damage == "header":
        path.write_bytes(b"\0" * 512 + path.read_bytes()[512:])
    else:
        db = sqlite3.connect(path)
        db.executescript(
            "PRAGMA user_version = 99;" if damage == "version" else "ALTER TABLE models RENAME COLUMN bytes TO octets;"
        )
        db.close()
    damaged = path.read_bytes()

    with caplog.at_level(logging.ERROR):
        registry = Registry(tmp_path)
    assert registry.rows() == ()
    registry.register("m", "/m", "A", 1, "available")
    assert len(registry.rows()) == 1
    registry.close()
    (aside,) = [found for found in tmp_path.iterdir() if ".corrupt-" in found.name]
    assert aside.read_bytes() == damaged
    assert aside.name in caplog.text


def test_a_state_dir_that_can_not_be_made_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to state_dir") as caught:
        Registry(tmp_path / "file" / "state")
    assert caught.value.field == "state_dir"
