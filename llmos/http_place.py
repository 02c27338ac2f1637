"""Where HTTP is served: the listening socket that llmosd opens before it starts anything, and the note in the run directory that tells
`llmosctl` where that is.

llmosd holds the socket, so a worker that dies leaves no closed door: connections wait for the next one. Invariants: an address that is not
this machine's own is opened only after `check_http` (supervisor/check.py); the note is 0600 and is gone when llmosd is.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from pathlib import Path

import msgspec

from llmos.errors import ConfigError, DaemonNotRunning
from llmos.ports.endpoint import default_run_dir
from llmos.tcp_address import TcpAddress

DEFAULT_PORT = 5822
NOTE = "http.json"
_BACKLOG = 1024


class HttpPlace(msgspec.Struct, frozen=True):
    """`url` without a path; `state_dir` has the admin key, `links` the one-time links."""

    url: str
    state_dir: str


def parse_http_address(text: str) -> TcpAddress:
    """`http.address`, taken apart; port 0 = any. Raises `ConfigError`."""
    host, _, port = (text or f"127.0.0.1:{DEFAULT_PORT}").rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        version: int = ipaddress.ip_address(bare).version
    except ValueError:
        version = 0
    is_port = port.isascii() and port.isdigit() and int(port) <= 65_535
    if not version or not is_port or (version == 6) != (bare != host):
        raise ConfigError(
            f'http.address: {text!r} is not of the form "127.0.0.1:{DEFAULT_PORT}" or "[::1]:{DEFAULT_PORT}"',
            field="http.address",
        )
    return TcpAddress(bare, int(port))


def is_loopback(address: TcpAddress) -> bool:
    return ipaddress.ip_address(address.host).is_loopback


def open_listener(text: str) -> socket.socket:
    """Listen on `http.address`. "" takes the usual port, or any free one if somebody has it. Raises `ConfigError`."""
    address = parse_http_address(text)
    try:
        return _listen(address.host, address.port)
    except OSError as error:
        if text or error.errno != errno.EADDRINUSE:
            raise ConfigError(
                f"http.address: can not listen on {address.shown}:{address.port}: {error.strerror}; choose another, or set "
                "http.enabled = false",
                field="http.address",
            ) from None
    return _listen(address.host, 0)


def _listen(host: str, port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if found.family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind((host, port))
        found.listen(_BACKLOG)
    except OSError:
        found.close()
        raise
    return found


def url_of(listener: socket.socket, *, tls: bool) -> str:
    """Where clients of this machine find it."""
    host, port = listener.getsockname()[:2]
    found = ipaddress.ip_address(host)
    if found.is_unspecified:
        host = "::1" if found.version == 6 else "127.0.0.1"
    return f"{'https' if tls else 'http'}://{TcpAddress(host, port).shown}:{port}"


def write_note(run_dir: Path, place: HttpPlace) -> None:
    draft = run_dir / f".{NOTE}.{os.getpid()}"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(msgspec.json.encode(place))
    draft.replace(run_dir / NOTE)


def find_run_dir(given: str | None) -> Path:
    """The run directory that is meant."""
    return Path(given).absolute() if given is not None else default_run_dir().absolute()


def read_note(run_dir: Path) -> HttpPlace:
    """Raises `DaemonNotRunning` if nobody serves HTTP there."""
    try:
        return msgspec.json.decode((run_dir / NOTE).read_bytes(), type=HttpPlace)
    except FileNotFoundError:
        text = f"no llmosd on {run_dir} serves HTTP; start it with: llmosd (http.enabled must not be false)"
        raise DaemonNotRunning(text, field="run_dir") from None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{run_dir / NOTE}: {error}", field="run_dir") from None


def remove_note(run_dir: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        (run_dir / NOTE).unlink()
