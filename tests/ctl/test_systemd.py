"""The unit file: what is in it, that systemd understands it, and when it is written or refused."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess

import pytest
from typer.testing import CliRunner

from llmos.config import Config, DaemonConfig, GatewayConfig, HttpConfig, ModelConfig, StorageConfig
from llmos.ctl import systemd
from llmos.ctl.unit import MARKER, Unit, quote
from llmos.errors import InvalidRequest

NEW_IN_254 = ("RestartSteps", "RestartMaxDelaySec")


@pytest.fixture
def llmosd(tmp_path_factory):
    """A path that is there and not below /tmp, which the service can not see."""
    return systemd.Path("/usr/bin/true").resolve()


def make_unit(llmosd, config=None, *, config_file=None, user=False, run_as="llmos"):
    return Unit(config or Config(), llmosd, config_file, user=user, run_as=None if user else run_as)


def parse(text):
    """{section: {key: [values in order]}}; asserts the syntax."""
    sections = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            assert line.endswith("]")
            current = sections.setdefault(line[1:-1], {})
        else:
            key, equals, value = line.partition("=")
            assert equals, line
            assert key.isalnum(), line
            assert value == value.strip(), line
            current.setdefault(key, []).append(value)
    return sections


def test_the_service_of_the_machine(llmosd):
    sections = parse(make_unit(llmosd, config_file=systemd.Path("/etc/llmos/llmosd.toml")).render())
    assert list(sections) == ["Unit", "Service", "Install"]
    service = {key: values[0] for key, values in sections["Service"].items()}
    promised = {
        "Type": "notify",
        "NotifyAccess": "main",
        "ExecStart": f":{llmosd} --run-dir %t/llmosd --config /etc/llmos/llmosd.toml",
        "User": "llmos",
        "WatchdogSec": "10",
        "Restart": "always",
        "RestartSec": "0.2",
        "RestartSteps": "6",
        "RestartMaxDelaySec": "30",
        "RestartPreventExitStatus": "72 73",
        "KillMode": "mixed",
        "OOMPolicy": "continue",
        "LimitNOFILE": "65536",
        "UMask": "0077",
        "RuntimeDirectory": "llmosd",
        "RuntimeDirectoryMode": "0700",
        "StateDirectory": "llmos",
        "StateDirectoryMode": "0700",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "ProtectSystem": "strict",
        "ProtectHome": "read-only",
        "PrivateTmp": "yes",
        "RestrictAddressFamilies": "AF_UNIX AF_NETLINK AF_INET AF_INET6",
        "SystemCallFilter": "@system-service",
        "DevicePolicy": "closed",
    }
    assert {key: service.get(key) for key in promised} == promised
    assert sections["Unit"]["StartLimitIntervalSec"] == ["0"]
    assert sections["Install"]["WantedBy"] == ["multi-user.target"]
    assert "MemoryDenyWriteExecute" not in service
    assert all(value.startswith(("char-nvidia", "/dev/nvidia")) for value in sections["Service"]["DeviceAllow"])


def test_time_limits_follow_the_configuration(llmosd):
    daemon = DaemonConfig(start_timeout_s=100.0, stop_timeout_s=2.0, drain_s=30.0)
    service = parse(make_unit(llmosd, Config(daemon=daemon)).render())["Service"]
    assert service["TimeoutStartSec"] == ["305"]
    assert service["TimeoutStopSec"] == ["44"]  # 30 to drain, three stages of 2 + 1, and 5


def test_a_state_directory_of_the_configuration_can_be_written(llmosd):
    config = Config(storage=StorageConfig("/srv/my state"))
    assert parse(make_unit(llmosd, config).render())["Service"]["ReadWritePaths"] == ['-"/srv/my state"']
    assert "ReadWritePaths" not in parse(make_unit(llmosd).render())["Service"]


def test_a_users_service_needs_no_namespaces(llmosd):
    sections = parse(make_unit(llmosd, user=True).render())
    needs_namespaces = {"ProtectSystem", "ProtectHome", "PrivateTmp", "User", "CapabilityBoundingSet", "DevicePolicy"}
    assert needs_namespaces.isdisjoint(sections["Service"])
    assert sections["Service"]["NoNewPrivileges"] == ["yes"]
    assert sections["Install"]["WantedBy"] == ["default.target"]


def test_without_run_as_it_is_the_owner_of_the_program(llmosd):
    assert parse(make_unit(llmosd, run_as=None).render())["Service"]["User"] == [llmosd.owner()]


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/opt/llmos/bin/llmosd", "/opt/llmos/bin/llmosd"),
        ("/home/an na/llmosd", '"/home/an na/llmosd"'),
        ("/opt/100%/llmosd", '"/opt/100%%/llmosd"'),
        ('/opt/a"b\\c', '"/opt/a\\"b\\\\c"'),
        ("/opt/$HOME", '"/opt/$HOME"'),
    ],
)
def test_paths_are_quoted(path, word):
    assert quote(path) == word


def test_what_can_not_work_is_refused(llmosd, tmp_path):
    with pytest.raises(InvalidRequest, match="characters"):
        quote("/opt/a\nExecStartPre=/bin/evil")
    with pytest.raises(InvalidRequest, match="quotes"):
        make_unit(systemd.Path('/opt/"/llmosd')).render()
    hidden = [
        make_unit(systemd.Path("/tmp/venv/bin/llmosd")),
        make_unit(llmosd, config_file=systemd.Path("/tmp/llmosd.toml")),
        make_unit(llmosd, Config(models=(ModelConfig("big", "/var/tmp/big"),))),
    ]
    for unit in hidden:
        with pytest.raises(InvalidRequest, match="/tmp of its own"):
            unit.render()
        dataclasses.replace(unit, user=True).render()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
@pytest.mark.parametrize("user", [False, True])
def test_systemd_understands_it(llmosd, tmp_path, user):
    path = tmp_path / "llmosd.service"
    path.write_text(make_unit(llmosd, user=user, run_as="root").render())
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)}
    words = ["systemd-analyze", "verify", *(["--user"] if user else []), str(path)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60, check=False)
    complaints = [line for line in done.stderr.splitlines() if not any(name in line for name in NEW_IN_254)]
    assert (done.returncode, complaints) == (0, [])


class Machine:
    """Where units are written, and what systemctl was asked."""

    def __init__(self, tmp_path, monkeypatch, llmosd):
        self.unit = tmp_path / "system" / "llmosd.service"
        self.asked = []
        (tmp_path / "booted").mkdir()
        monkeypatch.setattr(systemd, "_BOOTED", tmp_path / "booted")
        monkeypatch.setattr(systemd, "_SYSTEM_UNITS", self.unit.parent)
        monkeypatch.setattr(systemd, "_systemctl", lambda user, *words: self.asked.append(words))
        monkeypatch.setattr(systemd.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(systemd.os, "geteuid", lambda: 0)
        monkeypatch.setattr(systemd, "_unit", lambda *arguments: make_unit(llmosd))

    def run(self, *words):
        return CliRunner().invoke(systemd.app, words)


@pytest.fixture
def machine(tmp_path, monkeypatch, llmosd):
    return Machine(tmp_path, monkeypatch, llmosd)


def test_install_and_uninstall(machine):
    done = machine.run("install")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"wrote {machine.unit}\nstart it with: systemctl enable --now llmosd.service\n"
    assert machine.unit.read_text().splitlines()[0] == MARKER
    assert machine.unit.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in machine.unit.parent.iterdir()] == ["llmosd.service"]
    assert machine.run("install", "--now").exit_code == 0  # over our own
    assert machine.asked == [
        ("daemon-reload",),
        ("daemon-reload",),
        ("enable", "llmosd.service"),
        ("restart", "llmosd.service"),
    ]
    machine.asked.clear()
    assert machine.run("uninstall").exit_code == 0
    assert not machine.unit.exists()
    assert machine.asked == [("disable", "--now", "llmosd.service"), ("daemon-reload",)]
    assert machine.run("uninstall").stdout == f"there is no {machine.unit}\n"


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_somebody_elses_unit_is_left_alone(machine, command):
    machine.unit.parent.mkdir()
    machine.unit.write_text("[Service]\nExecStart=/usr/bin/mine\n")
    done = machine.run(command)
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "was not written by llmosctl" in done.stderr
    assert machine.unit.read_text() == "[Service]\nExecStart=/usr/bin/mine\n"
    assert machine.asked == []
    assert machine.run(command, "--force").exit_code == 0
    assert not machine.unit.exists() or machine.unit.read_text().startswith(MARKER)


@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_without_systemd_or_rights_it_is_one_line(machine, command, monkeypatch, tmp_path):
    monkeypatch.setattr(systemd.os, "geteuid", lambda: 1000)
    done = machine.run(command)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "use sudo, or --user" in done.stderr
    monkeypatch.setattr(systemd, "_BOOTED", tmp_path / "nothing")
    done = machine.run(command)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "does not run systemd" in done.stderr
    assert not machine.unit.exists()


def test_print_finds_the_program_beside_python():
    done = CliRunner().invoke(systemd.app, ["print", "--user"])
    assert done.exit_code == 0, done.output
    program = systemd.Path(systemd.sys.executable).with_name("llmosd")
    assert parse(done.stdout)["Service"]["ExecStart"] == [f":{quote(str(program))} --run-dir %t/llmosd"]


def test_a_bad_configuration_is_found_before_anything_is_written(tmp_path):
    path = tmp_path / "llmosd.toml"
    path.write_text("[daemon]\ndrain_s = -1\n")
    done = CliRunner().invoke(systemd.app, ["print", "--config", str(path)])
    assert done.exit_code == 1
    assert "daemon.drain_s" in done.stderr


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize(
    ("tcp", "http", "families"),
    [
        ("", False, "AF_UNIX AF_NETLINK"),
        ("", True, "AF_UNIX AF_NETLINK AF_INET AF_INET6"),
        ("[::]:5820", False, "AF_UNIX AF_NETLINK AF_INET AF_INET6"),
    ],
)
def test_the_network_is_there_only_if_it_is_configured(llmosd, user, tcp, http, families):
    config = dataclasses.replace(Config(), gateway=GatewayConfig(tcp=tcp), http=HttpConfig(enabled=http))
    assert parse(make_unit(llmosd, config, user=user).render())["Service"]["RestrictAddressFamilies"] == [families]
