"""What `from llmos import ...` offers, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import llmos

EXPORTED = [
    "AsyncClient",
    "Chunk",
    "Client",
    "Completion",
    "ConfigError",
    "ContextTooLong",
    "DaemonNotRunning",
    "InvalidRequest",
    "LlmosError",
    "ModelError",
    "NotFound",
    "Overloaded",
    "PermissionRefused",
    "ProtocolError",
    "RequestTimeout",
    "SamplingParams",
    "SequenceFailed",
    "Unavailable",
    "VersionMismatch",
    "__version__",
]


def test_exported_names_are_pinned() -> None:
    assert sorted(llmos.__all__) == EXPORTED
    assert all(getattr(llmos, name) is not None for name in EXPORTED)
    assert dir(llmos) == EXPORTED


def test_the_sdk_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import llmos; bare = time.perf_counter() - start\n"
        "from llmos import *; Client, AsyncClient\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'typer', 'tokenizers', 'uvloop', 'psutil'} & set(sys.modules)\n"
        "services = [name for name in sys.modules if name.startswith('llmos.services')]\n"
        "print(sorted(heavy), services, bare < 0.15)"
    )
    shown = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[] [] True\n"
