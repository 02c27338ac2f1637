"""`llmosctl systemd`: llmosd as a systemd service. Arguments, help and what is done to the machine; the unit itself is in `unit.py`.

A unit file that was not written here is left alone. Nothing here talks to llmosd.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmos.config import load_config
from llmos.ctl.errors import EXIT_HELP, command
from llmos.ctl.render import printable
from llmos.ctl.unit import MARKER, UNIT_NAME, Unit
from llmos.errors import InvalidRequest, LlmosError, PermissionRefused

app = typer.Typer(help="llmosd as a systemd service.", epilog=EXIT_HELP, no_args_is_help=True)

User = Annotated[bool, typer.Option("--user", help="A service of your own user instead of the machine.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="llmosd's configuration; without it its defaults.", metavar="FILE")
]
RunAs = Annotated[
    str | None,
    typer.Option(
        "--run-as", help="The unix user that runs it; without it the owner of this installation.", metavar="USER"
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Also replace or remove a unit that was not written here.")]
_BOOTED = Path("/run/systemd/system")  # is there exactly if the machine runs systemd
_SYSTEM_UNITS = Path("/etc/systemd/system")


@app.command("print", epilog=EXIT_HELP)
@command
def print_(user: User = False, config: ConfigFile = None, run_as: RunAs = None) -> None:
    """Print the unit file. Changes nothing and needs no systemd."""
    sys.stdout.write(_unit(user, config, run_as).render())


@app.command(epilog=EXIT_HELP)
@command
def install(
    user: User = False,
    config: ConfigFile = None,
    run_as: RunAs = None,
    now: Annotated[bool, typer.Option("--now", help="Also start it, now and whenever the machine starts.")] = False,
    force: Force = False,
) -> None:
    """Write the unit file and let systemd read it."""
    text = _unit(user, config, run_as).render()
    path = _reachable(user)
    if path.exists() and not force:
        _check_ours(path, "replaced")
    _write(path, text)
    _systemctl(user, "daemon-reload")
    sys.stdout.write(f"wrote {printable(str(path))}\n")
    flag = " --user" if user else ""
    if now:
        _systemctl(user, "enable", UNIT_NAME)
        _systemctl(user, "restart", UNIT_NAME)
        sys.stdout.write(f"started; systemctl{flag} status {UNIT_NAME} shows it\n")
    else:
        sys.stdout.write(f"start it with: systemctl{flag} enable --now {UNIT_NAME}\n")


@app.command(epilog=EXIT_HELP)
@command
def uninstall(user: User = False, force: Force = False) -> None:
    """Stop the service and remove its unit file. Configuration and state stay."""
    path = _reachable(user)
    if not path.exists():
        sys.stdout.write(f"there is no {printable(str(path))}\n")
        return
    if not force:
        _check_ours(path, "removed")
    _systemctl(user, "disable", "--now", UNIT_NAME)
    path.unlink()
    _systemctl(user, "daemon-reload")
    sys.stdout.write(f"removed {printable(str(path))}\n")


def unit_path(user: bool) -> Path:
    """Where an administrator's units, or a user's own, belong."""
    if not user:
        return _SYSTEM_UNITS / UNIT_NAME
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "systemd" / "user" / UNIT_NAME


def _unit(user: bool, config: Path | None, run_as: str | None) -> Unit:
    if user and run_as is not None:
        raise InvalidRequest("--run-as is for the machine's service; with --user it is yours", field="run_as")
    llmosd = Path(sys.executable).with_name("llmosd")
    if not llmosd.exists():
        raise LlmosError(f"there is no {llmosd}; install llmos in a virtual environment")
    return Unit(load_config(config), llmosd, None if config is None else config.absolute(), user=user, run_as=run_as)


def _reachable(user: bool) -> Path:
    """The unit file's path, if systemd runs here and we may write there; else one line of why not."""
    hint = "`llmosctl systemd print` shows the unit"
    if not _BOOTED.is_dir() or shutil.which("systemctl") is None:
        raise LlmosError(f"this machine does not run systemd; {hint}")
    path = unit_path(user)
    if not user and os.geteuid() != 0:
        raise PermissionRefused(f"{path.parent} is root's; use sudo, or --user for a service of your own; {hint}")
    return path


def _check_ours(path: Path, done: str) -> None:
    """Raise unless we wrote that unit."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        text = ""
    if MARKER not in text.splitlines():
        raise LlmosError(f"{path} was not written by llmosctl; with --force it is {done}")


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    draft = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text)
        draft.chmod(0o644)
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise PermissionRefused(f"can not write {path}: {error.strerror}") from None


def _systemctl(user: bool, *arguments: str) -> None:
    words = ["systemctl", *(["--user"] if user else []), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise LlmosError(f"{' '.join(words)}: {reason}")
