"""What `from llmos import ...` offers, and what it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import llmos

EXPORTED = [
    "AsyncClient",
    "AsyncSequence",
    "Chunk",
    "Client",
    "Completion",
    "ConfigError",
    "ContextTooLong",
    "DaemonNotRunning",
    "Ending",
    "Grammar",
    "InvalidRequest",
    "LlmosError",
    "ModelError",
    "NotFound",
    "Overloaded",
    "PermissionRefused",
    "ProtocolError",
    "RequestTimeout",
    "SamplingParams",
    "Sequence",
    "SequenceFailed",
    "Unauthorized",
    "Unavailable",
    "VersionMismatch",
    "WrongState",
    "__version__",
]


def test_exported_names_are_pinned() -> None:
    assert sorted(llmos.__all__) == EXPORTED
    assert all(getattr(llmos, name) is not None for name in EXPORTED)
    assert dir(llmos) == EXPORTED


def test_type_checkers_know_every_name() -> None:
    tree = ast.parse(Path(llmos.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    shown = {f"{node.module}.{node.names[0].name}" for node in block.body if isinstance(node, ast.ImportFrom)}
    assert shown == {f"{module}.{name}" for name, module in llmos._PUBLIC.items()}


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
