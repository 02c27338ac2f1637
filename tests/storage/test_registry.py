"""The registry: rows, states, digests of files, tenants, modes, older files, and what happens to a file that is not a registry."""

from __future__ import annotations

import logging
import sqlite3
import stat

import pytest

from llmos.errors import ConfigError
from llmos.protocol.limits import UNLIMITED
from llmos.protocol.messages import ModelRow, TenantLimitsRow
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


ALICE = TenantLimitsRow("alice", 3.0, 100, 10, 4, UNLIMITED, 250.5)
BOB = TenantLimitsRow("bob", 0.5, UNLIMITED, 0, UNLIMITED, 7, 0.0)


def test_tenants_survive_a_restart_and_the_newest_limits_count(tmp_path):
    registry = Registry(tmp_path)
    assert registry.tenants() == ()
    for limits in (BOB, TenantLimitsRow("alice", 1.0, 1, 1, 1, 1, 1.0), ALICE):
        registry.set_tenant(limits)
    registry.close()
    registry = Registry(tmp_path)
    assert registry.tenants() == (ALICE, BOB)
    assert type(registry.tenants()[0].weight) is float
    registry.close()


def by_hand(path, *statements):
    db = sqlite3.connect(path / "registry.sqlite3")
    for statement in statements:
        db.execute(*statement)
    db.commit()
    db.close()


def test_rows_that_make_no_sense_are_left_out_and_named(tmp_path, caplog):
    registry = Registry(tmp_path)
    registry.set_tenant(ALICE)
    registry.set_tenant(BOB)
    bad = {
        "negative": (-1.0, 5, 0, 5, 5, 0.0, "weight: -1.0 is outside (0, 1000]"),
        "endless": (float("inf"), 5, 0, 5, 5, 0.0, "weight: inf is outside"),
        "much": (1.0, 2**40, 0, 5, 5, 0.0, "max_pages: 1099511627776 is outside"),
        "crossed": (1.0, 5, 6, 5, 5, 0.0, "guaranteed_pages 6 is above max_pages 5"),
        "": (1.0, 5, 0, 5, 5, 0.0, "tenant: 0 characters"),
        "n" * 65: (1.0, 5, 0, 5, 5, 0.0, "tenant: 65 characters"),
    }
    insert = "INSERT INTO tenants VALUES (?, ?, ?, ?, ?, ?, ?)"
    by_hand(
        tmp_path,
        *((insert, (name, *values[:-1])) for name, values in bad.items()),
        ("INSERT INTO tenants VALUES (CAST(x'61ff62' AS TEXT), 1.0, 5, 0, 5, 5, 0.0)",),
    )
    with caplog.at_level(logging.ERROR):
        assert registry.tenants() == (ALICE, BOB)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(bad) + 1
    for name, values in bad.items():
        assert any(f"the limits of tenant {name!r} are left out: {values[-1]}" in line for line in lines), name
    assert any(r"the limits of tenant 'a\\xffb' are left out" in line for line in lines)
    registry.set_tenant(TenantLimitsRow("negative", 1.0, 5, 0, 5, 5, 0.0))
    assert [limits.tenant for limits in registry.tenants()] == ["alice", "bob", "negative"]
    registry.close()


def test_a_file_of_the_version_before_tenants_is_brought_up_to_date(tmp_path, caplog):
    registry = Registry(tmp_path)
    registry.register("m", "/m", "A", 1, "available")
    registry.set_digest("m", "d1")
    registry.close()
    by_hand(tmp_path, ("DROP TABLE tenants",), ("PRAGMA user_version = 1",))
    with caplog.at_level(logging.WARNING):
        registry = Registry(tmp_path)
    assert caplog.text == ""
    assert registry.rows() == (ModelRow("m", "/m", "d1", "A", "available", 1),)
    registry.set_tenant(ALICE)
    registry.close()
    registry = Registry(tmp_path)
    assert registry.tenants() == (ALICE,)
    assert mode(tmp_path / "registry.sqlite3") == 0o600
    registry.close()


@pytest.mark.parametrize("damage", ["text", "header", "version", "columns", "tenants"])
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
            {
                "version": "PRAGMA user_version = 99;",
                "columns": "ALTER TABLE models RENAME COLUMN bytes TO octets;",
                "tenants": "DROP TABLE tenants;",
            }[damage]
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
