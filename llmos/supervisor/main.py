"""llmosd: the daemon. Parses options, holds the lock, runs the supervisor; a failure is one line and an exit code.

Exit codes: 0 stopped on request or check passed, 1 a service could not start or a bug, 2 wrong options, 72
configuration or model at fault, 73 another llmosd holds the run directory.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import llmos
from llmos.config import Config, load_config, render_config
from llmos.errors import ConfigError, LlmosError
from llmos.log import setup_logging
from llmos.ports.endpoint import RunDir, default_run_dir
from llmos.supervisor.check import check_door, check_http, check_models
from llmos.supervisor.http_door import HttpDoor
from llmos.supervisor.lock import AlreadyRunning, RunLock
from llmos.supervisor.notify import Notifier
from llmos.supervisor.plan import make_plan
from llmos.supervisor.signals import StopSignals
from llmos.supervisor.supervisor import EXIT_CONFIG, StartFailed, StopRequested, Supervisor

EXIT_BUG = 1
EXIT_LOCKED = 73
log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    options = _parse(arguments)
    try:
        if options.print_config:
            _say(render_config().rstrip())
            return 0
        config = load_config(options.config)
        found = [*check_models(config), *check_door(config), *check_http(config)]
        if options.check:
            _say("\n".join([f"{options.config or 'built-in defaults'}: valid", *found]))
            return 0
        setup_logging("llmosd", config.daemon.log_level)
        run_dir = RunDir(options.run_dir or config.daemon.run_dir or default_run_dir())
        return run_daemon(config, options.config, run_dir)
    except LlmosError as error:
        _complain(error.message)
        return EXIT_CONFIG
    except AlreadyRunning as error:
        _complain(str(error))
        return EXIT_LOCKED
    except Exception:
        log.exception("llmosd stopped by a bug")
        return EXIT_BUG


def run_daemon(config: Config, config_file: Path | None, run_dir: RunDir) -> int:
    """Serve until a stop signal; whatever happens, no child, socket or lock is left."""
    started = time.monotonic()
    exit_code, last_word = 0, "stopped"
    with StopSignals() as signals, contextlib.closing(Notifier(os.environ)) as notifier:
        _check_usable(run_dir)
        run_dir.create()
        with RunLock(run_dir), HttpDoor(config, run_dir) as door:
            run_dir.remove_sockets()
            stages = make_plan(config, config_file, run_dir, door.fd)
            supervisor = Supervisor(stages, run_dir, config.daemon, signals, notifier)
            try:
                supervisor.start()
                _say(_serving_line(config, run_dir, door.url, time.monotonic() - started))
                supervisor.serve()
                log.info("asked to stop; a second signal does not wait for what runs, a further one kills at once")
                supervisor.drain()
                log.info("stopping")
            except StopRequested:
                log.info("asked to stop before it served")
            except StartFailed as error:
                exit_code, last_word = error.exit_code, str(error)
                _complain(last_word)
            finally:
                supervisor.stop()
                run_dir.remove_sockets()
        notifier.status(last_word)
    return exit_code


def _check_usable(run_dir: RunDir) -> None:
    """Refuse a folder that is used for something else: making it private would break that (think of /tmp)."""
    with contextlib.suppress(FileNotFoundError):
        if run_dir.path.stat().st_mode & 0o777 == 0o700:
            return
        foreign = [found.name for found in run_dir.path.iterdir() if found != run_dir.lock and found.suffix != ".sock"]
        if foreign:
            raise ConfigError(
                f"run_dir {run_dir.path} is used for something else: it holds {foreign[0]}", field="run_dir"
            )


def _serving_line(config: Config, run_dir: RunDir, url: str, seconds: float) -> str:
    models = ", ".join(model.name for model in config.models)
    pid = run_dir.lock.read_text().strip()
    network = f" and tcp://{config.gateway.tcp}" if config.gateway.tcp else ""
    web = f" and {url}" if url else ""
    here = "" if run_dir.path == default_run_dir().absolute() else f"LLMOS_RUN_DIR={shlex.quote(str(run_dir.path))} "
    return (
        f"llmos is serving {models} on {run_dir.socket('client')}{network}{web} (pid {pid}, {seconds:.1f} s); "
        f'try: {here}llmosctl run "What is the capital of France?"'
    )


def _say(text: str) -> None:
    """To stdout, for people and scripts. A reader that left is no reason to stop."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _complain(text: str) -> None:
    for line in text.splitlines():
        sys.stderr.write(f"llmosd: {line}\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="llmosd", description="The llmos daemon: serves language models on this box.")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration; without it the embedded model is served"
    )
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="folder of sockets and lock, instead of daemon.run_dir"
    )
    parser.add_argument("--check", action="store_true", help="check configuration and model directories, then exit")
    parser.add_argument(
        "--print-config", action="store_true", help="print the commented default configuration, then exit"
    )
    parser.add_argument("--version", action="version", version=f"llmosd {llmos.__version__}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
