"""Which processes make the daemon, and in which order.

Stages start one after another, the services of a stage in parallel. They are stopped in the reverse order. The
supervisor knows services by module name only and never imports them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from llmos.config import Config
from llmos.ports.endpoint import RunDir

_MODULES = {
    "microkernel": "llmos.microkernel.main",
    "storage": "llmos.services.storage",
    "tokenizer": "llmos.services.tokenizer",
    "executor": "llmos.services.executor",
    "gateway": "llmos.services.gateway",
    "http": "llmos.services.gateway.http",
}


# glibc may back large arrays with huge pages where the kernel's policy is "madvise" (docs/decisions.md). The executor's weights are read 4
# to 8 % faster at batch 1; the microkernel's memory is new to the processor once per 2 MiB instead of once per 4 KiB, which halves the
# cost of forking a long sequence. It is read before a process's first line of code, so it has to be set from outside.
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
_ENVIRONMENTS: dict[str, tuple[tuple[str, str], ...]] = {
    "executor": (("GLIBC_TUNABLES", _HUGE_PAGES),),
    "microkernel": (("GLIBC_TUNABLES", f"{_HUGE_PAGES}:glibc.malloc.mmap_threshold={32 << 20}"),),
}


@dataclass(frozen=True)
class ServiceSpec:
    """One child: `name` is unique, `role` is what it says in its Hello."""

    name: str
    role: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    inherits: tuple[int, ...] = ()  # descriptors that it gets, by the same numbers


Stages = tuple[tuple[ServiceSpec, ...], ...]


def make_plan(config: Config, config_file: Path | None, run_dir: RunDir, http_fd: int | None = None) -> Stages:
    """The stages for a configuration. `config_file` None = children use the built-in defaults, too. `http_fd`: the socket that HTTP is
    served on; None = it is not.
    """

    def spec(role: str, part: str | None = None) -> ServiceSpec:
        name = f"{role}.{part}" if part else role
        # -P: the working directory must not shadow installed packages (PyPI has a package named `kernels`).
        command = [sys.executable, "-P", "-m", _MODULES[role], "--run-dir", str(run_dir.path), "--name", name]
        command += ["--config", str(config_file.absolute())] if config_file else []
        command += ["--model", part] if part and role == "executor" else []
        return ServiceSpec(name, role, tuple(command), _ENVIRONMENTS.get(role, ()))

    executors = tuple(spec("executor", model.name) for model in config.models)
    doors = [spec("gateway")]
    if http_fd is not None:
        workers = config.http.workers
        doors += [
            _http_worker(spec("http", name), http_fd)
            for name in ([None] if workers == 1 else [str(number) for number in range(workers)])
        ]
    return ((spec("microkernel"),), (spec("storage"), spec("tokenizer"), *executors), tuple(doors))


def _http_worker(plain: ServiceSpec, fd: int) -> ServiceSpec:
    return replace(plain, command=(*plain.command, "--listen-fd", str(fd)), inherits=(fd,))
