"""Import directions between the packages: the table below is checked against every module's source and against live processes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TREES = {"llmos": ROOT / "llmos", "llmos.services": ROOT / "services", "llmos.kernels": ROOT / "kernels"}
HEAVY = {"torch", "triton", "transformers", "tokenizers", "safetensors", "numpy"}
STDLIB = set(sys.stdlib_module_names)
PROTOCOL = {"llmos.protocol", "llmos.errors", "llmos.codes"}

# package: what its modules may import, nothing else. `llmos` alone is `llmos/__init__.py`, which holds the version.
MAY_IMPORT = {
    "llmos.codes": STDLIB,
    "llmos.errors": STDLIB | {"llmos.codes"},
    "llmos.protocol": STDLIB | PROTOCOL | {"msgspec"},
    "llmos.ports": STDLIB | PROTOCOL | {"zmq", "llmos.ports"},
    "llmos.keys": STDLIB | PROTOCOL | {"zmq", "msgspec", "llmos.keys"},
    "llmos.encoders": STDLIB,
    "llmos.guard": STDLIB,
    "llmos.log": STDLIB,
    "llmos.killpoints": STDLIB,
    "llmos.tcp_address": STDLIB | PROTOCOL,
    "llmos.toml_tables": STDLIB,
    "llmos.http_place": STDLIB | PROTOCOL | {"llmos.ports.endpoint", "llmos.tcp_address", "msgspec"},
    "llmos.http_links": STDLIB | {"msgspec"},
    "llmos.tools": STDLIB | PROTOCOL | {"llmos.tools"},
    "llmos.config": STDLIB | PROTOCOL | {"llmos.http_place", "llmos.log", "llmos.tcp_address", "llmos.toml_tables"},
}
KERNEL_HEAVY = HEAVY - {"numpy"}  # per-row arrays may be numpy columns where a measurement shows that it pays
OURS = {f"llmos.{name}" for name in ("microkernel", "supervisor", "client", "ctl", "services", "kernels")}
NOT_FOR_SERVICES = {f"llmos.{name}" for name in ("microkernel", "supervisor", "client", "ctl")}
IMPURE = set(
    [
        "zmq",
        "asyncio",
        "threading",
        "multiprocessing",
        "subprocess",
        "socket",
        "time",
        "datetime",
        "random",
        "secrets",
        "os",
    ]
)
# package: what its modules must never import (beside itself). The longest matching package rules.
MUST_NOT_IMPORT = {
    "llmos.microkernel": KERNEL_HEAVY | IMPURE | OURS | {"llmos.ports", "llmos.config"},
    "llmos.microkernel.journal": KERNEL_HEAVY
    | OURS - {"llmos.microkernel"}
    | {"llmos.ports", "llmos.config", "zmq", "asyncio", "threading"},
    "llmos.microkernel.reserve": KERNEL_HEAVY | OURS | {"llmos.ports", "llmos.config", "zmq", "asyncio", "threading"},
    "llmos.microkernel.main": KERNEL_HEAVY | OURS - {"llmos.microkernel"},
    "llmos.supervisor": HEAVY | OURS | {"asyncio", "uvloop"},
    "llmos.client": HEAVY | OURS | {"llmos.config"},
    "llmos.ctl": HEAVY | OURS - {"llmos.client"} | {"llmos.ports"},
    "llmos.kernels": {"llmos"},
    "llmos.services": NOT_FOR_SERVICES,
    "llmos.services.base": HEAVY | NOT_FOR_SERVICES | {"llmos.kernels"},
    "llmos.services.storage": HEAVY | NOT_FOR_SERVICES | {"llmos.kernels"},
    "llmos.services.gateway": HEAVY | NOT_FOR_SERVICES | {"llmos.kernels"},
    "llmos.services.text": NOT_FOR_SERVICES | {"torch", "triton", "zmq", "llmos.kernels"},
    "llmos.services.grammar": NOT_FOR_SERVICES | {"torch", "triton", "transformers", "zmq", "llmos.kernels"},
    "llmos.services.tokenizer": NOT_FOR_SERVICES | {"torch", "triton", "llmos.kernels"},
}
# What services may import beside themselves: code that more than one of them needs, and that is no service.
SHARED = ("llmos.services.base", "llmos.services.text", "llmos.services.grammar")
# The one exception: the microkernel's shell uses what every child process uses around its work.
EXCEPTIONS = {("llmos.microkernel.main", "llmos.services.base")}


def modules():
    """{dotted name: file} of all source modules."""
    found = {}
    for package, root in TREES.items():
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imports(name, source, *, is_package=False):
    """Dotted names that a module imports anywhere in its text; `from a import b` counts as a.b."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def within(name, package):
    return name == package or name.startswith(f"{package}.")


def rule_for(name, table):
    matching = [package for package in table if within(name, package)]
    return max(matching, key=len) if matching else None


def violations(name, imported):
    """What a module imports against the tables."""
    allowed, forbidden = rule_for(name, MAY_IMPORT), rule_for(name, MUST_NOT_IMPORT)
    bad = set()
    for target in imported:
        if any(name == module and within(target, package) for module, package in EXCEPTIONS):
            continue
        if allowed and not any(within(target, package) for package in MAY_IMPORT[allowed]):
            bad.add(target)
        # Its own package is allowed even where a rule forbids all of llmos.
        own = forbidden if forbidden and within(target, forbidden) else None
        if forbidden and not own and any(within(target, package) for package in MUST_NOT_IMPORT[forbidden]):
            bad.add(target)
        if within(name, "llmos.services") and within(target, "llmos.services"):
            mine = ".".join(name.split(".")[:3])
            if not any(within(target, package) for package in (*SHARED, mine)):
                bad.add(target)
    return sorted(bad)


@pytest.mark.parametrize("name", sorted(modules()))
def test_import_directions(name):
    path = modules()[name]
    assert violations(name, imports(name, path.read_text(), is_package=path.name == "__init__.py")) == []


def test_every_rule_has_a_module():
    names = modules()
    for table in (MAY_IMPORT, MUST_NOT_IMPORT):
        for package in table:
            assert any(rule_for(name, table) == package for name in names), package


@pytest.mark.parametrize(
    ("name", "source", "bad"),
    [
        ("llmos.microkernel.pages", "import time", ["time"]),
        ("llmos.microkernel.pages", "def f():\n    from zmq import Context", ["zmq.Context"]),
        ("llmos.microkernel.pages", "from llmos import ports", ["llmos.ports"]),
        ("llmos.microkernel.pages", "from llmos.microkernel import main\nfrom llmos.codes import SeqState", []),
        ("llmos.microkernel.main", "import time, zmq\nfrom llmos.ports import sync\nimport llmos.config", []),
        ("llmos.microkernel.main", "from ..services import storage", ["llmos.services.storage"]),
        ("llmos.microkernel.pages", "from llmos.services.base import f", ["llmos.services.base.f"]),
        ("llmos.protocol.codec", "import zmq", ["zmq"]),
        ("llmos.protocol.codec", "import msgspec.msgpack, json", []),
        ("llmos.ports.lifeline", "from llmos.config import Config", ["llmos.config.Config"]),
        ("llmos.client.sync", "import numpy as np", ["numpy"]),
        ("llmos.ctl.main", "from llmos.ports.sync import Dialer", ["llmos.ports.sync.Dialer"]),
        ("llmos.kernels.attention", "import torch, triton\nfrom llmos.kernels.common import f", []),
        ("llmos.kernels.attention", "from llmos.errors import LlmosError", ["llmos.errors.LlmosError"]),
        ("llmos.services.gateway.main", "from llmos.services.tokenizer import chat", ["llmos.services.tokenizer.chat"]),
        (
            "llmos.services.gateway.main",
            "from llmos.services.base import f\nfrom llmos.services.gateway.x import y",
            [],
        ),
        ("llmos.services.base", "from llmos.services.storage import x", ["llmos.services.storage.x"]),
        ("llmos.services.storage.digest", "import torch.nn", ["torch.nn"]),
        ("llmos.services.executor.main", "import torch, llmos.kernels.x", []),
    ],
)
def test_the_check_itself(name, source, bad):
    assert violations(name, imports(name, source)) == bad


def loaded(code, cwd=None):
    """Top-level packages and llmos packages in `sys.modules` after running `code` in a fresh process."""
    program = f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True, cwd=cwd)
    return {name for name in done.stdout.splitlines() if name.count(".") == 0 or name.startswith("llmos.")}


CLIENT = "from llmos import *\nimport llmos.client.sync, llmos.client.aio, llmos.client.types"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (
            CLIENT,
            HEAVY
            | {"llmos.config", "llmos.microkernel", "llmos.services", "llmos.supervisor", "typer", "rich", "psutil"},
        ),
        ("import llmos.ctl.main", HEAVY | {"llmos.microkernel", "llmos.services", "llmos.supervisor"}),
        ("import llmos.microkernel.main", KERNEL_HEAVY | {"llmos.services.executor", "llmos.supervisor"}),
        ("import llmos.services.storage.service", HEAVY | {"llmos.microkernel"}),
        ("import llmos.services.gateway.service", HEAVY | {"llmos.microkernel"}),
        ("import llmos", HEAVY | {"zmq", "msgspec", "llmos.client", "llmos.errors"}),
    ],
)
def test_what_a_process_loads(code, absent):
    assert loaded(code) & absent == set()


@pytest.mark.slow
def test_our_kernels_are_not_importable_by_their_bare_name():
    """PyPI has a package `kernels` that transformers imports; ours must not shadow it, wherever a process is started."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert str(ROOT / "kernels") not in done.stdout
