"""The audit log: what is in it, that it stays small, and that nothing that happens to it is noticed elsewhere."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmos.codes import ErrorCode
from llmos.keys.roles import Role
from llmos.protocol import messages as m
from llmos.services.gateway import audit
from llmos.services.gateway.audit import AuditLog
from llmos.services.gateway.owners import Asker

ALICE = Asker(b"c", "alice", Role.INSPECT, "key:0123abcd")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refusal(code: ErrorCode) -> m.Error:
    return m.Error(1, int(code), "no")


def test_what_is_worth_a_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "state", clock=lambda: "T")
    log.note(ALICE, m.Kill(1, 7, "mallory"), m.Killed(1, (7,)))
    log.note(ALICE, m.PsGet(1), m.PsReply(1, ()))
    log.note(ALICE, m.PsGet(1), refusal(ErrorCode.UNAVAILABLE))
    log.note(ALICE, m.PsGet(1), refusal(ErrorCode.PERMISSION))
    log.note(ALICE, m.TenantSet(1, "bob", weight=2.0), refusal(ErrorCode.PERMISSION))
    log.note(ALICE, m.Kill(1, 8), refusal(ErrorCode.NOT_FOUND))
    log.note(ALICE, m.Stat(1, 8), m.Error(1, 99, "a code of the future"))
    log.close()
    assert (tmp_path / "state" / "audit.log").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    who = {"time": "T", "who": "key:0123abcd", "tenant": "alice"}
    assert lines(log.path) == [
        {**who, "verb": "Kill", "target": {"rid": 7}, "outcome": "ok"},
        {**who, "verb": "PsGet", "target": {}, "outcome": "permission"},
        {**who, "verb": "TenantSet", "target": {"tenant": "bob", "weight": 2.0}, "outcome": "permission"},
        {**who, "verb": "Kill", "target": {"rid": 8}, "outcome": "not_found"},
    ]


def test_what_was_refused_may_be_of_any_size_and_form(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.note(ALICE, m.RestartService(1, 'x\n"' * 1_000_000), refusal(ErrorCode.PERMISSION))
    log.note(ALICE, m.After(1, 5, tuple(range(1, 10_000))), refusal(ErrorCode.INVALID_REQUEST))
    log.close()
    first, second = lines(log.path)
    assert first["target"] == {"name": ('x\n"' * 43)[:128]}
    assert second["target"] == {"rid": 5, "after": list(range(1, 17))}


def test_it_goes_on_where_it_was_and_moves_old_files_away(tmp_path: Path) -> None:
    for turn in range(3):
        log = AuditLog(tmp_path, max_bytes=1000, clock=lambda: "T")
        for rid in range(1, 31):
            log.note(ALICE, m.Kill(1, turn * 30 + rid), m.Killed(1, ()))
        log.close()
    files = sorted(tmp_path.iterdir())
    assert [found.name for found in files] == ["audit.log", *(f"audit.log.{n}" for n in range(1, audit.KEPT + 1))]
    assert all(found.stat().st_size <= 1000 and found.stat().st_mode & 0o777 == 0o600 for found in files)
    kept = [line["target"]["rid"] for found in (*reversed(files[1:]), files[0]) for line in lines(found)]
    assert kept == [*range(90 - len(kept) + 1, 91)]


@pytest.mark.parametrize("fails", ["open", "write"])
def test_a_full_disk_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    log = AuditLog(tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, full)
        for rid in (1, 2):
            log.note(ALICE, m.Kill(1, rid), m.Killed(1, ()))
    assert log.failures == 2
    log.note(ALICE, m.Kill(1, 3), m.Killed(1, ()))
    log.close()
    assert [line["target"]["rid"] for line in lines(log.path)] == [3]


def test_a_line_that_did_not_fit_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
        log.note(ALICE, m.Kill(1, 1), m.Killed(1, ()))
    log.note(ALICE, m.Kill(1, 2), m.Killed(1, ()))
    log.close()
    torn, whole = log.path.read_text().splitlines()
    assert torn == '{"time":"2'
    assert json.loads(whole)["target"] == {"rid": 2}
    assert log.failures == 1


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "audit.log").symlink_to(victim)
    log = AuditLog(tmp_path)
    log.note(ALICE, m.Kill(1, 1), m.Killed(1, ()))
    assert (log.failures, victim.read_text()) == (1, "mine")
