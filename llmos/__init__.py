"""llmos: an operating system for language models on one box. A sequence is a process.

The public names are loaded on first use (PEP 562), so that service processes which never touch the SDK do not pay for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names once more, so that type checkers know what they are
    from llmos.client.aio import AsyncClient as AsyncClient
    from llmos.client.asequence import AsyncSequence as AsyncSequence
    from llmos.client.sequence import Sequence as Sequence
    from llmos.client.sync import Client as Client
    from llmos.client.types import Chunk as Chunk
    from llmos.client.types import Completion as Completion
    from llmos.client.types import Ending as Ending
    from llmos.errors import ConfigError as ConfigError
    from llmos.errors import ContextTooLong as ContextTooLong
    from llmos.errors import DaemonNotRunning as DaemonNotRunning
    from llmos.errors import InvalidRequest as InvalidRequest
    from llmos.errors import LlmosError as LlmosError
    from llmos.errors import ModelError as ModelError
    from llmos.errors import NotFound as NotFound
    from llmos.errors import Overloaded as Overloaded
    from llmos.errors import PermissionRefused as PermissionRefused
    from llmos.errors import ProtocolError as ProtocolError
    from llmos.errors import RequestTimeout as RequestTimeout
    from llmos.errors import SequenceFailed as SequenceFailed
    from llmos.errors import Unauthorized as Unauthorized
    from llmos.errors import Unavailable as Unavailable
    from llmos.errors import VersionMismatch as VersionMismatch
    from llmos.errors import WrongState as WrongState
    from llmos.protocol.params import Grammar as Grammar
    from llmos.protocol.params import SamplingParams as SamplingParams

__version__ = "0.1.0"

_PUBLIC = {
    "Client": "llmos.client.sync",
    "AsyncClient": "llmos.client.aio",
    "Sequence": "llmos.client.sequence",
    "AsyncSequence": "llmos.client.asequence",
    "Grammar": "llmos.protocol.params",
    "SamplingParams": "llmos.protocol.params",
    "Completion": "llmos.client.types",
    "Chunk": "llmos.client.types",
    "Ending": "llmos.client.types",
    "LlmosError": "llmos.errors",
    "InvalidRequest": "llmos.errors",
    "ContextTooLong": "llmos.errors",
    "NotFound": "llmos.errors",
    "PermissionRefused": "llmos.errors",
    "Overloaded": "llmos.errors",
    "Unavailable": "llmos.errors",
    "DaemonNotRunning": "llmos.errors",
    "Unauthorized": "llmos.errors",
    "WrongState": "llmos.errors",
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
