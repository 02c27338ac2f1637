"""What this process listens on, asked of the operating system: it has to be what was configured, and nothing else.

A library that opens a port of its own (or one of ours that binds wider than it was told) is found here, before the first client is served.
"""

from __future__ import annotations

from collections.abc import Collection

import psutil

from llmos.errors import ConfigError
from llmos.tcp_address import TcpAddress


def listening() -> set[str]:
    """Paths of unix sockets, and URLs of network ports; a UDP socket counts as listening."""
    process = psutil.Process()
    found = {str(unix.laddr) for unix in process.net_connections("unix") if unix.laddr}
    for inet in process.net_connections("inet"):
        if inet.type != 1:
            found.add(f"udp://{inet.laddr.ip}:{inet.laddr.port}" if inet.laddr else "udp://")
        elif inet.status == psutil.CONN_LISTEN:
            found.add(TcpAddress(inet.laddr.ip, inet.laddr.port).url)
    return found


def check_listening(configured: Collection[str]) -> None:
    """Raise `ConfigError` if it is another list."""
    found = listening()
    if found != set(configured):
        raise ConfigError(f"the gateway listens on {sorted(found)}, configured is {sorted(configured)}")
