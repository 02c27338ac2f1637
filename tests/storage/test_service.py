"""The storage service: registration at start, answers to the microkernel, and the real process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from llmos.config import Config, ModelConfig, model_path
from llmos.ports.endpoint import RunDir
from llmos.ports.memory import MemoryListener
from llmos.ports.sync import Listener
from llmos.protocol.codec import Schema
from llmos.protocol.messages import (
    FromKernel,
    ModelRow,
    ModelsGet,
    ModelsReply,
    ModelState,
    TenantLimitsRow,
    TenantsStored,
    TenantStore,
    ToKernel,
)
from llmos.services.storage.registry import Registry
from llmos.services.storage.service import Storage

DEADLINE_S = 60.0
EMBEDDED = str(model_path(ModelConfig("demo")))


def make_model(path, size=100, architecture="LlamaForCausalLM"):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (path / "model.safetensors").write_bytes(b"w" * size)
    return path


def make_storage(tmp_path, *models):
    port = MemoryListener("kernel-control", Schema(ToKernel), frozenset({"storage"}))
    dialer = port.connect(Schema(FromKernel))
    storage = Storage(Registry(tmp_path / "state"), dialer)
    storage.register_models(Config(models=models))
    dialer.greet("storage", "storage")
    (peer,) = port.core.peers.values()
    return storage, port, peer


def ask(storage, port, peer, req=1):
    port.send(peer, ModelsGet(req))
    storage.answer()
    _, reply = port.receive()
    assert isinstance(reply, ModelsReply)
    assert reply.req == req
    return {row.name: row for row in reply.models}


def test_configured_and_embedded_models_are_registered(tmp_path):
    good = make_model(tmp_path / "good")
    size = sum(found.stat().st_size for found in good.iterdir())
    storage, port, peer = make_storage(
        tmp_path, ModelConfig("good", str(good)), ModelConfig("gone", str(tmp_path / "gone"))
    )
    rows = ask(storage, port, peer, req=77)
    assert sorted(rows) == ["demo", "gone", "good"]
    assert rows["good"] == ModelRow("good", str(good), "", "LlamaForCausalLM", "available", size)
    assert rows["gone"] == ModelRow("gone", str(tmp_path / "gone"), "", "", "failed", 0)
    assert rows["demo"].path == EMBEDDED
    storage.close()


def test_a_model_may_take_the_name_of_the_embedded_one(tmp_path):
    mine = make_model(tmp_path / "mine")
    storage, port, peer = make_storage(tmp_path, ModelConfig("demo", str(mine)))
    assert {name: row.path for name, row in ask(storage, port, peer).items()} == {"demo": str(mine)}
    storage.close()


def test_states_follow_the_microkernel(tmp_path):
    good = make_model(tmp_path / "good")
    storage, port, peer = make_storage(tmp_path, ModelConfig("good", str(good)))
    for state in ("serving", "failed", "available"):
        port.send(peer, ModelState("good", state))
        assert ask(storage, port, peer)["good"].state == state
    before = ask(storage, port, peer)
    port.send(peer, ModelState("nobody", "serving"))
    port.send(peer, ModelState("good", "asleep"))
    assert ask(storage, port, peer) == before
    storage.close()


def test_serving_is_forgotten_at_a_restart_and_models_of_old_configurations_are_kept(tmp_path):
    good = make_model(tmp_path / "good")
    storage, port, peer = make_storage(tmp_path, ModelConfig("good", str(good)))
    port.send(peer, ModelState("good", "serving"))
    storage.answer()
    storage.close()
    storage, port, peer = make_storage(tmp_path)
    rows = ask(storage, port, peer)
    assert sorted(rows) == ["demo", "good"]
    assert rows["good"].state == "available"
    storage.close()


def test_digests_appear_while_questions_are_answered(tmp_path):
    good = make_model(tmp_path / "good", size=30_000_000)
    storage, port, peer = make_storage(tmp_path, ModelConfig("good", str(good)))
    answers = 0
    while storage.has_work:
        storage.work(0.001)
        ask(storage, port, peer)
        answers += 1
    assert len(ask(storage, port, peer)["good"].digest) == 64
    assert answers >= 3
    storage.close()


def stored(storage, port):
    storage.send_tenants()
    _, message = port.receive()
    assert isinstance(message, TenantsStored)
    return message.tenants


def test_tenants_limits_are_kept_and_told_in_the_next_life(tmp_path):
    storage, port, peer = make_storage(tmp_path)
    assert stored(storage, port) == ()  # told even if there is nothing to tell
    limits = TenantLimitsRow("alice", 2.0, 10, 5, 3, 4, 100.0)
    for weight in (1.0, 2.0):
        port.send(peer, TenantStore(TenantLimitsRow("alice", weight, 10, 5, 3, 4, 100.0)))
    storage.answer()
    storage.close()
    storage, port, peer = make_storage(tmp_path)
    assert stored(storage, port) == (limits,)
    storage.close()


@pytest.fixture
def short_dir():
    """A unix socket's path must be short; pytest's own folders are not."""
    with tempfile.TemporaryDirectory(prefix="llmos-") as path:
        yield Path(path)


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if (found := condition()) is not None:
            return found
        time.sleep(0.005)
    raise AssertionError("nothing came in time")


@pytest.mark.slow
def test_the_process_answers_on_the_control_port_and_stops(tmp_path, short_dir):
    good = make_model(tmp_path / "good")
    config = tmp_path / "llmosd.toml"
    config.write_text(f'[storage]\nstate_dir = "state"\n[[models]]\nname = "good"\npath = "{good}"\n')
    run_dir = RunDir(short_dir)
    run_dir.create()
    port = Listener(run_dir, "kernel-control", Schema(ToKernel), frozenset({"storage"}))
    command = [
        sys.executable,
        "-P",
        "-m",
        "llmos.services.storage",
        "--run-dir",
        str(run_dir.path),
        "--config",
        str(config),
    ]
    with subprocess.Popen([*command, "--no-supervisor"], stdout=subprocess.PIPE, text=True) as process:
        try:
            peer, first = wait_for(port.receive)
            assert first == TenantsStored(())
            assert process.stdout.readline() == "ready storage\n"
            port.send(peer, TenantStore(TenantLimitsRow("alice", 2.0, 10, 5, 3, 4, 100.0)))

            def with_digest():
                port.send(peer, ModelsGet(5))
                _, reply = wait_for(port.receive)
                row = next(row for row in reply.models if row.name == "good")
                return row if row.digest else None

            assert wait_for(with_digest).state == "available"
            assert peer.pid == process.pid
            process.terminate()
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
    port.close()
    registry = Registry(tmp_path / "state")
    assert [limits.tenant for limits in registry.tenants()] == ["alice"]
    registry.close()


@pytest.mark.slow
def test_the_process_says_why_it_can_not_start(tmp_path):
    (tmp_path / "file").write_text("")
    config = tmp_path / "llmosd.toml"
    config.write_text('[storage]\nstate_dir = "file/state"\n')
    command = [
        sys.executable,
        "-P",
        "-m",
        "llmos.services.storage",
        "--run-dir",
        str(tmp_path),
        "--config",
        str(config),
    ]
    done = subprocess.run(
        [*command, "--no-supervisor"], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 72
    assert "cannot write to state_dir" in done.stderr
    assert "Traceback" not in done.stderr
