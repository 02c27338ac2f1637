"""What every service process does around its work: arguments, what it must not do, configuration, logging, signals, lifeline, exit
codes.

A service's `__main__.py` is one call: `service_main("executor", run)` or `async_service_main("gateway", run)`.
`run` gets a `ServiceContext` and a connected lifeline; it calls `lifeline.ready(...)` when it can work and returns when
it is asked to stop. Exit codes: 0 stopped on request, 72 a typed error (reported as `ServiceFailed`), 1 a bug.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import logging
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmos.config import Config, ModelConfig, load_config
from llmos.errors import ConfigError, LlmosError
from llmos.guard import forbid
from llmos.log import setup_logging
from llmos.ports.endpoint import RunDir
from llmos.ports.lifeline import Lifeline

if TYPE_CHECKING:
    from llmos.ports.async_lifeline import AsyncLifeline

EXIT_FAILED = 72
HANG_VARIABLE = "LLMOS_FAKE_HANG"  # set to 1 for tests: SIGUSR1 then makes a service hang
_CONNECT_TIMEOUT_S = 10.0
_DESCRIPTORS = 65_536  # a listener that runs out of them ends its process (libzmq)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServiceContext:
    """Who this process is. `model` is set for services that serve one model, `listen_fd` for those that get their listening
    socket from llmosd."""

    config: Config
    run_dir: RunDir
    role: str
    name: str
    model: ModelConfig | None
    listen_fd: int | None = None


@dataclass(frozen=True)
class _Start:
    context: ServiceContext
    supervised: bool


def service_main(role: str, run: Callable[[ServiceContext, Lifeline], None]) -> None:
    """Run a service with a blocking loop, then exit the process."""
    start = _start(role)
    line = Lifeline(start.context.run_dir, role, start.context.name, supervised=start.supervised)
    try:
        line.connect(_CONNECT_TIMEOUT_S)
        run(start.context, line)
        code = 0
    except LlmosError as error:
        log.error("%s", error.message)
        line.failed(error)
        code = EXIT_FAILED
    except Exception as error:  # the one broad except of the process: report, then die
        log.exception("stopped by a bug")
        line.failed(_as_bug(error))
        code = 1
    line.close()
    sys.exit(code)


def async_service_main(role: str, run: Callable[[ServiceContext, AsyncLifeline], Awaitable[None]]) -> None:
    """Run a service on an event loop (uvloop where it is installed), then exit the process."""
    start = _start(role)
    try:
        from uvloop import run as run_loop
    except ImportError:
        from asyncio import run as run_loop
    sys.exit(run_loop(_run_async(start, run)))


async def _run_async(start: _Start, run: Callable[[ServiceContext, AsyncLifeline], Awaitable[None]]) -> int:
    from llmos.ports.async_lifeline import AsyncLifeline

    line = AsyncLifeline(start.context.run_dir, start.context.role, start.context.name, supervised=start.supervised)
    try:
        await line.connect(_CONNECT_TIMEOUT_S)
        await run(start.context, line)
        code = 0
    except LlmosError as error:
        log.error("%s", error.message)
        await line.failed(error)
        code = EXIT_FAILED
    except Exception as error:  # the one broad except of the process: report, then die
        log.exception("stopped by a bug")
        await line.failed(_as_bug(error))
        code = 1
    await line.close()
    return code


def _as_bug(error: Exception) -> LlmosError:
    return LlmosError(f"{type(error).__name__}: {error}")


def _start(role: str) -> _Start:
    parser = argparse.ArgumentParser(prog=f"llmos {role}", description="Started by llmosd; by hand only for tests.")
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--config", type=Path, help="configuration file; without it the built-in defaults")
    parser.add_argument("--name", default="")
    parser.add_argument("--model", help="the model this process serves")
    parser.add_argument("--listen-fd", type=int, help="the inherited socket that this process serves")
    parser.add_argument(
        "--no-supervisor", action="store_true", help="run alone: print `ready NAME` instead of reporting"
    )
    options = parser.parse_args()
    name = options.name or (f"{role}.{options.model}" if options.model else role)
    forbid(role)
    faulthandler.enable()
    setup_logging(name, "info")
    try:
        config = load_config(options.config)
        setup_logging(name, config.daemon.log_level)
        context = ServiceContext(
            config, RunDir(options.run_dir), role, name, _find_model(config, options.model), options.listen_fd
        )
        _limit(config, role)
        if os.environ.get(HANG_VARIABLE) == "1":
            signal.signal(signal.SIGUSR1, _hang)
    except ConfigError as error:
        log.error("%s", error.message)
        sys.exit(EXIT_FAILED)
    return _Start(context, supervised=not options.no_supervisor)


def _hang(*_: object) -> None:
    """For tests: stuck in C with the interpreter's lock held; only the I/O thread of ZeroMQ goes on."""
    ctypes.PyDLL(None).sleep(100_000)


def _limit(config: Config, role: str) -> None:
    """What strangers can talk to may run out of memory, but only of its own; and has room for as many connections as it may."""
    memory_mib = {
        "gateway": config.gateway.memory_mib,
        "http": config.http.memory_mib,
        "tokenizer": config.tokenizer.memory_mib,
    }.get(role, 0)
    if memory_mib:
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = memory_mib << 20
        resource.setrlimit(
            resource.RLIMIT_DATA, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most)
        )
    if role in ("gateway", "http"):
        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _DESCRIPTORS if most == resource.RLIM_INFINITY else min(_DESCRIPTORS, most)
        if now != resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, wanted), most))


def _find_model(config: Config, name: str | None) -> ModelConfig | None:
    if name is None:
        return None
    for model in config.models:
        if model.name == name:
            return model
    raise ConfigError(f"no model {name!r} in the configuration", field="models")
