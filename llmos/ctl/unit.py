"""The systemd unit of llmosd, as text. Pure, but for the owner of the installation.

The sandbox leaves out what Triton and CUDA can not live with: memory that is written and executed (MemoryDenyWriteExecute), and, in a
user's own service, everything that needs a mount namespace, which a user's manager can not always make.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llmos.config import Config
from llmos.errors import InvalidRequest

UNIT_NAME = "llmosd.service"
MARKER = "# Written by llmosctl systemd install, which replaces it."
_STAGES = 3  # in which the supervisor starts and stops its processes; the time limits hold for each
_SLACK_S = 5
_UNQUOTED = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
_HIDDEN = (Path("/tmp"), Path("/var/tmp"))  # by PrivateTmp
_NVIDIA = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset")

# What a filter of system calls and the process's own flags can do: needs no privilege, so it also works for a user's service.
_HARDENING_ANYWHERE = (
    "NoNewPrivileges=yes",
    "LockPersonality=yes",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallErrorNumber=EPERM",
)
_HARDENING_SYSTEM = (
    "CapabilityBoundingSet=",
    "AmbientCapabilities=",
    "ProtectSystem=strict",
    "# Read-only, not hidden: models may lie there.",
    "ProtectHome=read-only",
    "PrivateTmp=yes",
    "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes",
    "ProtectClock=yes",
    "ProtectHostname=yes",
    "ProtectProc=invisible",
    "RemoveIPC=yes",
    "KeyringMode=private",
)


@dataclass(frozen=True)
class Unit:
    """`llmosd`: the program. `config_file`: absolute, None = the program's defaults. `run_as`: None = who owns the program."""

    config: Config
    llmosd: Path
    config_file: Path | None
    user: bool
    run_as: str | None = None

    def render(self) -> str:
        """The whole file; raises `InvalidRequest` for what can not work there."""
        if set(str(self.llmosd)) & set("\\\"'"):
            raise InvalidRequest(f"{self.llmosd}: systemd runs no program with quotes or backslashes in its path")
        if not self.user:
            self._check_visible()
        sections = {"Unit": self._unit(), "Service": self._service(), "Install": self._install()}
        return (
            "\n".join([MARKER, *(line for name, lines in sections.items() for line in ("", f"[{name}]", *lines))])
            + "\n"
        )

    def _check_visible(self) -> None:
        paths = [self.llmosd, self.config_file, *(Path(model.path) for model in self.config.models if model.path)]
        for path in paths:
            if path is not None and any(path.is_relative_to(hidden) for hidden in _HIDDEN):
                raise InvalidRequest(f"{path}: the service has a /tmp of its own and can not see this", field="config")

    def _unit(self) -> list[str]:
        lines = [
            "Description=llmos, an operating system for language models",
            "# A failed start is tried again for ever, ever more slowly: see Restart below.",
            "StartLimitIntervalSec=0",
        ]
        if not self.user:
            lines += ["Wants=nvidia-persistenced.service", "After=nvidia-persistenced.service"]
        return lines

    def _install(self) -> list[str]:
        return [f"WantedBy={'default.target' if self.user else 'multi-user.target'}"]

    def _service(self) -> list[str]:
        daemon = self.config.daemon
        program = [str(self.llmosd), "--run-dir", "%t/llmosd"]
        words = [quote(program[0]), program[1], program[2]]  # %t is systemd's to fill in
        if self.config_file is not None:
            words += ["--config", quote(str(self.config_file))]
        start_s = _STAGES * daemon.start_timeout_s + _SLACK_S
        stop_s = daemon.drain_s + _STAGES * (daemon.stop_timeout_s + 1) + _SLACK_S
        lines = [
            "Type=notify",
            "NotifyAccess=main",
            "# The colon: a $ in a path is a $.",
            f"ExecStart=:{' '.join(words)}",
            *([] if self.user else [f"User={self.run_as or self.llmosd.owner()}"]),
            f"TimeoutStartSec={start_s:g}",
            "# daemon.drain_s, and daemon.stop_timeout_s for each stage of processes.",
            f"TimeoutStopSec={stop_s:g}",
            "WatchdogSec=10",
            "Restart=always",
            "RestartSec=0.2",
            "# Up to 30 s between restarts where systemd is 254 or newer; older ones say that they ignore these two.",
            "RestartSteps=6",
            "RestartMaxDelaySec=30",
            "# 72: the configuration or a model is at fault, 73: another llmosd runs there. Neither gets better by itself.",
            "RestartPreventExitStatus=72 73",
            "KillMode=mixed",
            "OOMPolicy=continue",
            "LimitNOFILE=65536",
            "UMask=0077",
            "RuntimeDirectory=llmosd",
            "RuntimeDirectoryMode=0700",
            "RuntimeDirectoryPreserve=restart",
            "StateDirectory=llmos",
            "StateDirectoryMode=0700",
            "CacheDirectory=llmos",
            "CacheDirectoryMode=0700",
            "Environment=LLMOS_STATE_DIR=%S/llmos XDG_CACHE_HOME=%C/llmos TRITON_CACHE_DIR=%C/llmos/triton",
            "",
            *_HARDENING_ANYWHERE,
            *self._address_families(),
        ]
        return lines if self.user else [*lines, *_HARDENING_SYSTEM, *self._devices(), *self._writable()]

    def _address_families(self) -> list[str]:
        inet = " AF_INET AF_INET6" if self.config.gateway.tcp or self.config.http.enabled else ""
        return [
            "# Unix sockets, the network for HTTP and gateway.tcp; CUDA's libraries ask the kernel for devices over netlink.",
            f"RestrictAddressFamilies=AF_UNIX AF_NETLINK{inet}",
        ]

    def _devices(self) -> list[str]:
        return [
            "# GPUs. Their kernel modules must be loaded before: nvidia-persistenced sees to it.",
            "DevicePolicy=closed",
            "DeviceAllow=char-nvidia* rw",
            *(f"DeviceAllow=/dev/{name} rw" for name in _NVIDIA),
        ]

    def _writable(self) -> list[str]:
        state_dir = self.config.storage.state_dir
        return [f"ReadWritePaths=-{quote(state_dir)}"] if state_dir else []


def quote(path: str) -> str:
    """A path as one word of a unit file."""
    if not path.isprintable():
        raise InvalidRequest(f"{path!r} has characters that a unit file can not hold", field="config")
    text = path.replace("%", "%%")
    if _UNQUOTED.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
