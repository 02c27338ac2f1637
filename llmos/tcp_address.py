"""Where a gateway listens on the network: a port for data, and the next one for control."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from llmos.errors import ConfigError


@dataclass(frozen=True)
class TcpAddress:
    """`host`: an address, or on the connecting side also a name. `port`: the one for data."""

    host: str
    port: int

    @property
    def shown(self) -> str:
        """The host as it stands in front of a port."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def url(self) -> str:
        return f"tcp://{self.shown}:{self.port}"

    @property
    def control(self) -> TcpAddress:
        return TcpAddress(self.host, self.port + 1)

    @property
    def is_any(self) -> bool:
        """Does it stand for all addresses of the machine? Not for names."""
        return ipaddress.ip_address(self.host).is_unspecified


def parse_address(text: str) -> TcpAddress | None:
    """`gateway.tcp`, taken apart; None = there is none. Raises `ConfigError`."""
    if not text:
        return None
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        version: int = ipaddress.ip_address(bare).version
    except ValueError:
        version = 0
    # Port 65535 has none after it.
    is_port = port.isascii() and port.isdigit() and 0 < int(port) < 65_535
    if not version or not is_port or (version == 6) != (bare != host):
        raise ConfigError(
            f'gateway.tcp: {text!r} is not of the form "127.0.0.1:5820" or "[::1]:5820", with a port below 65535',
            field="gateway.tcp",
        )
    return TcpAddress(bare, int(port))
