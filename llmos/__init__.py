"""llmos: an operating system for language models on one box. A sequence is a process.

The public names are loaded on first use (PEP 562), so that service processes which never touch the SDK do not pay for it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Client": "llmos.client.sync",
    "AsyncClient": "llmos.client.aio",
    "SamplingParams": "llmos.protocol.params",
    "Completion": "llmos.client.types",
    "Chunk": "llmos.client.types",
    "LlmosError": "llmos.errors",
    "InvalidRequest": "llmos.errors",
    "ContextTooLong": "llmos.errors",
    "NotFound": "llmos.errors",
    "PermissionRefused": "llmos.errors",
    "Overloaded": "llmos.errors",
    "Unavailable": "llmos.errors",
    "DaemonNotRunning": "llmos.errors",
    "SequenceFailed": "llmos.errors",
    "ProtocolError": "llmos.errors",
    "VersionMismatch": "llmos.errors",
    "ConfigError": "llmos.errors",
    "ModelError": "llmos.errors",
    "RequestTimeout": "llmos.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'llmos' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
