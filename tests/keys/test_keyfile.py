"""Secrets, the key file and the ring: what is kept, what is refused, and what a change does."""

from __future__ import annotations

import json
import os
import threading

import pytest
import zmq

from llmos.errors import ConfigError, InvalidRequest, NotFound
from llmos.keys.keyfile import KeyFile
from llmos.keys.ring import CHECK_EVERY_S, KeyRing
from llmos.keys.roles import Role, role_of
from llmos.keys.secret import Secret, is_public_key
from llmos.keys.server_key import make_server_key, read_server_key


def damaged(tmp_path, change):
    """A good file of one key, changed."""
    file = KeyFile(tmp_path)
    file.add("laptop", "alice", Role.SUBMIT)
    content = json.loads(file.path.read_text())
    text = change(content)
    file.path.write_bytes(text if isinstance(text, bytes) else json.dumps(content).encode())
    return file


def test_a_secret_is_a_curve_key_and_stays_out_of_repr():
    secret = Secret.make()
    assert secret.text == f"llmos_sk_{secret.id}_{secret.text[-64:]}"
    assert Secret.parse(f" {secret.text}\n") == secret
    assert secret.text[-64:] not in repr(secret)
    assert is_public_key(secret.public_key)
    assert zmq.curve_public(secret.curve_secret).decode() == secret.public_key
    assert Secret.make().text != secret.text


@pytest.mark.parametrize(
    "text",
    ["", "llmos_sk_", "llmos_sk_0123abcd_" + "0" * 63, "llmos_sk_0123abcd_" + "g" * 64, "sk-" + "0" * 64, "\ud800"],
)
def test_a_malformed_secret_is_refused_and_not_repeated(text):
    with pytest.raises(InvalidRequest) as caught:
        Secret.parse(text)
    assert caught.value.field == "key"
    assert "0000" not in caught.value.message


@pytest.mark.parametrize("text", ["", "a" * 39, "a" * 41, "#" * 40, '"' * 40, "é" * 40])
def test_public_keys_have_a_form(text):
    assert not is_public_key(text)


def test_roles_are_ordered_words():
    assert [role.word for role in sorted(Role)] == ["submit", "inspect", "admin"]
    assert role_of("inspect") is Role.INSPECT
    with pytest.raises(InvalidRequest, match="'root' is not one of submit, inspect, admin"):
        role_of("root")


def test_the_file_is_private_and_holds_no_secret(tmp_path):
    file = KeyFile(tmp_path / "state")
    key, secret = file.add("laptop", "alice", Role.ADMIN)
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert file.path.parent.stat().st_mode & 0o777 == 0o700
    text = file.path.read_text()
    assert secret.text[-64:] not in text
    assert secret.curve_secret.decode() not in text
    assert (key.id, key.name, key.tenant, key.rights, key.revoked) == (secret.id, "laptop", "alice", Role.ADMIN, None)
    assert file.read() == (key,)
    assert sorted(found.name for found in file.path.parent.iterdir()) == ["keys.json", "keys.lock"]


def test_revoke(tmp_path):
    file = KeyFile(tmp_path)
    keys = [file.add(name, "t", Role.SUBMIT)[0] for name in ("a", "b")]
    gone = file.revoke(keys[0].id)
    assert gone.revoked is not None
    assert file.read() == (gone, keys[1])
    assert file.revoke(keys[0].id) == gone
    with pytest.raises(NotFound, match="no key 'ffff'"):
        file.revoke("ffff")


@pytest.mark.parametrize(
    ("name", "tenant", "field"), [("", "t", "name"), ("a\n", "t", "name"), ("n" * 65, "t", "name"), ("a", "", "tenant")]
)
def test_refused_names_change_nothing(tmp_path, name, tenant, field):
    file = KeyFile(tmp_path)
    with pytest.raises(InvalidRequest) as caught:
        file.add(name, tenant, Role.SUBMIT)
    assert caught.value.field == field
    assert file.read() == ()


def test_writers_do_not_lose_each_others_keys(tmp_path):
    def work():
        for _ in range(5):
            KeyFile(tmp_path).add("x", "t", Role.SUBMIT)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(KeyFile(tmp_path).read()) == 20


DAMAGES = {
    "not JSON": (lambda c: b"{", "truncated"),
    "nothing": (lambda c: b"", "truncated"),
    "not UTF-8": (lambda c: b'{"format": 1, "keys": [{"id": "\xff"}]}', "UTF-8"),
    "nested": (lambda c: b"[" * 100_000, "keys.json"),
    "another format": (lambda c: c.update(format=2), "format 2"),
    "unknown field": (lambda c: c["keys"][0].update(admin=True), "unknown field `admin`"),
    "missing field": (lambda c: c["keys"][0].pop("sha256"), "missing required field `sha256`"),
    "wrong type": (lambda c: c["keys"][0].update(revoked="never"), "revoked"),
    "unknown role": (lambda c: c["keys"][0].update(role="root"), "'root' is not one of"),
    "id": (lambda c: c["keys"][0].update(id="../../etc"), "id is malformed"),
    "public key": (lambda c: c["keys"][0].update(public_key="x"), "public_key is malformed"),
    "digest": (lambda c: c["keys"][0].update(sha256=""), "sha256 is malformed"),
    "tenant": (lambda c: c["keys"][0].update(tenant=""), "tenant"),
    "twice": (lambda c: c["keys"].append(c["keys"][0]), "two keys have the same id"),
    "too large": (lambda c: b" " * (16 * 1024 * 1024 + 1), "over 16777216 bytes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_whole(tmp_path, damage):
    change, words = DAMAGES[damage]
    file = damaged(tmp_path, change)
    before = file.path.read_bytes()
    for attempt in (file.read, lambda: file.add("b", "t", Role.SUBMIT), lambda: file.revoke("00000000")):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert words in caught.value.message
        assert str(file.path) in caught.value.message
    assert file.path.read_bytes() == before


def test_a_file_that_others_can_reach_is_refused(tmp_path):
    file = KeyFile(tmp_path)
    file.add("a", "t", Role.SUBMIT)
    file.path.chmod(0o640)
    with pytest.raises(ConfigError, match="open to other users"):
        file.read()
    real = tmp_path / "real.json"
    file.path.chmod(0o600)
    file.path.rename(real)
    file.path.symlink_to(real)
    with pytest.raises(ConfigError):
        file.read()


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    file = KeyFile(tmp_path)
    key, _ = file.add("a", "t", Role.SUBMIT)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        file.revoke(key.id)
    assert file.read() == (key,)
    assert not [found for found in tmp_path.iterdir() if found.name.startswith(".")]


def test_the_ring_follows_the_file(tmp_path):
    file, ring = KeyFile(tmp_path), KeyRing(tmp_path)
    ring.load()
    assert len(ring) == 0
    key, secret = file.add("a", "alice", Role.INSPECT)
    ring.refresh(0.0, at_once=True)
    assert ring.by_id(key.id) == ring.by_public_key(key.public_key) == ring.by_secret(secret.text) == key
    version = ring.version
    ring.refresh(0.1, at_once=True)
    assert ring.version == version
    file.revoke(key.id)
    ring.refresh(0.2)
    assert len(ring) == 1, "it does not look at the file at every turn"
    ring.refresh(0.1 + CHECK_EVERY_S)
    assert (len(ring), ring.by_id(key.id), ring.by_secret(secret.text)) == (0, None, None)
    assert ring.version == version + 1


def test_what_is_not_in_a_readable_file_is_no_key(tmp_path):
    file, ring = KeyFile(tmp_path), KeyRing(tmp_path)
    file.add("a", "alice", Role.INSPECT)
    good = file.path.read_bytes()
    ring.load()
    for spoil in (lambda: file.path.write_bytes(b"{"), lambda: file.path.chmod(0o644), file.path.unlink):
        spoil()
        ring.refresh(0.0, at_once=True)
        assert len(ring) == 0
        file.path.unlink(missing_ok=True)
        file.path.touch(mode=0o600)
        file.path.write_bytes(good)
        ring.refresh(0.0, at_once=True)
        assert len(ring) == 1


def test_a_secret_is_compared_whole(tmp_path):
    file, ring = KeyFile(tmp_path), KeyRing(tmp_path)
    key, secret = file.add("a", "alice", Role.SUBMIT)
    other, other_secret = file.add("b", "bob", Role.SUBMIT)
    ring.load()
    last = "0" if secret.text[-1] != "0" else "1"
    assert ring.by_secret(secret.text[:-1] + last) is None
    assert ring.by_secret(f"llmos_sk_{key.id}_{other_secret.text[-64:]}") is None
    assert ring.by_secret("llmos_sk_00000000_" + "0" * 64) is None
    assert ring.by_secret("") is None
    assert ring.by_secret(other_secret.text) == other


def test_the_server_key_is_made_once(tmp_path):
    assert read_server_key(tmp_path) is None
    made = make_server_key(tmp_path / "state")
    assert make_server_key(tmp_path / "state") == made == read_server_key(tmp_path / "state")
    path = tmp_path / "state" / "server.key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert made.secret.decode() not in repr(made)
    path.write_text("no key\n")
    with pytest.raises(ConfigError, match="not a CURVE secret key"):
        make_server_key(tmp_path / "state")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="mode 600"):
        read_server_key(tmp_path / "state")


def test_a_key_made_by_root_belongs_to_the_daemons_user(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(tmp_path, 12345, 12345)
    KeyFile(tmp_path).add("a", "t", Role.SUBMIT)
    make_server_key(tmp_path)
    assert {found.name: found.stat().st_uid for found in tmp_path.iterdir()} == {
        "keys.json": 12345, "keys.lock": 12345, "server.key": 12345,
    }  # fmt: skip
